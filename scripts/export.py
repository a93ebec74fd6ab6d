"""The same as `hf-skiprnn export`; see hf_skiprnn/commands/export.py."""

from hf_skiprnn.commands.export import main

if __name__ == "__main__":
    main()
