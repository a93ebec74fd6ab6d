"""Our results for the paper's tables: store the results of runs, and render pages and pictures from them.

The results of a table, such as `model_cards/table1-adding/results.json`, hold

    table      number of the table in the paper
    task       name of the task
    runs       one entry for each run: its own results.json (scripts/train.py: task_options, model, training, budget,
               metrics of the validation and test split, multiply_accumulates, train, device, versions, commit,
               command, finished, data; stopping where it stopped early), and
        row        the name of its row in paper_rows.yaml, as "skip-lstm-1e-5"
        settings   "paper": the paper's; "tuned": ours (tuned_rows.yaml)

Runs that did not solve the task are kept too. `train.seconds` is wall time; for a resumed run (`train.resumed_from`
names its checkpoint) it is the time since the last resumption.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from hf_skiprnn.evaluation.paper import ROWS, PublishedRow
from hf_skiprnn.hub.card import RESULTS, number, percent, published_value
from hf_skiprnn.hub.private import public

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
    """Runs of one row that differ only in their seed, and the paper's row."""

    row: str
    settings: str
    runs: tuple[Run, ...]
    published: PublishedRow | None

    @property
    def model(self) -> str:
        """The paper's name of the row's model; if the paper has no such row, what the run's settings say."""
        return self.published.model if self.published else described(self.runs[0])

    def values(self, metric: str) -> list[float]:
        """Return the values of a metric on the test split, one for each seed."""
        return [run["metrics"]["test"][metric] for run in self.runs]

    @property
    def metric(self) -> str:
        """The name of the task's main metric."""
        return "mse" if "mse" in self.runs[0]["metrics"]["test"] else "accuracy"

    @property
    def is_solvable(self) -> bool:
        """Whether the task's metrics say if a run has solved it."""
        return "solved" in self.runs[0]["metrics"]["test"]


def described(run: Run) -> str:
    """Return the name of a model that the paper does not have: its cell, its gate and what is special about it."""
    model, budget = run["model"], run.get("budget", {})
    cell = model["cell_type"].upper()
    if model["gate"] == "strided":
        return f"{cell}, one step in {model['stride']}"
    if model["gate"] != "learned":
        return cell if model["gate"] == "always" else f"{cell}, p_skip = {model['skip_probability']:g}"
    if rate := budget.get("target_update_rate"):
        return f"Skip {cell}, steered to {percent(rate)}"
    name = f"Skip {cell}, λ = {number(float(model['budget_weight']))}"
    if model["budget_loss"] != "cost":
        name += f" ({model['budget_loss']}, target {percent(model['budget_target'])})"
    name += ", growing" * bool(budget.get("budget_warmup_steps"))
    return name + ", shifted digits" * bool(run["task_options"].get("shift"))


def table_folder(cards: Path, table: int) -> Path:
    """Return the folder of a table's results."""
    return cards / f"table{table}-{TABLES[table][0]}"


def read_table(cards: Path, table: int) -> dict[str, Any]:
    """Read a table's results.json; if there is none yet, return results without runs."""
    path = table_folder(cards, table) / RESULTS
    if not path.is_file():
        return {"table": table, "task": TABLES[table][0], "runs": []}
    return json.loads(path.read_text(encoding="utf-8"))


def add_run(cards: Path, table: int, row: str, settings: str, run: Run) -> None:
    """Store a run's results; they replace results with the same row, settings, options and seed.

    Raises:
        ValueError: the run's task is not the table's, or its cell or gate is not that of the paper's row.
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
    """Return the values that identify a run in its table."""
    names = TABLES[table][1][0]
    return (*(run["task_options"][name] for name in names), run["row"], run["settings"], run["training"]["seed"])


def order(run: Run, table: int) -> tuple[Any, ...]:
    """Return the sort key of a run: options, position of its row in the paper (our rows last), settings, seed."""
    columns = [all(run["task_options"][name] == value for name, value in o.items()) for o in TABLES[table][1]]
    rows = [published.name for published in ROWS if published.table == table]
    place = rows.index(run["row"]) if run["row"] in rows else len(rows)
    return (columns.index(True), place, run["row"], run["settings"], run["training"]["seed"])


def groups_of(results: dict[str, Any], options: dict[str, Any]) -> list[Group]:
    """Group the runs with these options by row and settings, in the order of the paper's rows."""
    found: dict[tuple[str, str], list[Run]] = {}
    for run in results["runs"]:
        if all(run["task_options"][name] == value for name, value in options.items()):
            found.setdefault((run["row"], run["settings"]), []).append(run)
    return [
        Group(row, settings, tuple(runs), published_row(results["table"], row, runs[0]))
        for (row, settings), runs in found.items()
    ]


def published_row(table: int, name: str, run: Run) -> PublishedRow | None:
    """Return the paper's row of that name for this run's options, or None."""
    for row in ROWS:
        same_options = all(run["task_options"].get(key) == value for key, value in row.options.items())
        if (row.table, row.name) == (table, name) and same_options:
            return row
    return None


def spread(values: Sequence[float]) -> str:
    """Return the mean and, for several values, the sample standard deviation: "21 ± 1.414"."""
    return number(fmean(values)) + (f" ± {number(stdev(values))}" if len(values) > 1 else "")


