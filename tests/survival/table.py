"""Write tests/survival/table.md from the CSV files of `make faults`, `fuzz`, `soak` and `matrix`.

python tests/survival/table.py
"""

import csv
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).parent
Row = dict[str, str]


def read(name: str) -> list[Row]:
    path = HERE / f"{name}.csv"
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def markdown(header: list[str], rows: list[list[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def kills(rows: list[Row]) -> str:
    places = ["start", "step", "save", "evaluate", "finish", "between"]
    cases: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        cases[f"{row['case']}, {row['started']}"].append(row)
    lines: list[list[object]] = []
    for name, of_case in cases.items():
        total = [sum(int(row[column]) for row in of_case) for column in ("kills", *places)]
        lost = sorted({row["different"] for row in of_case} - {"nothing"})
        lines.append([name, len(of_case), *total, "; ".join(lost) or "nothing"])
    return markdown(["training", "runs", "kills", *places, "lost"], lines)


def fuzz(rows: list[Row]) -> str:
    return markdown(["tried", "outcome", "cases"], [[row["subject"], row["outcome"], row["cases"]] for row in rows])


def soak(rows: list[Row]) -> str:
    chosen = [rows[i] for i in sorted({0, len(rows) // 4, len(rows) // 2, 3 * len(rows) // 4, len(rows) - 1})]
    total = sum(int(row["rows"]) for row in rows)
    header = [name.replace("_", " ") for name in rows[0]]
    return f"{total} rows in {len(rows)} minutes.\n\n" + markdown(header, [list(row.values()) for row in chosen])


def matrix(rows: list[Row]) -> str:
    return markdown(list(rows[0]), [list(row.values()) for row in rows])


SECTIONS = {
    "kills": ("Killed with SIGKILL and started again by the same command (`make faults`)", kills),
    "fuzz": ("Random configurations, files and configs (`make fuzz`)", fuzz),
    "long": ("Long sequences (`make soak`)", fuzz),
    "soak": ("Mixed traffic (`make soak`)", soak),
    "matrix": ("Oldest and newest versions (`make matrix`)", matrix),
}

if __name__ == "__main__":
    text = "# Cases tried, faults injected, and what was lost\n\nWritten by table.py from the CSV files beside it.\n"
    for name, (title, render) in SECTIONS.items():
        if rows := read(name):
            text += f"\n## {title}\n\n{render(rows)}"
    (HERE / "table.md").write_text(text)
