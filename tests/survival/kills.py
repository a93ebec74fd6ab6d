"""Trainings killed with SIGKILL at random moments and started again by the same command, against ones left alone.

    python tests/survival/kills.py                       # 20 kills in each of CASES; writes kills.csv
    python tests/survival/kills.py --cases map --kills 4 --seed 7

A moment is drawn as a phase (a training step, a checkpoint being written, an evaluation, the end, or anything from the
start on), which of them, and how far into it. What must be equal, bit for bit: the final weights, the last
checkpoint's optimizer, and what it says of the best model; and every metric.
"""

import argparse
import csv
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from safetensors.torch import load_file

HERE = Path(__file__).parent
TABLE = HERE / "kills.csv"
VICTIM = str(HERE / "victim.py")
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
PATIENCE = 1800.0  # seconds for a run of a few, on a machine that others keep busy

COMMON = """--hidden_size 8 --classifier_dropout 0.2 --learning_rate 0.01 --lr_scheduler_type cosine --logging_steps 4
    --eval_strategy steps --eval_steps 6 --save_strategy steps --save_steps 6 --save_total_limit 2 --use_cpu true
    --disable_tqdm true --report_to none --seed 3"""
MAP = f"""--task digits {COMMON} --num_train_epochs 2 --per_device_train_batch_size 64 --budget_weight 1e-3
    --load_best_model_at_end true --metric_for_best_model accuracy"""
STREAM = f"""--task adding {COMMON} --length 20 --eval_rows 200 --max_steps 32 --per_device_train_batch_size 16
    --gradient_accumulation_steps 2 --target_update_rate 0.6 --budget_weight 1e-3"""


class Case(NamedTuple):
    """A training: options of scripts/train.py, and how many processes share it."""

    options: str
    processes: int


# logging_steps does not divide save_steps: a checkpoint falls into the middle of a logging window. max_steps is no
# multiple of either. A random gate draws from the generator of every process.
CASES = {
    "map": Case(MAP, 1),
    "stream": Case(STREAM, 1),
    "map, random gate": Case(f"{MAP} --gate random --skip_probability 0.3 --budget_weight 0", 1),
    "stream, worker": Case(f"{STREAM} --dataloader_num_workers 1", 1),
    "map, 2 processes": Case(MAP.replace("batch_size 64", "batch_size 32"), 2),
    "stream, 2 processes": Case(STREAM.replace("batch_size 16", "batch_size 8"), 2),
}
PHASES = ("start", "step", "save", "evaluate", "finish")


@dataclass
class Run:
    """One process's, or group of processes', life."""

    events: list[tuple[float, str]] = field(default_factory=list)  # (seconds since the start, "@begin save")
    killed: str | None = None  # where


class Moment(NamedTuple):
    """When to kill: `share` of the way through the `index`-th (from the start of the run) occurrence of a phase."""

    phase: str
    index: int
    seconds: float


def start(case: Case, folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, *(TWO if case.processes == 2 else []), VICTIM, *case.options.split()]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    with (folder.parent / f"{folder.name}.log").open("a") as log:
        return subprocess.Popen(
            [*command, "--output_dir", str(folder)],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
            cwd=HERE.parents[1],
        )


def live(case: Case, folder: Path, moment: Moment | None) -> Run:
    """Start a run; kill all of its processes at the moment, or see it end.

    Raises:
        RuntimeError: it ended with an error of its own.
    """
    run, begin, seen = Run(), time.monotonic(), 0
    with start(case, folder) as process:
        assert process.stdout is not None
        if moment is not None and moment.phase == "start":
            time.sleep(moment.seconds)
            run.killed = "start"
        for line in () if run.killed else events(process.stdout):
            run.events.append((time.monotonic() - begin, line))
            if moment is not None and line == f"@begin {moment.phase}":
                seen += 1
                if seen > moment.index:
                    time.sleep(moment.seconds)
                    run.killed = moment.phase
                    break
        if run.killed:
            kill(process.pid)
        code = process.wait(PATIENCE)
    if not run.killed and code != 0:
        raise RuntimeError((folder.parent / f"{folder.name}.log").read_text()[-3000:])
    return run


def events(lines: Any) -> Iterator[str]:
    return (line.strip() for line in lines if line.startswith("@"))


def kill(pid: int) -> None:
    """SIGKILL a process and all below it, the launcher first, so that it cannot tidy up."""
    try:
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in family:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, timeout=30)


