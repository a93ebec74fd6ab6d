"""Settings for the rows of the paper's tables: the paper's (paper_rows.yaml) and ours (tuned_rows.yaml)."""

from pathlib import Path
from typing import Any

from hf_skiprnn.commands.recipe_files import rows_of

FILES = {name: Path(__file__).with_name(f"{name}_rows.yaml") for name in ("paper", "tuned")}


def rows(settings: str) -> dict[str, dict[str, Any]]:
    """Return the "paper"'s or the "tuned" settings of every row, by name, as "table2-skip-lstm-1e-4"."""
    return rows_of(FILES[settings])
