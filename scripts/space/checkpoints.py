"""Find and load checkpoints for the app. A checkpoint is data: no code that came with one is ever run."""

import functools
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    StrictDataclassError,
)
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerFast

from hf_skiprnn import (
    SkipRNNConfig,
    SkipRNNFeatureExtractor,
    SkipRNNForSequenceClassification,
    SkipRNNImageProcessor,
)

Kind = Literal["image", "text", "sound", "series"]

HERE = Path(__file__).resolve().parent
CLONE = HERE.parents[1]
# In a Space, model_cards/ lies beside app.py; in a clone, at the root.
FOLDERS = [HERE / "model_cards", CLONE / "model_cards", CLONE / "runs", CLONE / "runs" / "demo"]
SETTINGS = ["config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"]
WEIGHTS = ["model*.safetensors", "model.safetensors.index.json"]
LARGEST = 50_000_000  # parameters of a checkpoint that the app loads
TO_TRAIN: dict[Kind, str] = {
    "image": "hf-skiprnn train --task find_digit --output_dir runs/find_digit",
    "text": "hf-skiprnn train --config imdb-skip-lstm --target_update_rate 0.3 --gate_noise 1 --output_dir runs/imdb",
    "sound": "hf-skiprnn train --config fsdd-skip-lstm --output_dir runs/fsdd",
    "series": "hf-skiprnn train --task frequency --output_dir runs/frequency",
}


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint: its name, the kind of its inputs, and what turns them into the model's."""

    name: str
    kind: Kind
    model: Any
    processor: Any

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of its images in pixels; 28 x 28 where it takes any size."""
        size = self.processor.size or {"height": 28, "width": 28}
        return size["height"], size["width"]


@dataclass(frozen=True)
class Dial:
    """The slider of a checkpoint: which argument of the model it sets, and its range."""

    argument: Literal["update_rate", "gate_shift"] | None
    low: float
    high: float
    start: float
    label: str

    def values(self, count: int) -> list[float]:
        """Return `count` values over the range, denser at small shares, for a table."""
        if self.argument == "update_rate":
            return np.geomspace(max(self.low, 2.0), self.high, count).round(1).tolist()
        return np.linspace(self.low, self.high, count).tolist()

    def arguments(self, values: Sequence[float]) -> dict[str, list[float]]:
        """Return the keyword argument that reads row i at values[i]."""
        if self.argument is None:
            return {}
        return {self.argument: [value / 100 if self.argument == "update_rate" else value for value in values]}


def dial(config: Any) -> Dial:
    """Return the slider of a model: shares in % where it is calibrated, else shifts of the gate."""
    if config.gate != "learned":
        return Dial(None, 0, 1, 0, f"No dial: the gate is {config.gate!r}, not learned")
    if not config.gate_calibration:
        return Dial(
            "gate_shift",
            -3,
            3,
            min(max(config.gate_shift, -3), 3),
            "Gate shift: below 0 reads less, above 0 reads more",
        )
    shares, shifts = np.array(config.gate_calibration).T
    low, high = math.ceil(1000 * shares[0]) / 10, math.floor(1000 * shares[-1]) / 10
    trained = round(100 * float(np.interp(config.gate_shift, shifts, shares)), 1)
    return Dial("update_rate", low, high, min(max(trained, low), high), "Share of steps to read, in %")


def found(kind: Kind, folders: Sequence[Path] | None = None) -> list[str]:
    """Return the complete checkpoints of a kind in these folders (default: FOLDERS), as paths for `load`.

    Checkpoints with a dial come first: they read what the slider asks for.
    """
    names = []
    for folder in FOLDERS if folders is None else folders:
        for path in sorted(folder.glob("*/config.json")):
            complete = any(path.parent.glob("model*.safetensors"))
            if complete and _is_ours(config := _json(path)) and _kind(config, path.parent) == kind:
                names.append((not config.get("gate_calibration"), os.path.relpath(path.parent)))
    return [name for _, name in sorted(names, key=lambda pair: pair[0])]


def missing(kind: Kind) -> str:
    """Return what to do where there is no checkpoint of this kind, in Markdown."""
    return (
        f"There is no checkpoint that reads {PLURALS[kind]} in `model_cards/` or `runs/`. Train one, then start "
        f"the app again:\n\n    {TO_TRAIN[kind]}\n\nOr open a checkpoint from the Hub in the last tab."
    )


def load(name: str) -> Checkpoint:
    """Load a checkpoint from a folder or, if there is no such folder, from the Hub.

    Raises:
        ValueError: it cannot be shown; the message says why and what to do.
    """
    name = name.strip()
    if not name:
        raise ValueError("Type a folder or a Hub id, such as you/my-skip-lstm.")
    is_folder = Path(name).is_dir()
    if is_folder and os.environ.get("SPACE_ID") and not any(name in found(kind) for kind in PLURALS):
        raise ValueError("This Space opens checkpoints of the Hub and its own, but no other folders.")
    # A folder whose weights were written anew is loaded anew.
    written = max((p.stat().st_mtime for p in Path(name).glob("model*.safetensors")), default=0.0) if is_folder else 0.0
    try:
        return _load(name, written)
    except (OSError, SafetensorError, StrictDataclassError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{name} does not load: {error}") from error


@functools.lru_cache(maxsize=8)
def _load(name: str, written: float) -> Checkpoint:
    """Load a checkpoint. `written`: time of its weights, a part of the cache's key."""
    folder = Path(name) if Path(name).is_dir() else _download(name, SETTINGS)
    content = _json(folder / "config.json")
    if not _is_ours(content):
        raise ValueError(
            f"{name} is not a Skip RNN for sequence classification: its config.json has model_type = "
            f"{content.get('model_type')!r} and architectures = {content.get('architectures')!r}."
        )
    config = SkipRNNConfig.from_pretrained(folder)
    if (size := _parameters(config)) > LARGEST:
        raise ValueError(f"{name} has {size:,} parameters; the app loads up to {LARGEST:,}.")
    if not Path(name).is_dir():
        folder = _download(name, SETTINGS + WEIGHTS)
    if not any(folder.glob("model*.safetensors")):
        raise ValueError(
            f"{name} holds no weights (model.safetensors). To train such a model: {TO_TRAIN[_kind(content, folder)]}"
        )
    # The classes themselves, not the Auto classes: so code named in the files is not even looked at.
    model = SkipRNNForSequenceClassification.from_pretrained(folder, config=config, use_safetensors=True).eval()
    kind = _kind(content, folder)
    return Checkpoint(name, kind, model, PROCESSORS[kind](folder, config))


