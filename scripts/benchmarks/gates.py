"""Compare the learned gate with reading every k-th step, random steps, and every step.

    python -m scripts.benchmarks.gates --tasks find_digit frequency --seeds 3       # train the missing runs
    python -m scripts.benchmarks.gates --report                                      # print and draw stored results

The same recipe, TASK-skip-lstm, trains every model of a task for the same number of steps; only the gate differs. A
strided model of 0.33 and one of 0.35 are the same: both read every third step. On imdb and own_imdb, models without a
learned gate are taken from their best step on validation data, as they overfit. The tasks own_... load data as a user
would, with --dataset_name and the defaults for own data: own_imdb and own_fsdd those of imdb and fsdd, own_plaid and
own_vowels the folders that archive.py writes. To use a local copy of the data of imdb or fsdd, train one such task at a
time with --dataset_name FOLDER. A dial is one model for all shares (--dial), trained for twice the steps unless
--max_steps is given; it is evaluated at each share. Each kind of model gets the learning rate, of three around the
recipe's, that is best on validation data with seed 1. A run whose folder under --runs holds a results.json is finished;
the same command then trains the other runs. Unknown options, such as --max_steps, are passed to scripts/train.py.
Results: model_cards/gates/results.json.
"""

import json
import os
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from hf_skiprnn.commands.recipe_files import RECIPES, read_recipe
from hf_skiprnn.commands.runs import check_run, describe
from hf_skiprnn.commands.train_options import parse
from hf_skiprnn.evaluation.figures import Runs, accuracy_against_updates
from hf_skiprnn.evaluation.files import write_whole
from hf_skiprnn.hub.card import MAIN_METRICS
from hf_skiprnn.tasks.fsdd import FSDD
from hf_skiprnn.tasks.imdb import IMDB

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ROOT / "scripts" / "train.py"
SHARES = (0.1, 0.2, 0.35)
RATES = (1.0, 0.5, 2.0)  # times the recipe's learning rate
# Options that load a task's data as a user's.
OWN_DATA = {
    "own_imdb": [f"--dataset_name={IMDB.dataset_name}"],
    "own_fsdd": [f"--dataset_name={FSDD.dataset_name}", "--input_column=audio"],
    "own_plaid": ["--dataset_name=runs/data/PLAID"],
    "own_vowels": ["--dataset_name=runs/data/JapaneseVowels"],
}
# These trainings are so long that all but the learned gates overfit: they keep the best checkpoint on validation data.
OVERFIT = {"imdb", "own_imdb"}
KEEP_BEST = ["--load_best_model_at_end", "--metric_for_best_model=accuracy"]
TASKS = ("find_digit", "keyword", "mnist", "imdb", "adding", "frequency", "fsdd", *OWN_DATA)
DIAL = (0.05, 0.9)  # lowest and highest share of a dial
NAMES = {
    "learned": "Skip LSTM",
    "dial": "Skip LSTM, one dial",
    "strided": "LSTM, strided",
    "random": "LSTM, random skips",
    "plain": "LSTM",
}
DIGITS = {"accuracy": ".3f", "mse": ".2g"}  # how a metric is written
TOLERANCE = 0.1  # largest relative difference between the share asked for and the share read


class Job(NamedTuple):
    """A run to train."""

    task: str
    kind: str  # a key of NAMES
    share: float  # of the steps; 1 for a plain model and for a dial
    seed: int
    rate: float  # factor of the recipe's learning rate

    def folder(self, runs: Path) -> Path:
        """Return the folder of the run."""
        return runs / self.task / f"{self.kind}-{self.share:g}" / f"lr-x{self.rate:g}-seed-{self.seed}"

    def options(self) -> list[str]:
        """Return the options of scripts/train.py."""
        gate = {
            "learned": [f"--target_update_rate={self.share}"],
            "dial": ["--dial", *map(str, DIAL)],
            "strided": ["--gate=strided", f"--stride={round(1 / self.share)}"],
            "random": ["--gate=random", f"--skip_probability={1 - self.share:.6f}"],
            "plain": ["--gate=always"],
        }
        is_own = self.task in OWN_DATA
        recipe = "own_data-skip-lstm" if is_own else f"{self.task}-skip-lstm"
        rate = float(read_recipe(RECIPES / f"{recipe}.yaml")["learning_rate"]) * self.rate
        data = OWN_DATA[self.task] if is_own else ["--config", recipe]
        keep = KEEP_BEST if self.task in OVERFIT and self.kind not in ("learned", "dial") else []
        return [*data, *gate[self.kind], *keep, f"--learning_rate={rate:g}", f"--seed={self.seed}"]


