"""Publish a checkpoint on the Hub: `hf-skiprnn publish`."""

import sys
import tempfile
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from pathlib import Path

from hf_skiprnn.hub.folder import Checkpoint, belonging, read_checkpoint, stage
from hf_skiprnn.hub.upload import HubError, publish

from .option_parser import HelpFormatter

DESCRIPTION = """Publish a checkpoint on the Hub: check, upload, download again and compare, tag.

    hf-skiprnn publish runs/digits-skip-lstm you/skip-lstm-digits --dry-run
    hf-skiprnn publish runs/digits-skip-lstm you/skip-lstm-digits --version v1.0 --license apache-2.0

Only known files are sent: weights, settings, code of the model, results, pictures and the card, which is rendered from
results.json on the way; the folder stays as it is. The token comes from `hf auth login` or HF_TOKEN. Interrupted
anywhere, the same command completes it.
"""


def parse(argv: list[str]) -> Namespace:
    """Return the options of the command line."""
    parser = ArgumentParser(
        prog="hf-skiprnn publish", description=DESCRIPTION, formatter_class=HelpFormatter, allow_abbrev=False
    )
    parser.add_argument("checkpoint", type=Path, help="folder that save_pretrained or hf-skiprnn train wrote")
    parser.add_argument("repo", help="OWNER/NAME on the Hub; created if it does not exist")
    parser.add_argument("--dry-run", action="store_true", help="show the card, files and problems; send nothing")
    parser.add_argument("--version", default="v1.0", help="tag for this checkpoint; a version never moves")
    parser.add_argument("--branch", default="main", help="where to put it")
    parser.add_argument("--license", help="licence of the weights, as the Hub names it: apache-2.0, mit, cc-by-4.0")
    parser.add_argument("--private", action=BooleanOptionalAction, default=False, help="if it is created")
    parser.add_argument("--delete", action="store_true", help="delete what else the branch holds")
    return parser.parse_args(argv)


def report(checkpoint: Checkpoint, left_out: list[str], dry_run: bool) -> None:
    """Print what would be sent, what stays here, and what is wrong."""
    card = checkpoint.folder / "README.md"
    if dry_run and card.is_file():
        print(card.read_text(encoding="utf-8"))
    for file in checkpoint.files:
        print(f"{file.size:>12,}  {file.sha256[:12]}  {file.path}")
    print(f"{sum(file.size for file in checkpoint.files):>12,}  bytes in {len(checkpoint.files)} files")
    if left_out:
        print(f"not sent: {', '.join(left_out)}")
    if card.is_file() and "\nlicense:" not in card.read_text(encoding="utf-8"):
        print("no licence: others may not use it. --license NAME says on which terms they may")
    for problem in checkpoint.problems:
        print(f"problem: {problem}")


def main(argv: list[str] | None = None) -> int:
    """Publish; returns 0 if all went well, 1 if the checkpoint has problems or the Hub refused."""
    options = parse(sys.argv[1:] if argv is None else argv)
    with tempfile.TemporaryDirectory(prefix="hf_skiprnn-") as scratch:
        place = Path(scratch, options.checkpoint.resolve().name)
        try:
            stage(options.checkpoint, options.repo, place, license_id=options.license)
        except (OSError, KeyError, ValueError) as error:
            print(f"{options.checkpoint} is no complete checkpoint: {error}", file=sys.stderr)
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