def durations(run: Run) -> dict[str, list[float]]:
    """Seconds of every occurrence of every phase; "start": until the first step."""
    found: dict[str, list[float]] = {phase: [] for phase in PHASES}
    opened: dict[str, float] = {}
    for at, line in run.events:
        word, phase = line[1:].split()
        if word == "begin":
            opened[phase] = at
        elif phase in opened:
            found[phase].append(at - opened.pop(phase))
    found["start"] = [next(at for at, line in run.events if line == "@begin step")]
    return found


def draw(rng: random.Random, seconds: dict[str, list[float]], nearer: int) -> Moment:
    """A moment: any part, and a little beyond, of any occurrence (of the first 1 / nearer of them) of a phase."""
    phase = rng.choices(PHASES, (1, 3, 3, 2, 1))[0]
    index = rng.randrange(max(len(seconds[phase]) // nearer, 1))
    return Moment(phase, index, rng.uniform(0, 1.1) * seconds[phase][index])


def outcome(folder: Path) -> dict[str, Any]:
    """What a finished run left: tensors and facts."""
    last = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    state = json.loads((last / "trainer_state.json").read_text())
    optimizer = torch.load(last / "optimizer.pt", weights_only=True)["state"]
    results = json.loads((folder / "results.json").read_text())
    tensors = load_file(folder / "model.safetensors") | {
        f"{index}.{name}": value for index, group in optimizer.items() for name, value in group.items()
    }
    kept = sorted(path.name for path in folder.glob("checkpoint-*") if (path / "complete").is_file())
    logs = [timeless(log) for log in state["log_history"]]
    facts = {name: state[name] for name in ("best_metric", "best_global_step", "global_step", "epoch", "total_flos")}
    return {
        "tensors": tensors,
        "metrics": [timeless(split) for split in results["metrics"].values()],
        "logs": logs,
        "kept": kept,
        **facts,
    }


def timeless(metrics: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metrics.items() if "_per_second" not in name and "runtime" not in name}


def differences(got: dict[str, Any], want: dict[str, Any]) -> list[str]:
    """What is not the same, bit for bit."""
    # A kill between the last save and the deletion of what is older leaves one checkpoint more.
    found = ["kept"] if not set(want["kept"]) <= set(got["kept"]) else []
    found += [name for name in want if name not in ("tensors", "kept") and got[name] != want[name]]
    tensors = want["tensors"]
    return found + [name for name in tensors if not torch.equal(got["tensors"][name], tensors[name])]


def append(row: dict[str, Any], path: Path) -> None:
    """One more row of the table, which so holds what was done even if the campaign itself is cut off."""
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def campaign(name: str, kills: int, kills_per_run: int, seed: int, folder: Path, output: Path) -> list[dict[str, Any]]:
    """Rows of the table: one per training that was killed so many times on its way."""
    case, rng, rows = CASES[name], random.Random(seed), []
    whole = live(case, folder / "whole", None)
    want, seconds = outcome(folder / "whole"), durations(whole)
    while kills > 0:
        target, moments = folder / f"killed-{len(rows)}", []
        while len(moments) < min(kills_per_run, kills):
            run = live(case, target, draw(rng, seconds, 1 + len(moments)))
            if not run.killed:  # it ended before that moment came
                break
            moments.append(run.killed)
        live(case, target, None)
        lost = differences(outcome(target), want)
        rows.append(
            {
                "case": name,
                "processes": case.processes,
                "kills": len(moments),
                **{phase: moments.count(phase) for phase in PHASES},
                "different": "; ".join(lost) or "nothing",
            }
        )
        print(rows[-1], flush=True)
        append(rows[-1], output)
        shutil.rmtree(target)
        kills -= max(len(moments), 1)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--kills", type=int, default=20, help="in each case")
    parser.add_argument("--kills_per_run", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=TABLE)
    options = parser.parse_args()
    rows = []
    options.output.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="hf_skiprnn-kills-") as scratch:
        for name in options.cases:
            folder = Path(scratch, name.replace(", ", "-").replace(" ", "-"))
            folder.mkdir()
            rows += campaign(name, options.kills, options.kills_per_run, options.seed, folder, options.output)
    sys.exit(any(row["different"] != "nothing" for row in rows))


if __name__ == "__main__":
    main()
