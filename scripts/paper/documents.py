"""Render the tables in the documents, which stand between two comments, from the files in model_cards/.

    <!-- rendered: speed -->
    | ... |
    <!-- end of speed -->

`python -m scripts.paper.reproduce --report` renders them. Do not edit the text between the comments.
"""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from . import rival_tables, speed_tables
from .readme_table import readme_table
from .tables import TABLES, groups_of, read_table, table_folder, table_lines

PLACE = re.compile(r"^<!-- rendered: ([\w-]+) -->\n.*?^<!-- end of \1 -->$", re.MULTILINE | re.DOTALL)


def paper_tables(cards: Path) -> str:
    """Render the paper's tables with our results beside them; each links to the page that lists every run."""
    parts = []
    for number, (task, columns) in TABLES.items():
        folder = table_folder(cards, number).name
        parts.append(f"### Table {number}: {task}\n\nEvery run: [{folder}](model_cards/{folder})")
        for options in columns:
            if groups := groups_of(read_table(cards, number), options):
                title = ", ".join(f"{name} = {value:g}" for name, value in options.items())
                parts.append((f"With {title}:\n\n" if title else "") + "\n".join(table_lines(groups)))
    return "\n\n".join(parts)


RENDERERS: dict[str, Callable[[Path], str]] = {
    "results": readme_table,
    "speed": speed_tables.readme_speed,
    "paper-tables": paper_tables,
    "layers": speed_tables.layer_tables,
    "peers": speed_tables.peer_tables,
    "memory": speed_tables.memory_tables,
    "streaming": speed_tables.streaming_tables,
    "gates": rival_tables.gates_report,
    "gates-summary": rival_tables.gates_summary,
    "gate-differences": rival_tables.gate_differences,
    "find-digit": partial(rival_tables.checkpoint_table, folder="skip-lstm-find-digit"),
    "mnist-rivals": partial(rival_tables.pareto_table, folder="mnist-pareto"),
    "fsdd-rivals": partial(rival_tables.pareto_table, folder="fsdd-pareto"),
    "speakers": partial(rival_tables.pareto_table, folder="fsdd-speakers"),
    "learned-to-skip": rival_tables.learned_to_skip,
    "gate-shifts": rival_tables.gate_shifts,
}


def documents(root: Path) -> list[Path]:
    """Return the documents of a checkout that have rendered parts."""
    paths = [root / "README.md", *sorted((root / "docs").glob("*.md"))]
    return [path for path in paths if path.is_file() and "<!-- rendered:" in path.read_text(encoding="utf-8")]


def render_document(path: Path, cards: Path) -> str:
    """Return a document with its tables rendered; links lead from the document's folder to model_cards/.

    Raises:
        ValueError: a part has a name that is not in RENDERERS, or no end.
    """
    text = path.read_text(encoding="utf-8")
    begun, whole = re.findall(r"^<!-- rendered: (\S+)", text, re.MULTILINE), [part[1] for part in PLACE.finditer(text)]
    if wrong := [name for name in begun if name not in RENDERERS or name not in whole]:
        raise ValueError(
            f"{path.name}: no such part, or no line <!-- end of NAME --> below it: {', '.join(wrong)}. "
            f"There are: {', '.join(RENDERERS)}."
        )
    up = "../" * (len(path.relative_to(cards.parent).parts) - 1)

    def rendered(place: re.Match[str]) -> str:
        name = place[1]
        body = RENDERERS[name](cards).replace("](model_cards/", f"]({up}model_cards/")
        return f"<!-- rendered: {name} -->\n{body}\n<!-- end of {name} -->"

    return PLACE.sub(rendered, text)
