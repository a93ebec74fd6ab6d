"""Copy a finished run into this repository as a checkpoint folder that anyone can load and evaluate from a clone.

    python -m scripts.paper.ship runs/adding model_cards/skip-lstm-adding
    python -m scripts.paper.ship runs/mnist model_cards/skip-lstm-mnist --dataset_name ylecun/mnist
    python -m scripts.paper.ship runs/imdb model_cards/skip-lstm-imdb --without_weights    # for large weights

It evaluates the run's checkpoint again on the test split, and exits if the numbers differ from its results.json. It
writes weights, configuration, processor, results.json, a picture of the steps read, and the card, but no files that
only training needs. The model's code is left out: a clone has it, and scripts/publish.py adds it for the Hub. Unknown
options are passed to scripts/evaluate.py.
"""

import json
import shutil
import sys
import tempfile
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from hf_skiprnn.commands import evaluate
from hf_skiprnn.hub.card import RESULTS, TIMES, write_card
from hf_skiprnn.hub.folder import checkpoint_files, checkpoint_problems, stage

LARGEST = 2_000_000  # largest size of a folder in bytes, so that a clone stays small
# Tolerance: in batches of another size, float32 sums of the same rows differ in their last digits.
TOLERANCE = 1e-4


def differences(told: dict[str, float], found: dict[str, float]) -> list[str]:
    """Return the metrics in which an evaluation differs from results.json, one text each."""
    shared = sorted(name for name in told.keys() & found.keys() if name not in TIMES)
    return [
        f"{name} is {found[name]:.6g}, and {RESULTS} says {told[name]:.6g}"
        for name in shared
        if abs(found[name] - told[name]) > TOLERANCE * max(1.0, abs(told[name]))
    ]


def build(run: Path, folder: Path, options: list[str]) -> None:
    """Make the checkpoint folder of a run, without its card. `folder` must not exist.

    Raises:
        SystemExit: the run is not finished, or its checkpoint gives other numbers than its results.json.
    """
    if not (run / RESULTS).is_file():
        raise SystemExit(f"{run} holds no {RESULTS}: it is not a finished run of scripts/train.py.")
    stage(run, folder.name, folder, code=False)
    with tempfile.TemporaryDirectory(prefix="hf_skiprnn-") as scratch:
        found = evaluate.main([str(folder), "--output_dir", scratch, *options])["metrics"]
        for picture in Path(scratch).glob("steps-read-test.*"):
            shutil.copyfile(picture, folder / picture.name)
    told = json.loads((folder / RESULTS).read_text(encoding="utf-8"))["metrics"]["test"]
    if changed := differences(told, found):
        raise SystemExit(f"{run} was not copied: {'; '.join(changed)}. Are the data the same?")


def problems_of(folder: Path, scratch: Path) -> list[str]:
    """Return the reasons why the Hub would refuse the folder after its code is added."""
    return checkpoint_problems(stage(folder, folder.name, scratch / folder.name))


def without_weights(folder: Path) -> None:
    """Delete everything but the configuration files, the results and the pictures."""
    for file in checkpoint_files(folder):
        if file.path not in ("config.json", "preprocessor_config.json", RESULTS) and not file.path.endswith(".png"):
            (folder / file.path).unlink()


def main(argv: list[str] | None = None) -> Any:
    """Make the folder in a temporary place, check it, and move it to its place, where it replaces an older one."""
    parser = ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("run", type=Path, help="folder that scripts/train.py wrote")
    parser.add_argument("folder", type=Path, help="checkpoint folder to write, as model_cards/skip-lstm-adding")
    parser.add_argument("--without_weights", action="store_true", help="configuration, card, results and pictures only")
    settings, options = parser.parse_known_args(argv)
    with tempfile.TemporaryDirectory(prefix="hf_skiprnn-") as scratch:
        made = Path(scratch, "made", settings.folder.name)
        location = f"{settings.folder.resolve().parent.name}/{made.name}"
        build(settings.run, made, options)
        problems = problems_of(made, Path(scratch, "published"))
        if settings.without_weights:
            without_weights(made)
        if (size := sum(file.size for file in checkpoint_files(made))) > LARGEST:
            problems.append(
                f"It has {size:,} bytes; at most {LARGEST:,} belong here: --without_weights leaves them out."
            )
        if problems:
            raise SystemExit(f"{settings.run} was not copied: {' '.join(problems)}")
        shutil.rmtree(settings.folder, ignore_errors=True)
        shutil.copytree(made, settings.folder)
    # The card is written here and not before, because it shows the measured times in the folder beside it.
    write_card(settings.folder, location, license_id="apache-2.0")
    for file in checkpoint_files(settings.folder):
        print(f"{file.size:>12,}  {file.path}")


if __name__ == "__main__":
    main(sys.argv[1:])
