"""Render Markdown tables of measured times and memory from the CSV files of scripts/benchmark.py in model_cards/speed/.

"Times faster" is the time of nn.LSTM or nn.GRU of the same size, with the same instruction set, divided by the time of
the row. Instruction sets stand side by side. Other processors and numbers of threads have tables of their own.
"""

import csv
from collections.abc import Callable, Iterable
from pathlib import Path

from hf_skiprnn.hub.card import INSTRUCTION_SETS

from .tables import line

Row = dict[str, str]

RATES = ("1.0", "0.5", "0.25", "0.1")  # shares of steps read, as the CSV files write them
SHARES = [f"{100 * float(rate):g} %" for rate in RATES]
MODES = ("inference", "training")
NATIVE = {"lstm": "nn.LSTM", "gru": "nn.GRU"}
SIZES = ("batch", "steps", "inputs", "units", "layers", "sequence")
OF_THE_README = dict(zip(SIZES, ("256", "784", "1", "110", "1", "False"), strict=True))
PEERS = {  # name in the CSV files -> column
    "ours": "this package",
    "ours_bf16": "this package in bfloat16",
    "masked_loop": "loop with masks",
    "masked_loop_compiled": "the loop, compiled",
    "native_packed": "nn.LSTM, nn.GRU on packed sequences",
    "native_bf16": "nn.LSTM, nn.GRU in bfloat16",
    "onnxruntime": "ONNX Runtime",
}
PEERS_RATE = "0.5"
LOST = "commit lost"  # as the CSV files write it
EVEN, UNEVEN = "constant", "lognormal"  # column `spread`: how the updates vary between the rows of a batch


def measured(cards: Path, what: str) -> list[Row]:
    """Return the rows of the CSV files whose names start with `what`; [] if there are none."""
    rows: list[Row] = []
    for path in sorted((cards / "speed").glob(f"{what}*.csv")):
        with path.open(encoding="utf-8", newline="") as file:
            rows += csv.DictReader(file)
    return rows


def select(rows: Iterable[Row], **wanted: str) -> list[Row]:
    """Return the rows with these values."""
    return [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]


def grouped(rows: Iterable[Row], *names: str) -> dict[tuple[str, ...], list[Row]]:
    """Group rows by the values of some columns, in the order in which they come."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return found


def table(head: list[str], lines: Iterable[list[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join([line(head), line(["---"] * len(head)), *map(line, lines)])


def by_rate(rows: Iterable[Row], value: Callable[[Row], str]) -> list[str]:
    """Return a cell for each of RATES; "" if it was not measured."""
    found = {row["rate"]: value(row) for row in rows}
    return [found.get(rate, "") for rate in RATES]


def faster(row: Row) -> str:
    """Return the speed-up of a row over nn.LSTM or nn.GRU."""
    return f"{float(row.get('native_over_this') or row['times_faster']):.1f}"


def shape_of(row: Row) -> str:
    """Return the sizes of a measured problem in words."""
    layers = f", {row['layers']} layers" if row.get("layers", "1") != "1" else ""
    whole = ", every step's output" if row.get("sequence") == "True" else ""
    batch = f"batch {row['batch']}, " if "batch" in row else ""
    inputs = f"{row['inputs']} input{'s' * (row['inputs'] != '1')}"
    return f"{batch}{row['steps']} steps, {inputs}, {row['units']} units{layers}{whole}"


def processor(device: str) -> str:
    """Return the processor's name without the instruction set, which has a column of its own."""
    return device.partition(" (")[0]


def instruction_set(row: Row) -> str:
    """Return the instruction set of a row in words; "" if it is not known."""
    return INSTRUCTION_SETS.get(row["instruction_set"], "")


def widest_first(rows: Iterable[Row]) -> list[Row]:
    """Return rows sorted by instruction set; rows of one set keep their order."""
    order = list(INSTRUCTION_SETS)
    return sorted(rows, key=lambda row: order.index(row["instruction_set"]) if row["instruction_set"] in order else 0)


def by_machine(rows: Iterable[Row]) -> Iterable[tuple[str, list[Row]]]:
    """Yield (processor and threads in words, rows) of each processor and number of threads."""
    named = [row | {"processor": processor(row["device"])} for row in rows]
    for (name, threads), found in grouped(named, "processor", "threads").items():
        yield f"{name}, {threads} thread{'s' * (threads != '1')}", found


def machine(row: Row) -> str:
    """Return the processor and the instruction set of a row in words."""
    return f"{processor(row['device'])}{', ' * bool(instruction_set(row))}{instruction_set(row)}"


def origin(rows: list[Row]) -> str:
    """Return the dates, versions and commits of rows in words, as a line below their table."""
    dates, versions, commits = ({row[name] for row in rows} for name in ("date", "torch", "commit"))
    known = sorted(commits - {LOST})
    lost = ["some that are lost"] if known and LOST in commits else ["lost"] if LOST in commits else []
    told = {"Measured": dates, "PyTorch": versions}
    parts = [f"{name} {', '.join(sorted(values))}" for name, values in told.items()]
    return f"{'; '.join(parts)}; commits: {', '.join(known + lost)}."


