"""The same as `hf-skiprnn evaluate`; see hf_skiprnn/commands/evaluate.py."""

from hf_skiprnn.commands.evaluate import main

if __name__ == "__main__":
    main()
