"""Train the rows of the paper's tables, and put our results beside the paper's.

    python -m scripts.paper.reproduce --table 1                      # every row of Table 1 once, with our settings
    python -m scripts.paper.reproduce --table 4 --rows skip-lstm-1e-4 skip-gru-1e-4 --seeds 4
    python -m scripts.paper.reproduce --table 2 --settings paper --dataset_name ylecun/mnist
    python -m scripts.paper.reproduce --table 2 --rows skip-lstm-1e-4 --add runs/mnist-1  # trained elsewhere
    python -m scripts.paper.reproduce --report  # renders tables, cards, README and docs; trains nothing

The settings are the paper's (paper_rows.yaml: a learning rate of 1e-4 for 50000 steps or 600 epochs, days on a CPU) or
ours (tuned_rows.yaml). Each run is a process of scripts/train.py, to which unknown options are passed. After an
interruption the same command continues: a run whose folder under --runs holds a results.json is finished; any other run
resumes from its last checkpoint. Results go to model_cards/tableN-TASK/: results.json with every run (tables.py
describes its format), README.md and pictures. If a run fails, the others still run; failed runs are listed at the end.
"""

import json
import os
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from hf_skiprnn.hub.card import RESULTS, write_card
from scripts.paper.documents import documents, render_document
from scripts.paper.readme_table import checkpoint_folders
from scripts.paper.rows import FILES, rows
from scripts.paper.tables import TABLES, add_run, table_folder, write_report

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ROOT / "scripts" / "train.py"


class Job(NamedTuple):
    """A run to train: a row of a table with its options and a seed."""

    table: int
    row: str
    settings: str
    options: dict[str, Any]
    seed: int

    @property
    def config(self) -> str:
        """The value of --config that selects the row's settings in scripts/train.py."""
        return f"{os.path.relpath(FILES[self.settings])}:table{self.table}-{self.row}"

    def folder(self, runs: Path) -> Path:
        """Return the run's folder."""
        prefix = "tuned-" if self.settings == "tuned" else ""
        options = [f"{name}-{value:g}" for name, value in self.options.items()]
        name = "-".join([f"{prefix}table{self.table}-{self.row}", *options])
        return runs / name / f"seed-{self.seed}"


def rows_of(table: int, settings: str) -> list[str]:
    """Return the names of a table's rows."""
    prefix = f"table{table}-"
    return [name.removeprefix(prefix) for name in rows(settings) if name.startswith(prefix)]


def jobs_of(chosen: Namespace) -> Iterator[Job]:
    """Yield the runs that the command line asks for: first every row with seed 1, then with seed 2, and so on."""
    for seed in range(1, chosen.seeds + 1):
        for options in TABLES[chosen.table][1]:
            for settings in chosen.settings:
                for row in rows_of(chosen.table, settings):
                    cell = "gru" if "gru" in row else "lstm"
                    if cell in chosen.cells and (chosen.rows is None or row in chosen.rows):
                        yield Job(chosen.table, row, settings, options, seed)


def make(job: Job, runs: Path, rest: list[str]) -> dict[str, Any] | None:
    """Return the run's results, after training it if its folder holds none; None if training failed."""
    folder = job.folder(runs)
    if not (folder / RESULTS).is_file():
        print(f"== {folder}", flush=True)
        options = [f"--{name}={value}" for name, value in job.options.items()]
        command = [sys.executable, os.path.relpath(TRAIN), "--config", job.config, *options, f"--seed={job.seed}"]
        subprocess.run([*command, f"--output_dir={folder}", *rest], check=False)
    path = folder / RESULTS
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def parse(argv: list[str]) -> tuple[Namespace, list[str]]:
    """Read the command line; return its options, and those for scripts/train.py."""
    parser = ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--table", type=int, choices=sorted(TABLES), help="number of the table in the paper")
    parser.add_argument("--cells", nargs="+", choices=("lstm", "gru"), default=["lstm", "gru"], help="only these")
    parser.add_argument(
        "--rows", nargs="+", help="names of rows, such as skip-lstm-1e-5; default: all rows of the table"
    )
    parser.add_argument("--settings", nargs="+", choices=tuple(FILES), default=["tuned"], help="whose settings")
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds, from 1")
    parser.add_argument("--runs", type=Path, default=Path("runs", "reproduce"), help="folder of the runs")
    parser.add_argument("--results", type=Path, default=ROOT / "model_cards", help="folder of the results")
    parser.add_argument("--add", nargs="+", type=Path, help="do not train; store these runs under the row in --rows")
    parser.add_argument("--report", action="store_true", help="do not train; render the stored results")
    chosen, rest = parser.parse_known_args(argv)
    if chosen.table is None and not chosen.report:
        parser.error("give --table, or --report")
    if chosen.add:
        if chosen.table is None or chosen.rows is None or len(chosen.rows) != 1 or len(chosen.settings) != 1:
            parser.error("--add needs --table, one row in --rows and one of --settings")
    elif chosen.table is not None:
        check_rows(parser, chosen)
    return chosen, rest


def check_rows(parser: ArgumentParser, chosen: Namespace) -> None:
    """Exit with an error if a requested row has no settings."""
    known = {row for settings in chosen.settings for row in rows_of(chosen.table, settings)}
    if not known:
        parser.error(f"tuned_rows.yaml has no rows of Table {chosen.table}; --settings paper has")
    if unknown := sorted(set(chosen.rows or ()) - known):
        parser.error(f"Table {chosen.table} has no row {', '.join(unknown)}; it has {', '.join(sorted(known))}")


def main(argv: list[str] | None = None) -> int:
    """Train the missing runs, store and render the results; return 1 if a run failed, else 0."""
    chosen, rest = parse(sys.argv[1:] if argv is None else argv)
    failed = []
    for folder in chosen.add or ():
        run = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
        add_run(chosen.results, chosen.table, chosen.rows[0], chosen.settings[0], run)
    if not chosen.report and not chosen.add:
        for job in jobs_of(chosen):
            if (results := make(job, chosen.runs, rest)) is None:
                failed.append(job.folder(chosen.runs))
            else:
                add_run(chosen.results, job.table, job.row, job.settings, results)
    tables = [chosen.table] if chosen.table else sorted(TABLES)
    for table in tables:
        if (table_folder(chosen.results, table) / RESULTS).is_file():
            print(write_report(chosen.results, table))
    if chosen.report:
        for folder in checkpoint_folders(chosen.results):  # their cards show measured times, which may be new
            print(write_card(folder, f"{chosen.results.name}/{folder.name}"))
        for path in documents(chosen.results.parent):
            path.write_text(render_document(path, chosen.results), encoding="utf-8")
            print(path)
    for folder in failed:
        print(f"failed: {folder}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
