"""Publish a checkpoint on the Hub: check, upload, download again and compare, tag.

    python scripts/publish.py runs/digits-skip-lstm you/skip-lstm-digits --dry-run
    python scripts/publish.py runs/digits-skip-lstm you/skip-lstm-digits --version v1.0

The card is rendered from results.json on the way; the folder stays as it is. The token comes from `hf auth login` or
HF_TOKEN. Cut off anywhere, the same command again completes it.
"""

import sys
import tempfile
from argparse import ArgumentParser, BooleanOptionalAction
from pathlib import Path

from hf_skiprnn.hub.folder import checkpoint_files, checkpoint_problems, stage
from hf_skiprnn.hub.upload import HubError, publish


def report(folder: Path) -> list[str]:
    """Print what would be sent and what is wrong with it; returns the problems."""
    files, problems = checkpoint_files(folder), checkpoint_problems(folder)
    for file in files:
        print(f"{file.size:>12,}  {file.sha256[:12]}  {file.path}")
    print(f"{sum(file.size for file in files):>12,}  bytes in {len(files)} files")
    for problem in problems:
        print(f"problem: {problem}")
    return problems


def main(argv: list[str] | None = None) -> int:
    """Returns 0 if all went well, 1 if the checkpoint has problems or the Hub refused."""
    parser = ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("checkpoint", type=Path, help="folder that save_pretrained or scripts/train.py wrote")
    parser.add_argument("repo", help="OWNER/NAME on the Hub; made if it is not there")
    parser.add_argument("--dry-run", action="store_true", help="only list files, sizes and problems; send nothing")
    parser.add_argument("--version", default="v1.0", help="tag for this checkpoint; a version never moves")
    parser.add_argument("--branch", default="main", help="where to put it")
    parser.add_argument("--private", action=BooleanOptionalAction, default=False, help="of a repository that is made")
    parser.add_argument("--delete", action="store_true", help="delete what else the branch holds")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="hf_skiprnn-") as scratch:
        try:
            folder = stage(options.checkpoint, options.repo, Path(scratch, options.checkpoint.resolve().name))
        except (OSError, KeyError) as error:
            print(f"{options.checkpoint} is no complete checkpoint: {error!r}", file=sys.stderr)
            return 1
        if report(folder):
            return 1
        if options.dry_run:
            print("dry run: nothing was sent")
            return 0
        try:
            done = publish(
                folder,
                options.repo,
                private=options.private,
                branch=options.branch,
                version=options.version,
                delete=options.delete,
            )
        except HubError as error:
            print(error, file=sys.stderr)
            return 1
    print(f"{done.url} at {done.commit}, version {done.tag}: {len(done.files)} files, all as they are here")
    return 0


if __name__ == "__main__":
    sys.exit(main())