def render_table(results: dict[str, Any]) -> str:
    """Render the page of a table in Markdown: our results beside the paper's, and how each number was made."""
    table, task = results["table"], results["task"]
    opening = (
        f"# Table {table} of the paper: {task}\n\n"
        "Test split; mean ± standard deviation over seeds. Rendered from `results.json`, which holds every run, by "
        f"`python -m scripts.paper.reproduce --table {table} --report`.\n"
    )
    parts = [opening]
    for options in TABLES[table][1]:
        groups = groups_of(results, options)
        if not groups:
            continue
        title = ", ".join(f"{name} = {number(value)}" for name, value in options.items())
        parts.append((f"## {title}\n\n" if title else "") + "\n".join(table_lines(groups)) + "\n")
        parts.append(f"![ours beside the paper's]({picture_name(options)})\n")
    parts.append(
        "## How each number was made\n\nA command belongs to its commit. To train a row today: "
        f"`python -m scripts.paper.reproduce --table {table} --rows ROW`.\n"
    )
    parts.append("\n".join(provenance_lines(results["runs"])) + "\n")
    return "\n".join(parts)


def table_lines(groups: Sequence[Group]) -> list[str]:
    """Return the lines of the table: the head, and one line for each group."""
    solved = ["solved"] if groups[0].is_solvable else []
    head = ["model", "settings", "our λ", "seeds", *solved, groups[0].metric]
    head += ["steps read", "share", "paper", "paper: steps read"]
    return [line(head), line(["---"] * len(head)), *(line(cells(group)) for group in groups)]


def cells(group: Group) -> list[str]:
    """Return the cells of a group's line."""
    config, paper = group.runs[0]["model"], group.published
    weight = number(float(config["budget_weight"])) if config["gate"] == "learned" else ""
    if config["gate"] == "learned" and config["budget_loss"] != "cost":
        weight += f" ({config['budget_loss']}, target {percent(config['budget_target'])})"
    if rate := group.runs[0].get("budget", {}).get("target_update_rate"):
        weight = f"steered to {percent(rate)}"
    solved = [f"{sum(map(bool, group.values('solved')))} of {len(group.runs)}"] if group.is_solvable else []
    ours = [*solved, spread(group.values(group.metric)), spread(group.values("updates"))]
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
    """Return whose settings were used, the most important ones, and the number of steps of the longest run."""
    training, steps = group.runs[0]["training"], max(run["train"]["steps"] for run in group.runs)
    rate, schedule = number(float(training["learning_rate"])), training["lr_scheduler_type"]
    return f"{group.settings}: batch {training['per_device_train_batch_size']}, lr {rate} {schedule}, {steps} steps"


def paper_cells(paper: PublishedRow | None) -> list[str]:
    """Return the paper's metric and updates; empty cells for a row that is not in the paper."""
    if paper is None:
        return ["", ""]
    read = number(paper.updates) + (f" ± {number(paper.updates_std)}" if paper.updates_std is not None else "")
    return [published_value(paper), read]


def line(parts: Iterable[str]) -> str:
    """Return a line of a Markdown table."""
    return f"| {' | '.join(parts)} |"


def provenance_lines(runs: Sequence[Run]) -> list[str]:
    """Render one line for each run: steps, time, device, versions, commit and command."""
    lines = [
        line(["row", "settings", "seed", "steps", "seconds", "device", "commit", "PyTorch", "command"]),
        line(["---"] * 9),
    ]
    for run in runs:
        train = run["train"]
        stopped = " (settled)" if run.get("stopping", {}).get("settled") else ""
        seconds = f"{train['seconds']:.0f}" + (" (resumed)" if train["resumed_from"] else "")
        facts = [run["row"], run["settings"], str(run["training"]["seed"]), f"{train['steps']}{stopped}", seconds]
        facts += [run["device"], run["commit"], run["versions"]["torch"], f"`{run['command']}`"]
        lines.append(line(facts))
    return lines


def picture_name(options: dict[str, Any]) -> str:
    """Return the file name of the picture for these options."""
    return "-".join(["beside-the-paper", *(f"{name}-{value:g}" for name, value in options.items())]) + ".png"


def picture(groups: Sequence[Group]) -> "Figure":
    """Draw the metric and the steps read of every group beside the paper's."""
    from hf_skiprnn.evaluation.figures import Comparison, ours_beside_the_papers

    rows = []
    for group in groups:
        paper, read = group.published, group.values("updates")
        rows.append(
            Comparison(
                f"{group.model} ({group.settings})",
                group.values(group.metric),
                read,
                (paper.value, paper.value_std) if paper else (None, None),
                (paper.updates, paper.updates_std) if paper else (None, None),
            )
        )
    return ours_beside_the_papers(rows, groups[0].metric, "steps read")


def write_report(cards: Path, table: int) -> Path:
    """Write README.md and the pictures of a table from its results.json; return the README's path.

    Raises:
        FileNotFoundError: there are no results of this table yet.
    """
    folder = table_folder(cards, table)
    if not (folder / RESULTS).is_file():
        command = f"python -m scripts.paper.reproduce --table {table}"
        raise FileNotFoundError(f"{folder} holds no {RESULTS}: train first, with {command}.")
    results = read_table(cards, table)
    for options in TABLES[table][1]:
        if groups := groups_of(results, options):
            picture(groups).savefig(folder / picture_name(options))
    (folder / "README.md").write_text(render_table(results), encoding="utf-8")
    return folder / "README.md"
