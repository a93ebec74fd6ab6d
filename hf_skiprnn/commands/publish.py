"""Publish a checkpoint on the Hub: `hf-skiprnn publish`."""

import sys
import tempfile
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from pathlib import Path

from hf_skiprnn.hub.folder import Checkpoint, belonging, read_checkpoint, stage
from hf_skiprnn.hub.upload import HubError, publish

from .option_parser import HelpFormatter

DESCRIPTION = """Publish a checkpoint on the Hub: check it, upload it, download it again to compare, and tag it.

    hf-skiprnn publish runs/digits-skip-lstm you/skip-lstm-digits --dry-run
    hf-skiprnn publish runs/digits-skip-lstm you/skip-lstm-digits --version v1.0 --license apache-2.0

Only known files are sent: weights, settings, the model's code, results, pictures and the card, which is rendered from
results.json. The local folder is not changed. The token comes from `hf auth login` or HF_TOKEN. After an interruption,
run the same command again to complete the upload.
"""


def parse(argv: list[str]) -> Namespace:
    """Return the options of the command line."""
    parser = ArgumentParser(
        prog="hf-skiprnn publish", description=DESCRIPTION, formatter_class=HelpFormatter, allow_abbrev=False
    )
    parser.add_argument("checkpoint", type=Path, help="folder that save_pretrained or hf-skiprnn train wrote")
    parser.add_argument("repo", help="OWNER/NAME on the Hub; created if it does not exist")
    parser.add_argument("--dry-run", action="store_true", help="show the card, files and problems; send nothing")
    parser.add_argument("--version", default="v1.0", help="tag for this checkpoint; an existing tag is never moved")
    parser.add_argument("--branch", default="main", help="branch to upload to; created if it does not exist")
    parser.add_argument("--license", help="licence of the weights, as the Hub names it: apache-2.0, mit, cc-by-4.0")
    parser.add_argument("--private", action=BooleanOptionalAction, default=False, help="make a new repository private")
    parser.add_argument("--delete", action="store_true", help="delete the other files on the branch")
    return parser.parse_args(argv)


def report(checkpoint: Checkpoint, left_out: list[str], dry_run: bool) -> None:
    """Print the files that would be sent, the files left out, and the problems."""
    card = checkpoint.folder / "README.md"
    if dry_run and card.is_file():
        print(card.read_text(encoding="utf-8"))
    for file in checkpoint.files:
        print(f"{file.size:>12,}  {file.sha256[:12]}  {file.path}")
    print(f"{sum(file.size for file in checkpoint.files):>12,}  bytes in {len(checkpoint.files)} files")
    if left_out:
        print(f"not sent: {', '.join(left_out)}")
    if card.is_file() and "\nlicense:" not in card.read_text(encoding="utf-8"):
        print("no licence: nobody else may use the weights. Choose one with --license NAME")
    for problem in checkpoint.problems:
        print(f"problem: {problem}")


def main(argv: list[str] | None = None) -> int:
    """Publish a checkpoint; return 0 on success, 1 if the checkpoint has problems or the Hub refused it."""
    options = parse(sys.argv[1:] if argv is None else argv)
    with tempfile.TemporaryDirectory(prefix="hf_skiprnn-") as scratch:
        place = Path(scratch, options.checkpoint.resolve().name)
        try:
            stage(options.checkpoint, options.repo, place, license_id=options.license)
        except (OSError, KeyError, ValueError) as error:
            print(f"{options.checkpoint} is not a complete checkpoint: {error}", file=sys.stderr)
            return 1
        checkpoint = read_checkpoint(place)
        report(checkpoint, belonging(options.checkpoint)[1], options.dry_run)
        if checkpoint.problems:
            return 1
        if options.dry_run:
            print("dry run: nothing was sent")
            return 0
        return send(checkpoint, options)


def send(checkpoint: Checkpoint, options: Namespace) -> int:
    """Upload and verify; returns the exit status."""
    try:
        done = publish(
            checkpoint,
            options.repo,
            private=options.private,
            branch=options.branch,
            version=options.version,
            delete=options.delete,
        )
    except HubError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{done.url} at {done.commit}, version {done.tag}: {len(done.files)} files, verified")
    return 0
