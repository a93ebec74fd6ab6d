"""Recipes: YAML files with the settings of a training. They are found by name or path, and become command options."""

import difflib
import json
from pathlib import Path
from typing import Any

import yaml

from hf_skiprnn.tasks import TASKS

RECIPES = Path(__file__).parent / "recipes"


def rows_of(path: Path) -> dict[str, dict[str, Any]]:
    """Return the settings of every row in a YAML file of tables: "table2-skip-lstm-1e-4" -> {"base": RECIPE, ...}.

    Settings under a table's key `all` apply to every row of that table.
    """
    tables = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {
        f"{table}-{name}": {"base": rows["base"].format(cell="gru" if "gru" in name else "lstm")}
        | rows.get("all", {})
        | settings
        for table, rows in tables.items()
        for name, settings in rows.items()
        if name not in ("base", "all")
    }


def read_recipe(path: Path) -> dict[str, Any]:
    """Return a recipe's settings, `task` among them. `path`: a recipe's name, a file, or FILE.yaml:ROW.

    Raises:
        SystemExit: there is no such recipe or row, or the file holds no settings; the message lists the choices.
    """
    if (named := RECIPES / f"{path}.yaml").is_file():
        path = named
    file, colon, name = str(path).rpartition(":")
    if colon and Path(file).is_file():
        rows = rows_of(Path(file))
        if name not in rows:
            raise SystemExit(f"{file} has no row {name!r}.{did_you_mean(name, rows)}")
        row = rows[name]
        return read_recipe(RECIPES / f"{row.pop('base')}.yaml") | row
    if not path.is_file():
        names = sorted(recipe.stem for recipe in RECIPES.glob("*.yaml"))
        raise SystemExit(f"There is no recipe {path}.{did_you_mean(path.stem, names)} There are: {', '.join(names)}.")
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(recipe, dict) or recipe.get("task") not in TASKS:
        raise SystemExit(
            f"{path} must hold settings, among them `task: NAME`; NAME is one of {', '.join(sorted(TASKS))}."
        )
    return recipe


def as_options(recipe: dict[str, Any], names: list[str], path: Path) -> list[str]:
    """Return a recipe's settings as command line options.

    Then argparse converts the values of recipes too: 1e-3, which YAML 1.1 reads as a string, becomes a number.
    """
    options: list[str] = []
    for key, value in recipe.items():
        if key not in names:
            raise SystemExit(f"{path}: unknown setting {key!r}.{did_you_mean(key, names)}")
        if isinstance(value, list):
            options += [f"--{key}", *map(str, value)]
        elif value is not None:
            options.append(f"--{key}={json.dumps(value) if isinstance(value, dict) else value}")
    return options


def did_you_mean(name: str, known: Any) -> str:
    """Return " Did you mean ...?" with the closest of the known names; "" if none is close."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
