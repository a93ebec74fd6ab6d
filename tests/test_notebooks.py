"""The notebooks in docs/notebooks run, from their first cell to their last; they are stored without outputs."""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pytest
from paths import ROOT

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def code_cells(path: Path) -> list[str]:
    """Return the code of a notebook's cells; nbformat checks that it is a notebook."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def test_there_are_two_notebooks() -> None:
    assert {path.stem for path in NOTEBOOKS} == {"own_data", "streaming_sensor"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cells run as they stand, in an empty folder; they hold plain Python, so no Jupyter is needed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "__main__", type(sys)("__main__"))
    names = sys.modules["__main__"].__dict__
    for number, code in enumerate(code_cells(path)):
        exec(compile(code, f"{path.name}, code cell {number}", "exec"), names)
    assert plt.get_fignums(), "a notebook shows a picture"
    plt.close("all")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_outputs(path: Path) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    cells = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    assert not [cell for cell in cells if cell["outputs"] or cell["execution_count"] is not None]
    assert set(content["metadata"]) == {"kernelspec", "language_info"}  # no paths and no versions of a machine
