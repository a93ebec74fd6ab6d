"""Run by test_remote_code.py in a process of its own, where hf_skiprnn cannot be imported.

    python without_package.py JOBS.pt RESULTS.pt

Loads checkpoints by their own code, runs, saves and loads them again, and notes what came out.
"""

# ruff: noqa: E402 - the package is hidden before anything is imported

import sys

sys.modules["hf_skiprnn"] = None  # type: ignore[assignment] # importing it fails now

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import pipeline
from transformers.models.auto import image_processing_auto

TRUSTED = {"trust_remote_code": True}


def run_model(auto: str, source: str, inputs: dict[str, Any], **options: Any) -> dict[str, Any]:
    """Outputs of a checkpoint's model, and of the same saved and loaded again."""
    loader = getattr(transformers, auto)
    model = loader.from_pretrained(source, **TRUSTED, **options).eval()
    again = Path("again", auto, Path(source).name)
    model.save_pretrained(again)
    found = {"module": type(model).__module__, "files": [path.name for path in again.iterdir()]}
    for name, one in (("first", model), ("again", loader.from_pretrained(again, **TRUSTED).eval())):
        with torch.no_grad():
            out = one(**inputs, output_update_gates=True)
        main = out.logits if "logits" in out else out.last_hidden_state
        found[name] = {"main": main, "gates": out.update_gates}
    return found


def run_processor(auto: str, source: str, raw: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint's processor makes of raw inputs, and the same after saving."""
    # The top level's AutoImageProcessor may ask for torchvision.
    loader = getattr(image_processing_auto if auto == "AutoImageProcessor" else transformers, auto)
    processor = loader.from_pretrained(source, **TRUSTED)
    again = Path("again", auto)
    processor.save_pretrained(again)
    second = loader.from_pretrained(again, **TRUSTED)
    results = [dict(one(raw, return_tensors="pt", **arguments)) for one in (processor, second)]
    return {"first": results[0], "again": results[1], "files": [path.name for path in again.iterdir()]}


def run_pipeline(task: str | None, source: str, raw: list[Any], **options: Any) -> Any:
    """Results with updates, two inputs at a time."""
    pipe = pipeline(task, model=source, device="cpu", return_updates=True, **TRUSTED, **options)
    assert type(pipe).__module__.startswith("transformers_modules.")
    return pipe(raw, batch_size=2)


JOBS = {"model": run_model, "processor": run_processor, "pipeline": run_pipeline}

if __name__ == "__main__":
    jobs = torch.load(sys.argv[1], weights_only=False)
    results = {name: JOBS[kind](*arguments, **options) for name, (kind, arguments, options) in jobs.items()}
    torch.save(results, sys.argv[2])
