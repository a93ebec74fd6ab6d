"""Kill trainings with SIGKILL at random moments, restart them, and compare them with uninterrupted trainings.

    python tests/survival/kills.py                       # 20 kills in each of CASES; writes kills.csv
    python tests/survival/kills.py --cases map --kills 4 --seed 7 --fresh

A random moment consists of a phase (a training step, writing a checkpoint, an evaluation, the end, or the whole run),
the number of its occurrence, and the time since it began. The table says in which phase the process died. Final
weights, the last checkpoint's optimizer, its record of the best model, and every metric must be equal bit for bit.
Processes are forked from one that has only imported the libraries, which takes a tenth of the time; with --fresh the
interpreter and torchrun are started each time.
"""

import argparse
import csv
import functools
import importlib
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, TextIO

import psutil
import torch
from safetensors.torch import load_file

HERE = Path(__file__).parent
TABLE = HERE / "kills.csv"
VICTIM = str(HERE / "victim.py")
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
PATIENCE = 1800.0  # time limit in seconds for a run of a few seconds, because the machine may be busy

COMMON = """--hidden_size 8 --classifier_dropout 0.2 --learning_rate 0.01 --lr_scheduler_type cosine --logging_steps 4
    --eval_strategy steps --eval_steps 6 --save_strategy steps --save_steps 6 --save_total_limit 2 --use_cpu true
    --disable_tqdm true --report_to none --seed 3"""
MAP = f"""--task digits {COMMON} --max_steps 44 --per_device_train_batch_size 64 --budget_weight 1e-3
    --load_best_model_at_end true --metric_for_best_model accuracy"""
STREAM = f"""--task adding {COMMON} --length 20 --eval_rows 200 --max_steps 32 --per_device_train_batch_size 16
    --gradient_accumulation_steps 2 --target_update_rate 0.6 --budget_weight 1e-3"""


class Case(NamedTuple):
    """A training: options of scripts/train.py, and its number of processes."""

    options: str
    processes: int


# logging_steps does not divide save_steps, so that a checkpoint is in the middle of a logging window. max_steps is a
# multiple of neither. A random gate uses the generator of every process.
CASES = {
    "map": Case(MAP, 1),
    "stream": Case(STREAM, 1),
    "map, random gate": Case(f"{MAP} --gate random --skip_probability 0.3 --budget_weight 0", 1),
    "stream, worker": Case(f"{STREAM} --dataloader_num_workers 1", 1),
    "map, 2 processes": Case(MAP.replace("batch_size 64", "batch_size 32"), 2),
    "stream, 2 processes": Case(STREAM.replace("batch_size 16", "batch_size 8"), 2),
}
PHASES = ("start", "step", "save", "evaluate", "finish")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


class Moment(NamedTuple):
    """When to kill a run: processor time in seconds after the `index`-th begin of a phase."""

    phase: str
    index: int
    seconds: float


class Run(NamedTuple):
    """What the first process of a training printed between its start and its end or kill."""

    events: list[tuple[str, str, float]]  # ("begin", "save", its processor time)

    @property
    def was_killed(self) -> bool:
        return any(word == "kill" for word, _, _ in self.events)

    @property
    def place(self) -> str:
        """Return the innermost phase that the first process was in when it ended."""
        within: list[str] = []
        for word, phase, _ in self.events:
            if word == "begin" and phase != "start":
                within.append(phase)
            elif word == "end" and phase != "run":
                within.pop()
        begun = any(phase == "step" for _, phase, _ in self.events)
        return within[-1] if within else "between" if begun else "start"


class Fresh:
    """The processes of a training, started by a command."""

    def __init__(self, case: Case, options: list[str], moment: str, log: TextIO) -> None:
        launcher = TWO if case.processes == 2 else []
        self.process = subprocess.Popen(
            [sys.executable, *launcher, VICTIM, *options],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=os.environ | {"MOMENT": moment},
            cwd=HERE.parents[1],
            process_group=0,
        )
        assert self.process.stdout is not None
        self.output: TextIO = self.process.stdout

    def kill(self) -> None:
        """Send SIGKILL to the remaining processes, to the launcher first, so that it cannot clean up."""
        try:
            family = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        for process in family:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue

    def wait(self) -> int:
        return self.process.wait(PATIENCE)


class Forked:
    """The processes of a training, forked from this one."""

    def __init__(self, case: Case, options: list[str], moment: str, log: TextIO) -> None:
        victim = imported()
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            port = unused.getsockname()[1]
        reading, writing = os.pipe()
        self.pids: list[int] = []
        for rank in range(case.processes):
            if (pid := os.fork()) == 0:
                os.setpgid(0, self.pids[0] if self.pids else 0)  # a group that includes the data loader's workers
                os.dup2(writing, 1)
                os.dup2(log.fileno(), 2)
                if case.processes > 1:
                    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
                    os.environ |= {name: str(number) for name, number in ranks.items()}
                    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                victim.MOMENT = moment
                self.live(victim, options)
            os.setpgid(pid, self.pids[0] if self.pids else pid)  # parent and child both do it, to avoid a race
            self.pids.append(pid)
        os.close(writing)
        self.output: TextIO = os.fdopen(reading)

    def live(self, victim: Any, options: list[str]) -> None:
        """Train in the forked process, and exit it."""
        code = 1
        try:
            victim.main(options)
            code = 0
        except BaseException:  # noqa: BLE001 - an error of the training must not reach the code of this script
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)

    def kill(self) -> None:
        """Do nothing: SIGKILL went to the whole process group."""

    def wait(self) -> int:
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in self.pids]
        return next(filter(None, codes), 0)


