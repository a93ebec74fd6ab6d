"""Import paths of version 0.1.0 lead to the same modules at their new places."""

import json
import subprocess
import sys

from hf_skiprnn._moved_modules import MOVED

# Names that the README and docstrings of 0.1.0 told users to import.
DOCUMENTED = {
    "hf_skiprnn.training": "SkipRNNTrainer",
    "hf_skiprnn.hub": "publish",
    "hf_skiprnn.tasks": "TASKS",
    "hf_skiprnn.tasks.own_data": "OwnData",
    "hf_skiprnn.budget": "BudgetWarmup",
    "hf_skiprnn.sources": "VideoSource",
    "hf_skiprnn.pull_skip_rnn": "EndOfSequence",
    "hf_skiprnn.modeling_skip_rnn": "SkipRNNModel",
}

SCRIPT = """
import importlib, json, sys, warnings
import hf_skiprnn

moved, documented = json.loads(sys.argv[1])
for old, new in moved.items():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exec(f"import {old}")
    said = [w for w in caught if w.category is DeprecationWarning and old in str(w.message)]
    assert len(said) == 1 and new in str(said[0].message) and said[0].filename == "<string>", (old, caught)
    module = importlib.import_module(new)
    assert sys.modules[old] is module and module.__name__ == module.__spec__.name == new, old
for old, name in documented.items():
    assert hasattr(importlib.import_module(old), name), (old, name)
"""


def test_every_old_path_is_the_module_at_its_new_place_with_a_warning() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps([MOVED, DOCUMENTED])], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
