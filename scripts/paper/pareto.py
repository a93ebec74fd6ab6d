"""Draw accuracy against updates for several runs, and store the numbers of the picture.

    for share in 0.15 0.25 0.4; do
        python scripts/train.py --config fsdd-skip-lstm --target_update_rate $share --output_dir runs/fsdd-$share
    done
    python scripts/train.py --config fsdd-skip-lstm --gate strided --stride 4 --output_dir runs/fsdd-stride-4
    python -m scripts.paper.pareto runs/fsdd-* --output runs/fsdd-pareto

    python -m scripts.paper.pareto --output model_cards/mnist-pareto       # draw stored results again

Runs that differ only in their seed are a point, with their spread; points with the same gate and cell form a curve. All
runs must have the same task. --metric names a metric of the test split for which larger is better. The script writes
pareto.png, and results.json with each run's settings and metrics.
"""

import json
import sys
from argparse import ArgumentParser
from collections import defaultdict
from pathlib import Path
from typing import Any

from hf_skiprnn.evaluation.figures import Runs, accuracy_against_updates, mean_of, pareto_front
from hf_skiprnn.hub.card import RESULTS
from hf_skiprnn.hub.private import public

GATES = {"learned": "Skip {}", "always": "{}", "random": "{}, random skips", "strided": "{}, strided"}
# Fields of a run's results.json that are stored.
KEPT = ["task", "task_options", "model", "training", "budget", "metrics", "train", "device", "versions", "commit"]
KEPT += ["command", "finished", "start"]


def curve_of(model: dict[str, Any]) -> str:
    """Return the name of a run's curve."""
    return GATES[model["gate"]].format(model["cell_type"].upper())


def read_runs(folders: list[Path], metric: str) -> dict[str, dict[str, Any]]:
    """Return name -> results of every run; exit unless all have the same task and the metric, and names differ.

    A run's name is that of its folder; where several folders have that name, with the parent's name: ROW-seed-1.
    """
    runs, names = {}, {folder: folder.name for folder in folders}
    if len(set(names.values())) < len(names):
        names = {folder: "-".join(folder.resolve().parts[-2:]) for folder in names}
    if len(set(names.values())) < len(names):
        raise SystemExit(f"Several folders have the same name: {', '.join(sorted(names.values()))}. Rename them.")
    for folder in folders:
        path = folder / "results.json"
        name = names[folder]
        if not path.is_file():
            raise SystemExit(f"{folder} holds no results.json: it is not a finished run of scripts/train.py.")
        run = json.loads(path.read_text(encoding="utf-8"))
        if metric not in (test := run["metrics"]["test"]):
            raise SystemExit(f"{path} has no metric {metric!r}; it has {', '.join(sorted(test))}.")
        runs[name] = public({fact: run[fact] for fact in KEPT if fact in run})
        runs[name].get("training", {}).pop("output_dir", None)
    tasks = {run["task"] for run in runs.values()}
    if len(tasks) > 1:
        raise SystemExit(f"The runs are of several tasks ({', '.join(sorted(tasks))}); give runs of one task.")
    return runs


def setting_of(run: dict[str, Any]) -> str:
    """Return what a run's settings are but for its seed, as text."""
    kept = {name: run.get(name) for name in ("task_options", "model", "training", "budget", "start")}
    kept["training"] = {name: value for name, value in (kept["training"] or {}).items() if "seed" not in name}
    return json.dumps(kept, sort_keys=True)


def curves_of(runs: dict[str, dict[str, Any]], metric: str) -> dict[str, list[Runs]]:
    """Return the points of each curve: (updates, metric) of the runs with the same settings."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for run in runs.values():
        test = run["metrics"]["test"]
        found[curve_of(run["model"])][setting_of(run)].append((test["updates"], test[metric]))
    return {curve: list(points.values()) for curve, points in found.items()}


def main(argv: list[str] | None = None) -> dict[str, list[Runs]]:
    """Read, draw and print; return the points of each curve: (updates, metric) of their runs."""
    parser = ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("runs", nargs="*", type=Path, help="folders that scripts/train.py wrote; none: the stored runs")
    parser.add_argument("--metric", default="accuracy", help="metric of the test split")
    parser.add_argument("--output", type=Path, default=Path("pareto"), help="folder to write into")
    options = parser.parse_args(argv)
    stored = options.output / RESULTS
    if options.runs:
        runs = read_runs(options.runs, options.metric)
        options.output.mkdir(parents=True, exist_ok=True)
        stored.write_text(json.dumps(runs, indent=2) + "\n", encoding="utf-8")
    elif stored.is_file():
        runs = json.loads(stored.read_text(encoding="utf-8"))
    else:
        parser.error(f"give folders of runs; {stored} does not exist")
    points = curves_of(runs, options.metric)
    task = next(iter(runs.values()))["task"]
    figure = accuracy_against_updates(points, f"{options.metric} ({task})", "updates per sequence")
    figure.savefig(options.output / "pareto.png")
    for curve, found in points.items():
        front = pareto_front([mean_of(runs_of_a_point) for runs_of_a_point in found])
        print(f"{curve}: unbeaten " + ", ".join(f"{value:.4g} at {updates:.1f}" for updates, value in front))
    print(f"picture: {options.output / 'pareto.png'}")
    return points


if __name__ == "__main__":
    main(sys.argv[1:])