@functools.cache
def imported() -> Any:
    """Import victim.py and everything that a training needs, and load the native engine."""
    for name in ("accelerate", "datasets", "sklearn.datasets"):
        importlib.import_module(name)
    importlib.import_module("hf_skiprnn.kernels.cpu.operators").unavailable_reason()
    return importlib.import_module("victim")


def live(case: Case, folder: Path, moment: Moment | None, fresh: bool) -> Run:
    """Start a run, and wait until it is killed at the moment or ends.

    Raises:
        RuntimeError: the run failed.
    """
    run, log = Run([]), folder.parent / f"{folder.name}.log"
    named = "" if moment is None else f"{moment.phase} {moment.index} {moment.seconds}"
    with log.open("a") as errors:
        training = (Fresh if fresh else Forked)(
            case, [*case.options.split(), "--output_dir", str(folder)], named, errors
        )
    for line in training.output:
        if line.startswith("@"):
            word, phase, at = line[1:].split()
            run.events.append((word, phase, float(at)))
            if word == "kill":
                training.kill()
    training.output.close()
    if training.wait() != 0 and not run.was_killed:
        raise RuntimeError(log.read_text()[-3000:])
    return run


def durations(run: Run) -> dict[str, list[float]]:
    """Return the processor time of every occurrence of every phase, in seconds; "start": until the first step."""
    found: dict[str, list[float]] = {phase: [] for phase in PHASES}
    opened: dict[str, float] = {}
    for word, phase, at in run.events:
        if word == "begin":
            opened[phase] = at
        elif phase in opened:
            found[phase].append(at - opened.pop(phase))
    found["start"] = [next(at for _, phase, at in run.events if phase == "step") - opened["start"]]
    return found


def draw(rng: random.Random, seconds: dict[str, list[float]], nearer: int) -> Moment:
    """Draw a moment during or shortly after an occurrence of a phase; only from the first 1 / nearer of them."""
    phase = rng.choices(PHASES, (1, 3, 3, 2, 1))[0]
    index = rng.randrange(max(len(seconds[phase]) // nearer, 1))
    return Moment(phase, index, rng.uniform(0, 1.1) * median(seconds[phase]))


def outcome(folder: Path) -> dict[str, Any]:
    """Return the tensors and metrics that a finished run left."""
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
    """Return the names of what differs, bit for bit."""
    # A kill between the last save and the deletion of older checkpoints leaves one more checkpoint.
    found = ["kept"] if not set(want["kept"]) <= set(got["kept"]) else []
    found += [name for name in want if name not in ("tensors", "kept") and got[name] != want[name]]
    tensors = want["tensors"]
    return found + [name for name in tensors if not torch.equal(got["tensors"][name], tensors[name])]


def append(row: dict[str, Any], path: Path) -> None:
    """Append a row to the table at once, so that an interrupted campaign keeps its rows."""
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def campaign(name: str, options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Kill trainings of one case; return the rows of the table, one for each training."""
    case, rng, rows, kills = CASES[name], random.Random(options.seed), [], options.kills
    whole = live(case, folder / "whole", None, options.fresh)
    want, seconds = outcome(folder / "whole"), durations(whole)
    while kills > 0:
        target, places = folder / f"killed-{len(rows)}", []
        while len(places) < min(options.kills_per_run, kills):
            run = live(case, target, draw(rng, seconds, 1 + len(places)), options.fresh)
            if not run.was_killed:  # the run ended before the moment
                break
            places.append(run.place)
        live(case, target, None, options.fresh)
        lost = differences(outcome(target), want)
        rows.append(
            {
                "case": name,
                "processes": case.processes,
                "started": "fresh" if options.fresh else "forked",
                "kills": len(places),
                **{place: places.count(place) for place in (*PHASES, "between")},
                "different": "; ".join(lost) or "nothing",
            }
        )
        print(rows[-1], flush=True)
        append(rows[-1], options.output)
        shutil.rmtree(target)
        kills -= len(places)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--kills", type=int, default=20, help="number of kills in each case")
    parser.add_argument("--kills_per_run", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fresh", action="store_true", help="start the interpreter anew each time")
    parser.add_argument("--append", action="store_true", help="to the table that is there")
    parser.add_argument("--output", type=Path, default=TABLE)
    options = parser.parse_args()
    os.environ |= ENVIRONMENT
    rows = []
    if not options.append:
        options.output.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="hf_skiprnn-kills-") as scratch:
        for name in options.cases:
            folder = Path(scratch, name.replace(", ", "-").replace(" ", "-"))
            folder.mkdir()
            rows += campaign(name, options, folder)
    sys.exit(any(row["different"] != "nothing" for row in rows))


if __name__ == "__main__":
    main()
