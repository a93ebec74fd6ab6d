"""`python -m hf_skiprnn`: the same as the console command `hf-skiprnn`."""

import sys

from hf_skiprnn_cli import main

if __name__ == "__main__":
    sys.exit(main())
