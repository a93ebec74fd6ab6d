"""The same as `hf-skiprnn evaluate`; see hf_skiprnn/commands/evaluate.py."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:] = [path for path in sys.path if Path(path).resolve() != HERE]  # evaluate.py hides Hugging Face's evaluate

from hf_skiprnn_cli import main  # noqa: E402 - after this folder has left the path

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