def missing_data(task: str) -> bool:
    """Return whether a task needs a folder that archive.py has not written yet."""
    name = OWN_DATA.get(task, [""])[0].removeprefix("--dataset_name=")
    return name.startswith("runs/") and not Path(name).is_dir()


def kinds_of(shares: Sequence[float]) -> list[tuple[str, float]]:
    """Return the models of a task: (kind, share of the steps read)."""
    budgets = [(kind, share) for share in shares for kind in ("learned", "strided", "random")]
    return [*budgets, ("plain", 1.0), ("dial", 1.0)]


def make(job: Job, runs: Path, rest: Sequence[str]) -> dict[str, Any] | None:
    """Return a run's results, after training it if they are missing; None if training failed.

    Raises:
        SystemExit: the run has other settings than today's recipe and options; the message lists the differences.
    """
    path = job.folder(runs) / "results.json"
    if path.is_file():
        check_run(path.parent, describe(parse([*job.options(), f"--output_dir={path.parent}", *rest])))
    else:
        print(f"== {path.parent}", flush=True)
        command = [sys.executable, os.path.relpath(TRAIN), *job.options(), f"--output_dir={path.parent}", *rest]
        subprocess.run(command, check=False)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def quality(metrics: dict[str, float]) -> tuple[str, float]:
    """Return the main metric: its name, and its value, negative where less is better."""
    name = next(name for name in MAIN_METRICS if name in metrics)
    return name, -metrics[name] if name == "mse" else metrics[name]


