"""Train a Skip LSTM to find a digit on a black canvas, reload it in a new process, and compare it with two baselines.

    python scripts/demo.py

The baselines are a plain LSTM, which reads every pixel, and a strided one, which reads every third pixel. All three
are trained at the same time on one thread each, with the recipe find_digit-skip-lstm, but less long. Each has its own
settings of Adam. Unknown options are passed to train.py:

    python scripts/demo.py --seed 1 --output_dir runs/demo-1
"""

import json
import os
import shutil
import subprocess
import sys
import time
from argparse import ArgumentParser
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).resolve().parent
sys.path[:] = [path for path in sys.path if Path(path).resolve() != SCRIPTS]  # its evaluate.py would hide `evaluate`

TASK, STRIDE = "find_digit", 3
SHORTER = ["--hidden_size=48", "--num_train_epochs=4"]  # the recipe's 64 units and 7 epochs take longer
# Each model has what is best on validation data after 5 epochs, of three settings: learning rates of 0.01 and 0.015
# with Adam's beta2 of 0.98, and 0.01 with 0.999. It is the mean of three seeds for the Skip LSTM, of one for the plain
# one, and of one or three for the stride.
BASELINE = ["--learning_rate=0.01"]
LEARNED = ["--learning_rate=0.015", "--adam_beta2=0.98"]
TRAIN = os.path.relpath(Path(__file__).with_name("train.py"))  # relative, because results.json stores the command
RIVALS = {
    "plain-lstm": ["--gate=always", *BASELINE],
    "skip-lstm": LEARNED,
    "strided-lstm": ["--gate=strided", f"--stride={STRIDE}", *BASELINE],
}
FIXED = ("--gate", "--stride", "--skip_probability", "--target_update_rate", "--dial", "--budget", "--steered")
SLOWEST = "plain-lstm"  # the others leave it a core, or two cores would wait for it in the end
SHOWN = "skip-lstm"  # its training prints to the terminal; the others print to train.log in their folders


def start(folder: Path, options: list[str], **streams: Any) -> subprocess.Popen[bytes]:
    """Start a training on one thread; such small scans do not profit from more."""
    command = [sys.executable, TRAIN, "--task", TASK, *SHORTER, f"--output_dir={folder}", *options]
    if folder.name != SLOWEST and (nice := shutil.which("nice")):
        command = [nice, "-n", "5", *command]
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, **streams)


def train(folder: Path, options: list[str]) -> dict[str, Any]:
    """Train one model, and return its results.

    Raises:
        SystemExit: the training failed; the message holds what it printed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if folder.name == SHOWN:
        code, said = start(folder, options).wait(), ""
    else:
        with (folder / "train.log").open("w", encoding="utf-8") as log:
            code = start(folder, options, stdout=log, stderr=subprocess.STDOUT).wait()
        said = (folder / "train.log").read_text(encoding="utf-8")
    if code:
        raise SystemExit(f"{said}\nThe training of {folder} failed with exit code {code}.")
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def read_again(folder: str) -> dict[str, float]:
    """Load a checkpoint with the Auto classes only; return its accuracy and pixels read on the test canvases.

    Also write reading.gif into the folder, which shows some canvases while they are read.
    """
    # Imported here, because the process that only waits for the others does not need them.
    import torch
    from transformers import AutoImageProcessor, AutoModelForSequenceClassification

    import hf_skiprnn  # noqa: F401 - registers the model with the Auto classes
    from hf_skiprnn.evaluation.animation import write_animation
    from hf_skiprnn.tasks import TASKS

    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    options = json.loads(Path(folder, "results.json").read_text(encoding="utf-8"))["task_options"]
    canvases = TASKS[TASK](**options).load(seed=0).test
    pixels, labels = processor(canvases["image"][:], return_tensors="pt")["pixel_values"], canvases["label"][:]
    with torch.no_grad():
        out = model(pixel_values=pixels, output_update_gates=True)
    answers = out.logits.argmax(dim=1).tolist()
    some = slice(0, len(answers), len(answers) // 4)
    names = [model.config.id2label[answer] for answer in answers[some]]
    write_animation(Path(folder, "reading.gif"), pixels[some, 0].numpy(), out.update_gates[some].numpy() > 0, names)
    right = sum(answer == label for answer, label in zip(answers, labels, strict=True))
    return {
        "accuracy": right / len(labels),
        "pixels": out.num_updates.mean().item(),
        "of": pixels[0].numel(),
        "canvases": len(labels),
    }


def read_again_in_a_new_process(folder: Path) -> dict[str, float]:
    """Call `read_again` in a new process, and return its result."""
    command = [sys.executable, __file__, "--read_again", str(folder)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def row(name: str, results: dict[str, Any]) -> str:
    """Return a line of the table."""
    test, counts = results["metrics"]["test"], results["multiply_accumulates"]
    return (
        f"{name:22} {test['accuracy']:9.1%} {test['updates']:12.1f} {test['update_rate']:7.0%} {counts['read']:12,.0f}"
    )


def main(argv: list[str]) -> None:
    """Train the three models, reload the Skip LSTM, and print the table."""
    parser = ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"), help="where the three runs go")
    parser.add_argument("--read_again", metavar="CHECKPOINT", help="only evaluate this checkpoint, and print JSON")
    settings, options = parser.parse_known_args(argv)
    if any(option.startswith(FIXED) for option in options):
        parser.error("the demo compares three gates; to choose a gate or a share, use scripts/train.py")
    if settings.read_again:
        print(json.dumps(read_again(settings.read_again)))
        return
    begin, folder = time.monotonic(), settings.output_dir
    print(f"Three trainings at the same time; this is {folder / SHOWN}:", flush=True)
    with ThreadPoolExecutor(len(RIVALS)) as pool:
        jobs = {name: pool.submit(train, folder / name, [*rival, *options]) for name, rival in RIVALS.items()}
        jobs[SHOWN].result()
        again = read_again_in_a_new_process(folder / SHOWN)
        print(f"loaded in a new process: accuracy {again['accuracy']:.1%}, {again['pixels']:.1f} pixels read")
        print("Waiting for the other trainings.", flush=True)
        results = {name: job.result() for name, job in jobs.items()}
    title, of = f"{again['canvases']:.0f} test canvases", f"of {again['of']:.0f}"
    print(f"\n{title:22} {'accuracy':>9} {'pixels read':>12} {of:>7} {'mult-adds':>12}")
    for name, title in (
        ("skip-lstm", "Skip LSTM"),
        ("plain-lstm", "plain LSTM"),
        ("strided-lstm", f"every {STRIDE}rd pixel"),
    ):
        print(row(title, results[name]))
    skip, plain, strided = (results[f"{name}-lstm"]["metrics"]["test"] for name in ("skip", "plain", "strided"))
    print(
        f"\nThe Skip LSTM reads {skip['updates']:.0f} {of} pixels and is right for {skip['accuracy']:.1%}. "
        f"A plain LSTM reads all: {plain['accuracy']:.1%}. Every {STRIDE}rd pixel: {strided['accuracy']:.1%}."
        f"\nPicture: {folder / SHOWN / 'steps-read-test.png'}. Watch it read: {folder / SHOWN / 'reading.gif'}."
        f"\n{time.monotonic() - begin:.0f} s."
    )


if __name__ == "__main__":
    main(sys.argv[1:])