def readme_speed(cards: Path) -> str:
    """Render the README's table: one size, on one thread, the instruction sets that were measured side by side."""
    rows = select(measured(cards, "cpu"), level="layer", spread=EVEN, name="ours", threads="1", **OF_THE_README)
    if not rows:
        return "Not measured."
    machines = list(grouped(widest_first(rows), "instruction_set", "device"))
    lines = [
        [f"Skip {cell.upper()} against {NATIVE[cell]}", mode]
        + [
            text
            for isa, device in machines
            for text in by_rate(select(same, instruction_set=isa, device=device), faster)
        ]
        for (cell, mode), same in grouped(rows, "cell", "mode").items()
    ]
    columns = [f"{INSTRUCTION_SETS[isa]}, {share}" for isa, _ in machines for share in SHARES]
    head = ["times as fast as the native layer, at a share read of", "mode", *columns]
    where = "; ".join(f"{INSTRUCTION_SETS[isa]}: {processor(device)}" for isa, device in machines)
    return f"{table(head, lines)}\n\n{where}; 1 thread; size: {shape_of(rows[0])}. {origin(rows)}"


def layer_tables(cards: Path) -> str:
    """Render a table of all sizes for each processor and number of threads; instruction sets in adjacent lines."""
    rows = select(measured(cards, "cpu"), level="layer", name="ours")
    parts = []
    for name, found in by_machine(rows):
        lines = [
            [shape_of(same[0]), same[0]["cell"].upper(), {EVEN: "even", UNEVEN: "uneven"}[same[0]["spread"]]]
            + [instruction_set(of_set[0])]
            + [cell for mode in MODES for cell in by_rate(select(of_set, mode=mode), faster)]
            for same in grouped(found, *SIZES, "cell", "spread").values()
            for of_set in grouped(widest_first(same), "instruction_set").values()
        ]
        head = ["size", "cell", "rows", "set", *(f"{mode}, {share}" for mode in MODES for share in SHARES)]
        parts.append(f"**{name}**\n\n{table(head, lines)}\n\n{origin(found)}")
    return "\n\n".join(parts)


def peer_tables(cards: Path) -> str:
    """Render the speed of other software at PEERS_RATE, for sizes at which it was measured."""
    rows = select(measured(cards, "cpu"), level="layer", spread=EVEN, rate=PEERS_RATE)
    rows = [row for row in rows if row["name"] in PEERS]
    parts = []
    for name, found in by_machine(rows):
        lines = []
        for problem in grouped(found, *SIZES, "cell", "mode").values():
            for same in grouped(widest_first(problem), "instruction_set").values():
                values = {row["name"]: faster(row) for row in same}
                if len(values) > 1:
                    start = [shape_of(same[0]), same[0]["cell"].upper(), same[0]["mode"], instruction_set(same[0])]
                    lines.append([*start, *(values.get(peer, "") for peer in PEERS)])
        if lines:
            head = ["size", "cell", "mode", "set", *PEERS.values()]
            parts.append(f"**{name}**\n\n{table(head, lines)}\n\n{origin(found)}")
    return "\n\n".join(parts)


def memory_tables(cards: Path) -> str:
    """Render the peak memory of a training step, in MiB beyond the weights and inputs."""
    rows = measured(cards, "memory")
    parts = []
    for found in grouped(rows, "device", "instruction_set").values():
        lines = []
        for same in grouped(found, "batch", "steps", "inputs", "units", "cell").values():
            (native,) = select(same, name="native")[:1] or [{"peak_mib": ""}]
            ours = by_rate(select(same, name="ours"), lambda row: row["peak_mib"])
            lines.append([shape_of(same[0]), same[0]["cell"].upper(), native["peak_mib"], *ours])
        head = ["size", "cell", "nn.LSTM, nn.GRU", *(f"ours, {share}" for share in SHARES)]
        parts.append(f"**{machine(found[0])}**\n\n{table(head, lines)}\n\n{origin(found)}")
    return "\n\n".join(parts)


def streaming_tables(cards: Path) -> str:
    """Render the times of streams: microseconds for each step or sequence, by share of steps read."""
    rows = measured(cards, "streaming")
    parts = []
    for found in grouped(rows, "device", "instruction_set").values():
        lines = []
        for same in grouped(found, "inputs", "units", "steps", "name", "unit").values():
            times = by_rate(same, lambda row: f"{float(row['p50']):.3g}")
            if any(times):
                lines.append([shape_of(same[0]), same[0]["name"], same[0]["unit"].replace("us", "µs"), *times])
        parts.append(f"**{machine(found[0])}**\n\n{table(['size', 'what', 'unit', *SHARES], lines)}\n\n{origin(found)}")
    return "\n\n".join(parts)