def _download(name: str, patterns: list[str]) -> Path:
    """Download files of a Hub repository; code is not among them."""
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"There is no folder {name!r}, and the Hub gave no such checkpoint: {reason}") from error


def _is_ours(content: dict[str, Any]) -> bool:
    names = content.get("architectures") or ["SkipRNNForSequenceClassification"]
    return content.get("model_type") == "skip_rnn" and names == ["SkipRNNForSequenceClassification"]


def _kind(content: dict[str, Any], folder: Path) -> Kind:
    """Return the kind of inputs, by config.json and preprocessor_config.json."""
    if content.get("vocab_size"):
        return "text"
    processor = _json(folder / "preprocessor_config.json")
    if "image_processor_type" in processor:
        return "image"
    return "sound" if processor.get("sampling_rate") else "series"


def _json(path: Path) -> dict[str, Any]:
    """Return a JSON object; {} if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _parameters(config: Any) -> int:
    """Return about how many parameters a model of this config has, before it is made."""
    units, rest = config.hidden_size, config.num_hidden_layers - 1
    cells = 4 * units * (config.input_size + units + 2 + rest * (2 * units + 2))
    return cells + (config.vocab_size or 0) * config.input_size


def _series_extractor(folder: Path, config: Any) -> SkipRNNFeatureExtractor:
    if (folder / "preprocessor_config.json").is_file():
        return SkipRNNFeatureExtractor.from_pretrained(folder)
    return SkipRNNFeatureExtractor(config.input_size)


PLURALS: dict[Kind, str] = {"image": "images", "text": "texts", "sound": "sounds", "series": "series of numbers"}
PROCESSORS: dict[Kind, Callable[[Path, Any], Any]] = {
    "image": lambda folder, _: SkipRNNImageProcessor.from_pretrained(folder),
    "text": lambda folder, _: PreTrainedTokenizerFast.from_pretrained(folder),
    "sound": _series_extractor,
    "series": _series_extractor,
}
