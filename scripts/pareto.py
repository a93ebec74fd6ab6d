"""Accuracy against updates over several runs: a picture and a table of their results.json.

    python scripts/pareto.py runs/fsdd-* --output runs/fsdd-pareto

Every run of one task is a point; runs of the same gate and cell are a curve. --metric is any metric of the test split
of which more is better.
"""

import json
import sys
from argparse import ArgumentParser
from collections import defaultdict
from pathlib import Path
from typing import Any

from hf_skiprnn.figures import accuracy_against_updates, pareto_front

GATES = {"learned": "Skip {}", "always": "{}", "random": "{}, random skips", "strided": "{}, strided"}


def curve_of(model: dict[str, Any]) -> str:
    """The name of a run's curve."""
    return GATES[model["gate"]].format(model["cell_type"].upper())


def main(argv: list[str] | None = None) -> dict[str, list[tuple[float, float]]]:
    """Read, draw, print; returns (updates, metric) of the runs of each curve."""
    parser = ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, help="folders that scripts/train.py wrote")
    parser.add_argument("--metric", default="accuracy", help="metric of the test split")
    parser.add_argument(
        "--output", type=Path, default=Path("pareto"), help="path of the picture and the table, no ending"
    )
    options = parser.parse_args(argv)
    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    lines, tasks = ["run,curve,budget_weight,updates," + options.metric], set()
    for folder in options.runs:
        path = folder / "results.json"
        if not path.is_file():
            raise SystemExit(f"{folder} holds no results.json: it is no finished run of scripts/train.py.")
        run = json.loads(path.read_text(encoding="utf-8"))
        test = run["metrics"]["test"]
        if options.metric not in test:
            raise SystemExit(f"{path} has no metric {options.metric!r}; it has {', '.join(sorted(test))}.")
        tasks.add(run["task"])
        curve, point = curve_of(run["model"]), (test["updates"], test[options.metric])
        points[curve].append(point)
        lines.append(f"{folder.name},{curve},{run['model']['budget_weight']},{point[0]},{point[1]}".replace(", ", " "))
    if len(tasks) > 1:
        raise SystemExit(f"The runs are of several tasks ({', '.join(sorted(tasks))}); give runs of one.")
    options.output.with_suffix(".csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    figure = accuracy_against_updates(points, f"{options.metric} ({tasks.pop()})", "updates per sequence")
    figure.savefig(options.output.with_suffix(".png"))
    for curve, runs in points.items():
        print(
            f"{curve}: unbeaten " + ", ".join(f"{value:.4g} at {updates:.1f}" for updates, value in pareto_front(runs))
        )
    print(f"picture: {options.output.with_suffix('.png')}")
    return dict(points)


if __name__ == "__main__":
    main(sys.argv[1:])
