"""Write the example code of a model card: it loads the checkpoint and runs it on an input of its task."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Example(NamedTuple):
    """An example input as code: its imports, the name of its variable, and the expression that makes it."""

    imports: str
    name: str
    lines: str


EXAMPLES = {
    "digits": Example(
        "from sklearn.datasets import load_digits",
        "picture",
        "np.rint(load_digits().images[0] * 255 / 16).astype(np.uint8)  # 8 x 8 pixels: a zero",
    ),
    "find_digit": Example(
        "from sklearn.datasets import load_digits",
        "picture",
        "np.zeros((16, 16), np.uint8)  # a black canvas\n"
        "picture[4:12, 6:14] = np.rint(load_digits().images[0] * 255 / 16)  # with a zero",
    ),
    "mnist": Example(
        "from datasets import load_dataset",
        "picture",
        'load_dataset("ylecun/mnist", split="test")[0]["image"]  # a seven',
    ),
    "fsdd": Example(
        "import soundfile", "sound", 'soundfile.read("seven.wav", dtype="float32")[0]  # yours: one spoken digit'
    ),
    "keyword": Example(
        "", "sound", "0.001 * np.random.default_rng(0).standard_normal(24_000)  # yours: 3 s, 8000 samples per second"
    ),
    "frequency": Example(
        "", "series", "np.sin(2 * np.pi * np.arange(100)[:, None] / 5.5)  # 100 ms of a sine with a period of 5.5 ms"
    ),
    "adding": Example(
        "",
        "series",
        "np.random.default_rng(0).uniform(-0.5, 0.5, (50, 1)) * [1, 0]  # value, whether it is marked\n"
        "series[[3, 30], 1] = 1  # of 50 steps; the answer should be near series[3, 0] + series[30, 0]",
    ),
}
TASK_OF_KIND = {"image": "image-classification", "audio": "audio-classification", "series": "sequence-classification"}
HUB_TAGS = {  # "sequence-classification" is a pipeline of this package: the Hub has no category for series
    "text": "text-classification",
    "image": "image-classification",
    "audio": "audio-classification",
}


def input_kind(config: Mapping[str, Any], processor: Mapping[str, Any]) -> str:
    """Return the kind of a checkpoint's input: "text", "image", "audio", "frames" (labels at every step) or "series".

    Args:
        config: content of config.json.
        processor: content of preprocessor_config.json; empty if there is no such file.
    """
    frames = "SkipRNNForFrameClassification" in (config.get("architectures") or ())
    if frames or "AutoModelForTokenClassification" in config.get("auto_map", {}):
        return "frames"
    if config.get("vocab_size") is not None:
        return "text"
    if "image_processor_type" in processor:
        return "image"
    return "audio" if processor.get("sampling_rate") else "series"


def class_names(id2label: Mapping[Any, str] | None) -> list[str]:
    """Return the class names of a config in the order of their ids; [] if they are only the defaults (LABEL_0)."""
    names = [id2label[i] for i in sorted(id2label, key=int)] if id2label else []
    return [] if names == [f"LABEL_{i}" for i in range(len(names))] else names


def snippet(
    config: Mapping[str, Any],
    processor: Mapping[str, Any],
    location: str,
    task: str | None = None,
    code_travels: bool = True,
) -> str:
    """Return Python code that loads the checkpoint at `location` and runs it on an input of the right shape.

    Args:
        config: see input_kind.
        processor: see input_kind.
        location: Hub id or folder.
        task: name of the task that the checkpoint was trained on; it decides the example input.
        code_travels: the model's code is in the checkpoint folder; otherwise the lines import this package.
    """
    kind = input_kind(config, processor)
    lines = _frames(config, location) if kind == "frames" else _pipeline(kind, config, processor, location, task)
    if code_travels:
        return lines
    return lines.replace("\n\n", "\n\nimport hf_skiprnn\n\n", 1).replace(", trust_remote_code=True", "")


def _frames(config: Mapping[str, Any], location: str) -> str:
    return (
        "import torch\n"
        "from transformers import AutoModelForTokenClassification\n\n"
        f"model = AutoModelForTokenClassification.from_pretrained({quoted(location)}, trust_remote_code=True)\n"
        f"steps = torch.randn(1, 50, {int(config['input_size'])})  # yours: features, [batch, time, size]\n"
        "out = model(steps, output_update_gates=True)\n"
        "print(out.logits.shape, out.num_updates)"
    )


def _pipeline(
    kind: str, config: Mapping[str, Any], processor: Mapping[str, Any], location: str, task: str | None
) -> str:
    if kind == "text":
        example = Example("", "review", '"A quiet film that stays with you."')
    else:
        is_other = task == "find_digit" and processor.get("size") != {"height": 16, "width": 16}
        example = EXAMPLES.get("" if is_other else task or "") or _made_up(kind, config, processor)
    imports = [line for line in (example.imports, "from transformers import pipeline") if line]
    if "np." in example.lines:
        imports.insert(0, "import numpy as np")
    tag = TASK_OF_KIND.get(kind, "text-classification")
    return (
        "\n".join(imports) + f'\n\nclassifier = pipeline("{tag}", model={quoted(location)}, trust_remote_code=True)\n'
        f"{example.name} = {example.lines}\n"
        f"print(classifier({example.name}, return_updates=True))"
    )


def _made_up(kind: str, config: Mapping[str, Any], processor: Mapping[str, Any]) -> Example:
    """Return an input of zeros of the right shape."""
    if kind == "image":
        size = processor.get("size") or {"height": 28, "width": 28}
        channels = f", {int(processor['num_channels'])}" if processor.get("num_channels", 1) > 1 else ""
        shape = f"({int(size['height'])}, {int(size['width'])}{channels})"
        return Example("", "picture", f"np.zeros({shape}, np.uint8)  # yours: a file, PIL image or array")
    if kind == "audio":
        rate = int(processor["sampling_rate"])
        return Example("", "sound", f"np.zeros({rate}, np.float32)  # yours: here one second of silence")
    return Example("", "series", f"np.zeros((50, {int(config['input_size'])}), np.float32)  # yours: [time, size]")


def quoted(text: str) -> str:
    """Return the text as a Python string literal in double quotes, with everything escaped that could end it."""
    escaped = text.encode("unicode_escape").decode("ascii").replace('"', '\\"')
    return f'"{escaped}"'
