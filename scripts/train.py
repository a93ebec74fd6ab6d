"""The same as `hf-skiprnn train`; see hf_skiprnn/commands/train.py."""

from hf_skiprnn.commands.train import main

if __name__ == "__main__":
    main()
