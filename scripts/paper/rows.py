"""Read the settings for the rows of the paper's tables: the paper's (paper_rows.yaml) or ours (tuned_rows.yaml)."""

from pathlib import Path
from typing import Any

from hf_skiprnn.commands.recipe_files import rows_of

FILES = {name: Path(__file__).with_name(f"{name}_rows.yaml") for name in ("paper", "tuned")}


def rows(settings: str) -> dict[str, dict[str, Any]]:
    """Return row name, such as "table2-skip-lstm-1e-4", -> its settings. `settings`: "paper" or "tuned"."""
    return rows_of(FILES[settings])