def train_all(chosen: Namespace, rest: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Train the missing runs; yield a row for every finished run with the chosen learning rate."""
    for task in chosen.tasks:
        for kind, share in kinds_of(chosen.shares):
            if kind not in chosen.kinds:
                continue
            tried = {rate: make(Job(task, kind, share, 1, rate), chosen.runs, rest) for rate in chosen.rates}
            found = {rate: run for rate, run in tried.items() if run is not None}
            if not found:
                continue
            best = max(found, key=lambda rate: quality(found[rate]["metrics"]["validation"])[1])
            for seed in range(1, chosen.seeds + 1):
                run = make(Job(task, kind, share, seed, best), chosen.runs, rest)
                if run is None:
                    continue
                job = Job(task, kind, share, seed, best)
                if kind != "dial":
                    yield row_of(job, run, run["metrics"]["test"], len(found))
                for point in run["operating_points"] if kind == "dial" else []:
                    yield row_of(job._replace(share=point["update_rate_asked"]), run, point, len(found))


def row_of(job: Job, run: dict[str, Any], test: dict[str, float], tried: int) -> dict[str, Any]:
    """Return the facts of a run that are stored.

    Args:
        job: what was trained.
        run: its results.json.
        test: its metrics on the test data.
        tried: number of learning rates of which the best was chosen.
    """
    name, value = quality(test)
    return job._asdict() | {
        "metric": name,
        "value": abs(value),
        "read": test["update_rate"],
        "updates": test["updates"],
        "rates_tried": tried,
        "steps": run["train"]["steps"],
        "commit": run["commit"],
        "device": run["device"],
    }


def is_replaced(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Return whether a new row replaces a stored one: the same run, or a seed of the same model with other settings."""
    if any(old[name] != new[name] for name in ("task", "kind", "share")):
        return False
    return any(old[name] != new[name] for name in ("rate", "steps")) or old["seed"] == new["seed"]


def report(rows: list[dict[str, Any]], folder: Path | None = None) -> str:
    """Return a table, a line for each model, and one of differences; draw a figure for each task in a folder."""
    lines = [
        "| task | model | asked | read | test | seeds | learning rates | optimizer steps |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for task in dict.fromkeys(row["task"] for row in rows):
        curves: dict[str, list[Runs]] = {}
        mine = [row for row in rows if row["task"] == task]
        metric = mine[0]["metric"]
        digits = DIGITS[metric]
        for kind, share in dict.fromkeys((row["kind"], row["share"]) for row in mine):
            runs = [row for row in mine if (row["kind"], row["share"]) == (kind, share)]
            values = [row["value"] for row in runs]
            spread = f" ± {stdev(values):{digits}}" if len(values) > 1 else ""
            read = fmean(row["read"] for row in runs)
            test = f"{metric} {fmean(values):{digits}}{spread}"
            steps = ", ".join(map(str, sorted({row["steps"] for row in runs})))
            effort = f"{len(runs)} | {runs[0]['rates_tried']} | {steps}"
            lines.append(f"| {task} | {NAMES[kind]} | {share:.0%} | {read:.1%} | {test} | {effort} |")
            curves.setdefault(NAMES[kind], []).append([(row["read"], row["value"]) for row in runs])
        if folder is not None:
            figure = accuracy_against_updates(curves, f"{metric} ({task})", "share of steps read", metric == "mse")
            figure.savefig(folder / f"{task}.png")
    return "\n".join([*lines, "", *verdicts(rows)])


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """Return a table of differences between models, in units of the metric; above 0, the first model is better.

    A standard error is that of the difference of the two means over seeds. "-": not trained, or (errors) one seed only.
    """
    lines = [
        "| task | share | learned - strided | standard error | learned - plain | dial - learned | targets missed |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    values: dict[tuple[str, str, float], list[float]] = {}
    digits = {row["task"]: DIGITS[row["metric"]] for row in rows}
    for row in rows:
        sign = -1 if row["metric"] == "mse" else 1
        values.setdefault((row["task"], row["kind"], row["share"]), []).append(sign * row["value"])
    for task, share in dict.fromkeys((row["task"], row["share"]) for row in rows if row["kind"] == "learned"):
        learned, strided, dial = (values.get((task, kind, share)) for kind in ("learned", "strided", "dial"))
        assert learned is not None
        error = "-"
        if strided and min(len(learned), len(strided)) > 1:
            error = f"{sum(stdev(some) ** 2 / len(some) for some in (learned, strided)) ** 0.5:{digits[task]}}"
        shares = [row["read"] for row in rows if (row["task"], row["kind"], row["share"]) == (task, "learned", share)]
        missed = sum(abs(read - share) > TOLERANCE * share for read in shares)
        plain = values.get((task, "plain", 1.0))
        pairs = ((learned, strided), (learned, plain), (dial, learned))
        than_strided, than_plain, than_learned = (difference(first, second, digits[task]) for first, second in pairs)
        cells = [task, f"{share:.0%}", than_strided, error, than_plain, than_learned, f"{missed} of {len(shares)}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def difference(first: list[float] | None, second: list[float] | None, digits: str) -> str:
    """Return the difference of two means, or "-" where one is missing."""
    return f"{fmean(first) - fmean(second):+{digits}}" if first and second else "-"


def main(argv: list[str] | None = None) -> int:
    """Train the missing runs, store the results, and report them."""
    parser = ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, help="default: all that have their data")
    parser.add_argument("--shares", nargs="+", type=float, default=list(SHARES), help="shares of the steps to read")
    parser.add_argument("--kinds", nargs="+", choices=NAMES, default=list(NAMES), help="models to train")
    parser.add_argument("--rates", nargs="+", type=float, default=list(RATES), help="factors of the learning rate")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from 1")
    parser.add_argument("--runs", type=Path, default=Path("runs", "gates"), help="folder of the runs")
    parser.add_argument("--results", type=Path, default=ROOT / "model_cards" / "gates", help="folder of the results")
    parser.add_argument("--report", action="store_true", help="do not train")
    chosen, rest = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    if any(
        option.startswith(("--gate", "--dial", "--target_update_rate", "--learning_rate", "--seed")) for option in rest
    ):
        parser.error("gates, shares, learning rates and seeds are chosen here; see --shares and --seeds")
    if (absent := [task for task in chosen.tasks or () if missing_data(task)]) and not chosen.report:
        parser.error(
            f"{', '.join(absent)}: first `pip install --no-deps sktime scikit-base` and "
            "`python -m scripts.benchmarks.archive`, which write the data."
        )
    chosen.tasks = chosen.tasks or [task for task in TASKS if not missing_data(task)]
    path = chosen.results / "results.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    if not chosen.report:
        chosen.results.mkdir(parents=True, exist_ok=True)
        for row in train_all(chosen, rest):
            rows = [old for old in rows if not is_replaced(old, row)] + [row]
            write_whole(path, json.dumps(rows, indent=1) + "\n")
    if not rows:
        print(f"{path} holds no runs yet: train first.", file=sys.stderr)
        return 1
    print(report(rows, chosen.results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
