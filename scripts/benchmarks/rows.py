"""The rows of the benchmarks' CSV files: provenance columns, percentiles, and reading and updating a file."""

import csv
import datetime
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median, quantiles

import torch

from hf_skiprnn import __version__
from hf_skiprnn.training.provenance import commit, cpu_name

Row = dict[str, str]
Rows = list[Row]
ROOT = Path(__file__).resolve().parents[2]
SPEED = ROOT / "model_cards" / "speed"


def instruction_set() -> str:
    """Return the vector instruction set of this process: "portable", "avx2" or "avx512".

    Raises:
        SystemExit: the native engine and PyTorch use different sets.
    """
    torchs = {"AVX2": "avx2", "AVX512": "avx512"}.get(torch.backends.cpu.get_cpu_capability(), "portable")
    ours = os.environ.get("HF_SKIPRNN_CPU_ISA", torchs).replace("amx", "avx512")  # see PEERS of scripts/benchmark.py
    if ours != torchs:
        raise SystemExit(
            f"HF_SKIPRNN_CPU_ISA={ours}, but PyTorch uses {torchs}: the comparison would not be fair. "
            f"Limit both to one set: python scripts/benchmark.py --isa {ours}"
        )
    return ours


def provenance() -> dict[str, str]:
    """Return the columns that say where, when and with what a row was measured."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": cpu_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "hf_skiprnn": __version__,
        "commit": commit(),
    }


def cpu_provenance() -> dict[str, str]:
    """Return `provenance` and the instruction set of our engine and the peers."""
    return provenance() | {"instruction_set": instruction_set()}


def percentiles(times: Sequence[float], unit: str = "") -> dict[str, float]:
    """Return the 20th, 50th and 80th percentile of `times`; the names of the columns end with `unit`, such as "_ms"."""
    fifths = quantiles(times, n=5)
    values = {"p20": fifths[0], "p50": median(times), "p80": fifths[3]}
    return {f"{name}{unit}": round(value, 4) for name, value in values.items()}


def read(path: Path) -> Rows:
    """Return the rows of a CSV file; an empty list if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: Sequence[Mapping[str, object]], key: Sequence[str]) -> Rows:
    """Write `rows` into a CSV file; they replace rows with the same values in the columns `key`. Keep the others.

    Returns:
        All rows of the file.
    """
    known = read(path)
    new = [{name: str(value) for name, value in row.items()} for row in rows]
    merged = list({tuple(row.get(name, "") for name in key): row for row in [*known, *new]}.values())
    columns = list(dict.fromkeys(name for row in [*new, *known] for name in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(merged)
    part.replace(path)
    return merged
