"""Render the model card that the trainer writes at every push: the model, how to use it, and its last evaluation."""

import html
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers import TrainerState

from hf_skiprnn.evaluation.snippets import HUB_TAGS, class_names, input_kind, snippet

MARK = "<!-- Written by SkipRNNTrainer at every push. Without this line it is yours, and stays as it is. -->"
NOT_TOLD = ("runtime", "samples_per_second", "steps_per_second", "loss", "budget_loss", "model_preparation_time")


def may_write(path: Path) -> bool:
    """Return whether the trainer may write README.md: it is absent or contains MARK."""
    return not path.is_file() or MARK in path.read_text(encoding="utf-8")


def license_fields(path: Path, license_id: str | None = None) -> dict[str, str]:
    """Return a licence as fields of a card's metadata.

    Args:
        path: a card, whose licence stays if no other is chosen: license, and license_name and license_link, which the
            Hub asks for with "other". The card need not exist.
        license_id: the licence that the user chose, as the Hub names it.
    """
    if license_id:
        return {"license": license_id}
    if not path.is_file():
        return {}
    data = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True).data
    fields: dict[str, Any] = {name: data.get(name) for name in ("license", "license_name", "license_link")}
    if isinstance(fields["license"], list):  # one licence is enough for the Hub's filter
        fields["license"] = next(iter(fields["license"]), None)
    return {name: str(value) for name, value in fields.items() if value} if fields["license"] else {}


def training_card(
    location: str,
    config: Mapping[str, Any],
    processor: Mapping[str, Any],
    state: TrainerState,
    licence: Mapping[str, Any],
    language: str | None = None,
) -> str:
    """Return the text of README.md.

    Args:
        location: Hub id, or the folder's name.
        config: fields of the model's config, `architectures` included.
        processor: fields of its processor; empty if there is none.
        state: the training's state, which holds the last evaluation.
        licence: see license_fields.
        language: language of the texts, if the user named it.
    """
    kind, cell = input_kind(config, processor), config["cell_type"]
    metadata = ModelCardData(
        library_name="transformers",
        **licence,
        language=language,
        pipeline_tag=HUB_TAGS.get(kind, "other"),
        tags=["skip-rnn", cell, "custom_code"],
    ).to_yaml()
    name = location.rpartition("/")[2]
    text = f"---\n{metadata.strip()}\n---\n{MARK}\n\n# {name}\n\n"
    text += (
        f"A Skip {cell.upper()} ([Campos et al., ICLR 2018](https://arxiv.org/abs/1708.06834)) for {kind}: after each "
    )
    text += "step that it reads, it decides how many of the next ones to skip. A skipped step costs nothing.\n"
    text += f"\n```python\n{snippet(config, processor, location)}\n```\n"
    return text + labels_line(config) + evaluation_table(state)


def labels_line(config: Mapping[str, Any]) -> str:
    """Return a line with the names of the classes, escaped; "" if there are only the defaults (LABEL_0)."""
    if not (names := class_names(config.get("id2label"))):
        return ""
    shown = [re.sub(r"([\\`*\[\]|])", r"\\\1", html.escape(" ".join(name.split()), quote=False)) for name in names[:20]]
    return f"\nLabels: {', '.join(shown)}{f' and {len(names) - 20} more' if len(names) > 20 else ''}.\n"


def evaluation_table(state: TrainerState) -> str:
    """Return the last evaluation of this training as a table; "" if there was none."""
    evaluations = [entry for entry in state.log_history if any(name.startswith("eval_") for name in entry)]
    if not evaluations:
        return ""
    numbers = {name.removeprefix("eval_"): value for name, value in evaluations[-1].items() if name.startswith("eval_")}
    rows = [f"| {name} | {value:.4g} |\n" for name, value in numbers.items() if name not in NOT_TOLD]
    step = evaluations[-1].get("step", state.global_step)
    return f"\nOn held-out rows, after {step} steps of training:\n\n| metric | value |\n|---|---|\n{''.join(rows)}"
