"""Keep the import paths of version 0.1.0 working: each gives the module's new place and a DeprecationWarning."""

import sys
import warnings
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# New package -> modules that moved there, as NAME, or as OLD:NEW if the name changed too.
PACKAGES = {
    "evaluation": "paper_results:paper metrics figures",
    "hub": "checkpoint:folder model_card:card card_checks",
    "inference": "sources pulled_videos:videos export",
    "training": "training_checkpoints:checkpoints gradients:gradient_guard budget:callbacks chunks stopping:callbacks",
    "model": "configuration_skip_rnn cells_skip_rnn scan_skip_rnn:dense_scan_skip_rnn layers_skip_rnn losses_skip_rnn "
    "events_skip_rnn:event_forward_skip_rnn event_scan_skip_rnn outputs_skip_rnn modeling_skip_rnn reader_skip_rnn "
    "loading_skip_rnn:checkpoint_skip_rnn auto_map_skip_rnn:checkpoint_skip_rnn streaming_skip_rnn:push_skip_rnn "
    "pull_skip_rnn image_processing_skip_rnn feature_extraction_skip_rnn pipeline_skip_rnn "
    "row_update_skip_rnn:reader_skip_rnn",
    "tasks.own_data": "tasks.inputs:inputs tasks.targets:targets",
    "tasks.readers": "tasks.words:words tasks.sounds:sounds tasks.video:video tasks.arrow_cache:arrow_cache",
}
MOVED = {
    f"hf_skiprnn.{old}": f"hf_skiprnn.{package}.{new or old}"
    for package, names in PACKAGES.items()
    for old, _, new in (name.partition(":") for name in names.split())
}


class MovedModules(MetaPathFinder, Loader):
    """Import hook: importing a module by its old name gives the module object of its new name."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        old, new = module.__name__, MOVED[module.__name__]
        warnings.warn(f"{old} has moved: import {new} instead.", DeprecationWarning, stacklevel=2)
        sys.modules[old] = import_module(new)  # the import system takes the module from there
