"""Write a small checkpoint of every kind, and its outputs, for the version that is being released.

    PYTHONPATH=.:tests/model python tests/model/golden/make.py

Once a version is released, its folder never changes; test_golden.py loads the checkpoints of all versions.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from small_checkpoints import WORDS, small_model

from hf_skiprnn import __version__

KINDS = {
    "lstm": ("series", {"cell_type": "lstm", "num_hidden_layers": 1, "input_size": 3}),
    "gru-stacked": ("series", {"input_size": 2}),
    "gru-reset-after": ("series", {"gru_reset": "after", "input_size": 2, "learn_initial_state": False}),
    "strided": ("series", {"gate": "strided", "stride": 3, "input_size": 2}),
    "text": ("text", {}),
    "frames": ("frames", {}),
    "regression": ("regression", {}),
}


def write(folder: Path, kind: str, fields: dict[str, object]) -> None:
    """config.json, model.safetensors and expected.safetensors: inputs and outputs of 3 rows of 20 steps."""
    model = small_model(kind, seed=1, **fields)
    model.save_pretrained(folder)
    for code in folder.glob("*.py"):  # the weights and the config are what must load
        code.unlink()
    config = json.loads((folder / "config.json").read_text())
    for name in ("auto_map", "custom_pipelines"):
        config.pop(name)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    mask = (torch.arange(20) < torch.tensor([[20], [13], [1]])).long()
    if kind == "text":
        inputs = {"input_ids": torch.randint(0, len(WORDS), (3, 20))}
    else:
        inputs = {"input_values": torch.randn(3, 20, model.config.input_size)}
    model.set_scan_backend("dense")
    with torch.inference_mode():
        out = model(**inputs, attention_mask=mask, output_update_gates=True)
    answers = {"logits": out.logits, "num_updates": out.num_updates, "update_gates": out.update_gates}
    save_file(inputs | {"attention_mask": mask} | answers, folder / "expected.safetensors")


if __name__ == "__main__":
    target = Path(__file__).parent / __version__
    if target.exists():
        sys.exit(f"{target} is there already. A released version's files never change; before the release, delete it.")
    for name, (kind, fields) in KINDS.items():
        write(target / name, kind, fields)
