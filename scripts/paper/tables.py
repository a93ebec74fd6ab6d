"""The paper's tables, trained here: what is kept of the runs, and the tables and pictures made from it.

`model_cards/table1-adding/results.json`, and its like for other tables, holds

    table      number of the table in the paper
    task       name of the task
    runs       one entry a run: all that its own results.json says (scripts/train.py: task_options, model, training,
               budget, metrics of the validation and test split, multiply_accumulates, train, device, versions, commit,
               command, finished, data; stopping where it stopped early), and
        row        its row's name in scripts/paper_rows.yaml, as "skip-lstm-1e-5"
        settings   "paper": the paper's; "tuned": ours (scripts/tuned_rows.yaml)

Runs that failed to solve the task are kept like any other. `train.seconds` is wall time, of the last sitting where
`train.resumed_from` names a checkpoint.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from hf_skiprnn.evaluation.paper import ROWS, PublishedRow
from hf_skiprnn.hub.card import RESULTS, number, percent, public, published_value

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # an extra: only pictures need matplotlib

Run = dict[str, Any]

# Table -> its task, and the options that its columns differ in.
TABLES: dict[int, tuple[str, tuple[dict[str, Any], ...]]] = {
    1: ("adding", ({},)),
    2: ("mnist", ({},)),
    4: ("frequency", ({"sampling_period": 1.0}, {"sampling_period": 0.5})),
    5: ("imdb", ({"length": 200}, {"length": 400})),
}


@dataclass(frozen=True)
class Group:
    """Runs of one row with the same settings and options that differ in nothing but their seed, and the paper's row."""

    row: str
    settings: str
    runs: tuple[Run, ...]
    published: PublishedRow | None

    @property
    def model(self) -> str:
        """As the paper writes it; of a row of our own its name."""
        return self.published.model if self.published else self.row

    def values(self, metric: str) -> list[float]:
        """A metric of the test split, of every seed."""
        return [run["metrics"]["test"][metric] for run in self.runs]


def table_folder(cards: Path, table: int) -> Path:
    """Where a table's results stand."""
    return cards / f"table{table}-{TABLES[table][0]}"


def read_table(cards: Path, table: int) -> dict[str, Any]:
    """A table's results.json; without runs where there is none yet."""
    path = table_folder(cards, table) / RESULTS
    if not path.is_file():
        return {"table": table, "task": TABLES[table][0], "runs": []}
    return json.loads(path.read_text(encoding="utf-8"))


def add_run(cards: Path, table: int, row: str, settings: str, run: Run) -> None:
    """Keep a run's results, in place of those of the same row, settings, options and seed.

    Raises:
        ValueError: the run is of another task, or has another cell or gate than the paper's row of that name.
    """
    results = read_table(cards, table)
    if run["task"] != results["task"]:
        raise ValueError(f"Table {table} is of task {results['task']}; got a run of {run['task']}.")
    paper, model = published_row(table, row, run), (run["model"]["cell_type"], run["model"]["gate"])
    if paper and model != (paper.cell_type, paper.gate):
        raise ValueError(f"Row {row} has cell and gate {paper.cell_type}, {paper.gate}; got {', '.join(model)}.")
    entry = {"row": row, "settings": settings} | public(run)
    kept = [other for other in results["runs"] if identity(other, table) != identity(entry, table)]
    results["runs"] = sorted([*kept, entry], key=lambda run: order(run, table))
    folder = table_folder(cards, table)
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / f"{RESULTS}.tmp"
    draft.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    draft.replace(folder / RESULTS)


def identity(run: Run, table: int) -> tuple[Any, ...]:
    """What tells a run from others of its table."""
    names = TABLES[table][1][0]
    return (*(run["task_options"][name] for name in names), run["row"], run["settings"], run["training"]["seed"])


def order(run: Run, table: int) -> tuple[Any, ...]:
    """Runs as the table has them: by option, row of the paper (our own rows last), settings and seed."""
    columns = [all(run["task_options"][name] == value for name, value in o.items()) for o in TABLES[table][1]]
    rows = [published.name for published in ROWS if published.table == table]
    place = rows.index(run["row"]) if run["row"] in rows else len(rows)
    return (columns.index(True), place, run["row"], run["settings"], run["training"]["seed"])


def groups_of(results: dict[str, Any], options: dict[str, Any]) -> list[Group]:
    """The runs with these options, seeds together, in the order of the paper's rows."""
    found: dict[tuple[str, str], list[Run]] = {}
    for run in results["runs"]:
        if all(run["task_options"][name] == value for name, value in options.items()):
            found.setdefault((run["row"], run["settings"]), []).append(run)
    return [
        Group(row, settings, tuple(runs), published_row(results["table"], row, runs[0]))
        for (row, settings), runs in found.items()
    ]


def published_row(table: int, name: str, run: Run) -> PublishedRow | None:
    """The paper's row of that name for this run's options, if it has one."""
    for row in ROWS:
        same_options = all(run["task_options"].get(key) == value for key, value in row.options.items())
        if (row.table, row.name) == (table, name) and same_options:
            return row
    return None


def spread(values: Sequence[float]) -> str:
    """Mean and, of several runs, their sample standard deviation."""
    return number(fmean(values)) + (f" ± {number(stdev(values))}" if len(values) > 1 else "")


