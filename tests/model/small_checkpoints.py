"""Complete checkpoint folders of every kind, of a few kilobytes, with results as scripts/train.py writes them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_skiprnn import (
    SkipRNNConfig,
    SkipRNNFeatureExtractor,
    SkipRNNForFrameClassification,
    SkipRNNForSequenceClassification,
    SkipRNNImageProcessor,
    SkipRNNPreTrainedModel,
)
from hf_skiprnn.hub.card import write_card
from hf_skiprnn.hub.private import public
from hf_skiprnn.tasks import TASKS

WORDS = ("[PAD]", "[UNK]", "a", "good", "bad", "film", ".")
KINDS = ("image", "text", "audio", "series", "regression", "frames")


def small_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="[PAD]",
        unk_token="[UNK]",
        model_input_names=["input_ids", "attention_mask"],
    )


def small_model(kind: str, seed: int = 0, **fields: Any) -> SkipRNNPreTrainedModel:
    """Untrained, of 6 units; it skips some steps."""
    own = {
        "text": {"vocab_size": len(WORDS), "pad_token_id": 0, "input_size": 4},
        "regression": {"input_size": 2, "num_labels": 1, "problem_type": "regression"},
        "series": {"cell_type": "gru", "num_hidden_layers": 2},
        "frames": {"input_size": 3},
    }
    torch.manual_seed(seed)
    config = SkipRNNConfig(**({"hidden_size": 6, "num_labels": 3, "update_bias": -1.0} | own.get(kind, {}) | fields))
    return (SkipRNNForFrameClassification if kind == "frames" else SkipRNNForSequenceClassification)(config).eval()


def save_processor(kind: str, folder: Path) -> None:
    if kind == "image":
        SkipRNNImageProcessor(num_channels=1, size={"height": 28, "width": 28}).save_pretrained(folder)
    elif kind == "text":
        small_tokenizer().save_pretrained(folder)
    elif kind == "audio":
        SkipRNNFeatureExtractor(sampling_rate=8000, mean=[0.5], std=[2.0]).save_pretrained(folder)


def small_checkpoint(folder: Path, kind: str = "image", seed: int = 0, staged: bool = True, **fields: Any) -> Path:
    """A folder that is ready for the Hub; with staged=False, its results name a user's folders, as after training."""
    model = small_model(kind, seed, **fields)
    model.save_pretrained(folder)
    save_processor(kind, folder)
    results = results_of(kind, model.config)
    (folder / "results.json").write_text(json.dumps(public(results) if staged else results))
    write_card(folder, license_id="apache-2.0")
    return folder


def results_of(kind: str, config: SkipRNNConfig) -> dict[str, Any]:
    """As scripts/train.py would have noted them."""
    task = TASKS[
        {"image": "mnist", "text": "imdb", "audio": "fsdd", "series": "frequency", "regression": "adding"}.get(
            kind, "frequency"
        )
    ]()
    split = {"loss": 0.31, "task_loss": 0.3, "budget_loss": 0.01, "updates": 12.25, "updates_std": 3.5}
    split |= {"updates_p20": 9.0, "updates_p50": 12.0, "updates_p80": 15.0, "update_rate": 0.245}
    split |= {"mse": 0.0012, "solved": 1.0} if kind == "regression" else {"accuracy": 0.9375}
    own = ("cell_type", "gate", "hidden_size", "num_hidden_layers", "budget_weight", "budget_loss", "budget_target")
    return {
        "task": task.name,
        "task_options": dataclasses.asdict(task),
        "model": {name: getattr(config, name) for name in own},
        "training": {"seed": 7, "learning_rate": 0.001, "per_device_train_batch_size": 32, "output_dir": "/home/me/x"},
        "metrics": {"validation": dict(split), "test": split},
        "multiply_accumulates": {"read": 8316.0, "every_step": 33943.0},
        "train": {"steps": 250, "seconds": 61.5, "resumed_from": None},
        "data": {"split": "test", "rows": 10000, "sha256": "5f" * 32},
        "device": "cpu",
        "processes": 1,
        "versions": {"torch": torch.__version__, "python": "3.11.9"},
        "command": "python scripts/train.py --task x --output_dir=/home/me/x",
        "finished": "2025-01-31T12:00:00+00:00",
    }
