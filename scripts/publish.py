"""The same as `hf-skiprnn publish`; see hf_skiprnn/commands/publish.py."""

from hf_skiprnn.commands.publish import main

if __name__ == "__main__":
    main()