def render_table(results: dict[str, Any]) -> str:
    """The page of a table, Markdown: ours beside the paper's, and how each number was made."""
    table, task = results["table"], results["task"]
    opening = (
        f"# Table {table} of the paper: {task}\n\n"
        "Test split; mean ± standard deviation over seeds. Rendered from `results.json`, which holds every run, by "
        f"`python scripts/reproduce.py --table {table} --report`.\n"
    )
    parts = [opening]
    for options in TABLES[table][1]:
        groups = groups_of(results, options)
        if not groups:
            continue
        title = ", ".join(f"{name} = {number(value)}" for name, value in options.items())
        parts.append((f"## {title}\n\n" if title else "") + "\n".join(table_lines(groups)) + "\n")
        parts.append(f"![ours beside the paper's]({picture_name(options)})\n")
    parts.append("## How each number was made\n\n" + "\n".join(provenance_lines(results["runs"])) + "\n")
    return "\n".join(parts)


def table_lines(groups: Sequence[Group]) -> list[str]:
    """One line a group."""
    metric = "mse" if "mse" in groups[0].runs[0]["metrics"]["test"] else "accuracy"
    solvable = "solved" in groups[0].runs[0]["metrics"]["test"]
    head = ["the paper's row", "settings", "our λ", "seeds", *(["solved"] if solvable else []), metric]
    head += ["steps read", "share", "paper", "paper: steps read"]
    return [line(head), line(["---"] * len(head)), *(line(cells(group, metric, solvable)) for group in groups)]


def cells(group: Group, metric: str, solvable: bool) -> list[str]:
    """A group's line."""
    config, paper = group.runs[0]["model"], group.published
    weight = number(float(config["budget_weight"])) if config["gate"] == "learned" else ""
    if config["gate"] == "learned" and config["budget_loss"] != "cost":
        weight += f" ({config['budget_loss']}, target {percent(config['budget_target'])})"
    if rate := group.runs[0].get("budget", {}).get("target_update_rate"):
        weight = f"steered to {percent(rate)}"
    solved = [f"{sum(map(bool, group.values('solved')))} of {len(group.runs)}"] if solvable else []
    ours = [*solved, spread(group.values(metric)), spread(group.values("updates"))]
    return [
        group.model,
        settings_cell(group),
        weight,
        str(len(group.runs)),
        *ours,
        percent(fmean(group.values("update_rate"))),
        *paper_cells(paper),
    ]


def settings_cell(group: Group) -> str:
    """Whose settings, and of these what matters most; of runs that stopped by themselves, the most steps."""
    training, steps = group.runs[0]["training"], max(run["train"]["steps"] for run in group.runs)
    rate, schedule = number(float(training["learning_rate"])), training["lr_scheduler_type"]
    return f"{group.settings}: batch {training['per_device_train_batch_size']}, lr {rate} {schedule}, {steps} steps"


def paper_cells(paper: PublishedRow | None) -> list[str]:
    """The paper's metric and updates; empty for a row of our own."""
    if paper is None:
        return ["", ""]
    read = number(paper.updates) + (f" ± {number(paper.updates_std)}" if paper.updates_std is not None else "")
    return [published_value(paper), read]


def line(parts: Iterable[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(parts)} |"


def provenance_lines(runs: Sequence[Run]) -> list[str]:
    """One line a run: steps, time, when and where, and the command."""
    lines = [
        line(["row", "settings", "seed", "steps", "seconds", "device", "commit", "PyTorch", "command"]),
        line(["---"] * 9),
    ]
    for run in runs:
        train = run["train"]
        stopped = " (settled)" if run.get("stopping", {}).get("settled") else ""
        seconds = f"{train['seconds']:.0f}" + (" (resumed)" if train["resumed_from"] else "")
        facts = [run["row"], run["settings"], str(run["training"]["seed"]), f"{train['steps']}{stopped}", seconds]
        facts += [run["device"], run.get("commit", "unknown"), run["versions"]["torch"], f"`{run['command']}`"]
        lines.append(line(facts))
    return lines


def picture_name(options: dict[str, Any]) -> str:
    """File name of the picture for these options."""
    return "-".join(["beside-the-paper", *(f"{name}-{value:g}" for name, value in options.items())]) + ".png"


def picture(groups: Sequence[Group]) -> "Figure":
    """Metric and steps read of every group beside the paper's."""
    from hf_skiprnn.evaluation.figures import Comparison, ours_beside_the_papers

    metric = "mse" if "mse" in groups[0].runs[0]["metrics"]["test"] else "accuracy"
    rows = []
    for group in groups:
        paper, read = group.published, group.values("updates")
        rows.append(
            Comparison(
                f"{group.model} ({group.settings})",
                group.values(metric),
                read,
                (paper.value, paper.value_std) if paper else (None, None),
                (paper.updates, paper.updates_std) if paper else (None, None),
            )
        )
    return ours_beside_the_papers(rows, metric, "steps read")


def write_report(cards: Path, table: int) -> Path:
    """README.md and pictures of a table, from its results.json alone; returns the README's path.

    Raises:
        FileNotFoundError: there are no results of this table yet.
    """
    folder = table_folder(cards, table)
    if not (folder / RESULTS).is_file():
        raise FileNotFoundError(f"{folder} holds no {RESULTS}: train first, scripts/reproduce.py --table {table}.")
    results = read_table(cards, table)
    for options in TABLES[table][1]:
        if groups := groups_of(results, options):
            picture(groups).savefig(folder / picture_name(options))
    (folder / "README.md").write_text(render_table(results), encoding="utf-8")
    return folder / "README.md"
