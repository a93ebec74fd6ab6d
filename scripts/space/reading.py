"""Read one input with a checkpoint, and show which steps were read: what stands behind each tab of the app."""

import base64
import io
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoints import PLURALS, Checkpoint, Dial, Kind, dial, load
from drawings import drawn, ink
from matplotlib.figure import Figure
from torch import Tensor

from hf_skiprnn.evaluation.animation import write_animation
from hf_skiprnn.evaluation.figures import channels_read, pixels_read, words_read_page
from hf_skiprnn.tasks.readers.sounds import read_sound
from hf_skiprnn.tasks.readers.words import pad_tokens, tokenize, words_of

POINTS = 5  # other budgets in the table
LONGEST_SOUND, LONGEST_TEXT, MOST_NUMBERS = 10, 20_000, 20_000  # seconds, characters, numbers
LARGEST_ANIMATION = 64  # height or width in pixels of the largest image that is animated


@dataclass(frozen=True)
class Point:
    """What came of one budget: the slider's value, the number of steps read, the answer and its score."""

    value: float
    updates: int
    answer: str
    score: float | None


@dataclass(frozen=True)
class Reading:
    """One input, read: the gates [T] at the slider's value, this point, and points at other budgets."""

    gates: np.ndarray
    chosen: Point
    others: list[Point]


def show(kinds: Sequence[Kind], name: str | None, value: float, *raws: Any) -> tuple[str, str]:
    """Read an input and return (HTML of the answer and the picture, table of other budgets).

    kinds: the kind of each of `raws`; the one that the checkpoint reads is used. A problem becomes the HTML.
    """
    try:
        checkpoint = load(name or "")
        if checkpoint.kind not in kinds:
            raise ValueError(f"{name} reads {PLURALS[checkpoint.kind]}; open it in the last tab.")
        raw = raws[list(kinds).index(checkpoint.kind)]
        inputs = model_inputs(checkpoint, raw)
        reading = read(checkpoint, inputs, value)
        shown = f'<div class="{checkpoint.kind}">{picture(checkpoint, inputs, reading)}</div>'
        return verdict(reading) + shown, table(dial(checkpoint.config), reading)
    except ValueError as error:
        return problem(error), ""


def problem(error: Exception) -> str:
    """Return an error as HTML."""
    return f'<p class="problem">{escape(str(error))}</p>'


def describe(name: str) -> tuple[str, Kind | None]:
    """Return (what a checkpoint needs, or why it does not load, in Markdown; the kind of its inputs)."""
    try:
        checkpoint = load(name)
    except ValueError as error:
        return problem(error), None
    return needs(checkpoint), checkpoint.kind


def model_inputs(checkpoint: Checkpoint, raw: Any) -> dict[str, Tensor]:
    """Turn what a visitor gave into the model's inputs, with one row.

    raw: a drawing, the value of a pad; a text; the path of a sound file; or numbers as text.

    Raises:
        ValueError: it is absent, too long, or of another form than the checkpoint needs.
    """
    return INPUTS[checkpoint.kind](checkpoint, raw)


@torch.no_grad()
def read(checkpoint: Checkpoint, inputs: dict[str, Tensor], value: float) -> Reading:
    """Read an input at the slider's value and, in the same batch, at POINTS other budgets."""
    knob = dial(checkpoint.config)
    value = min(max(value, knob.low), knob.high)  # the slider may still be another checkpoint's
    values = [value, *(knob.values(POINTS) if knob.argument else [])]
    batch = {name: tensor.expand(len(values), *tensor.shape[1:]) for name, tensor in inputs.items()}
    out = checkpoint.model(**batch, **knob.arguments(values), output_update_gates=True)
    points = [
        Point(x, int(n), *answer(checkpoint.config, logits))
        for x, n, logits in zip(values, out.num_updates.tolist(), out.logits.float(), strict=True)
    ]
    gates = out.update_gates[0].numpy() > 0
    return Reading(gates, points[0], points[1:])


def answer(config: Any, logits: Tensor) -> tuple[str, float | None]:
    """Return the name of what logits [C] say, and its probability; None for a regression, whose values are named."""
    if config.problem_type == "regression" or len(logits) == 1:
        return ", ".join(f"{value:+.3f}" for value in logits.tolist()), None
    if config.problem_type == "multi_label_classification":
        names = [config.id2label[i] for i in (logits > 0).nonzero().flatten().tolist()]
        return ", ".join(names) or "none", None
    best = int(logits.argmax())
    return str(config.id2label[best]), float(logits.softmax(0)[best])


def picture(checkpoint: Checkpoint, inputs: dict[str, Tensor], reading: Reading) -> str:
    """Return HTML that shows which steps were read, drawn by hf_skiprnn.evaluation."""
    return PICTURES[checkpoint.kind](checkpoint, inputs, reading)


def verdict(reading: Reading) -> str:
    """Return one line of HTML: the answer, its score, and the number of steps read."""
    point, steps = reading.chosen, len(reading.gates)
    score = "" if point.score is None else f" ({point.score:.0%} sure)"
    return (
        f'<p class="verdict">It reads <b>{point.updates} of {steps}</b> steps ({point.updates / steps:.1%}) and '
        f"answers <b>{escape(point.answer)}</b>{score}.</p>"
    )


def table(knob: Dial, reading: Reading) -> str:
    """Return a Markdown table of the same input at other budgets; "" where the model has no dial."""
    if not reading.others:
        return ""
    head = "share asked for" if knob.argument == "update_rate" else "gate shift"
    lines = [f"| {head} | steps read | answer | score |", "|---:|---:|---|---:|"]
    for point in reading.others:
        value = f"{point.value:.1f} %" if knob.argument == "update_rate" else f"{point.value:+.1f}"
        score = "" if point.score is None else f"{point.score:.0%}"
        lines.append(f"| {value} | {point.updates} | {escape(point.answer)} | {score} |")
    return "**The same input at other budgets**\n\n" + "\n".join(lines)


def needs(checkpoint: Checkpoint) -> str:
    """Return what a checkpoint needs and answers, in Markdown."""
    config, knob = checkpoint.config, dial(checkpoint.config)
    budget = {
        "update_rate": f"calibrated: any share from {knob.low:g} to {knob.high:g} %",
        "gate_shift": "not calibrated: the slider shifts the gate",
        None: knob.label,
    }[knob.argument]
    names = [escape(str(name)) for name in list(config.id2label.values())[:20]]
    answers = "numbers" if config.problem_type == "regression" else ", ".join(names)
    return (
        f"- **It needs** {NEEDS[checkpoint.kind](checkpoint)}.\n- **It answers** {answers}.\n"
        f"- **Model**: {config.num_hidden_layers} layer(s) of {config.hidden_size} units, {config.cell_type.upper()}.\n"
        f"- **Budget**: {budget}."
    )


def _image_inputs(checkpoint: Checkpoint, raw: str | None) -> dict[str, Tensor]:
    pixels, channels = drawn(ink(raw), checkpoint.size), checkpoint.processor.num_channels
    return dict(checkpoint.processor([np.repeat(pixels[None], channels, axis=0)], return_tensors="pt"))


def _text_inputs(checkpoint: Checkpoint, raw: str | None) -> dict[str, Tensor]:
    if not (raw or "").strip():
        raise ValueError("Type or paste a text first.")
    return pad_tokens(tokenize(checkpoint.processor, [str(raw)[:LONGEST_TEXT]]), checkpoint.config.pad_token_id or 0)


def _sound_inputs(checkpoint: Checkpoint, raw: str | None) -> dict[str, Tensor]:
    if not raw:
        raise ValueError("Record, upload or choose a sound first.")
    rate = checkpoint.processor.sampling_rate
    samples, _ = read_sound({"bytes": None, "path": raw}, "your sound", rate)
    return dict(checkpoint.processor([samples[: LONGEST_SOUND * rate]], sampling_rate=rate, return_tensors="pt"))


def _series_inputs(checkpoint: Checkpoint, raw: str | None) -> dict[str, Tensor]:
    width, words = checkpoint.config.input_size, re.split(r"[\s,;]+", (raw or "").strip())
    if not words[0]:
        raise ValueError(f"Paste numbers first, {width} for each step.")
    try:
        numbers = [float(word) for word in words[:MOST_NUMBERS]]
    except ValueError as error:
        raise ValueError(f"Paste numbers only, separated by spaces, commas or lines: {error}.") from error
    if len(numbers) % width:
        raise ValueError(f"This model reads {width} numbers at each step; got {len(numbers)} numbers in all.")
    steps = np.array(numbers).reshape(-1, width)
    return dict(checkpoint.processor([steps], sampling_rate=checkpoint.processor.sampling_rate, return_tensors="pt"))


def _image_picture(checkpoint: Checkpoint, inputs: dict[str, Tensor], reading: Reading) -> str:
    images = inputs["pixel_values"].mean(dim=1).numpy()  # [1, H, W]
    names, gates = [reading.chosen.answer], reading.gates[None]
    if max(images.shape) > LARGEST_ANIMATION:
        return _figure(pixels_read(images, gates, names, ["your image"]))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "reading.gif")
        write_animation(path, images, gates, names)
        return _embedded(path.read_bytes(), "gif", "the pixels turn red in the order in which they are read")


def _text_picture(checkpoint: Checkpoint, inputs: dict[str, Tensor], reading: Reading) -> str:
    words = words_of(checkpoint.processor, inputs)
    page = words_read_page(words, [reading.gates], [reading.chosen.answer], ["your text"])
    return f'<iframe class="words" sandbox="" title="the words that were read" srcdoc="{escape(page)}"></iframe>'


def _steps_picture(checkpoint: Checkpoint, inputs: dict[str, Tensor], reading: Reading) -> str:
    steps, name = inputs["input_values"][0].numpy(), "your sound" if checkpoint.kind == "sound" else "your series"
    return _figure(channels_read([steps], [reading.gates], [reading.chosen.answer], [name]))


def _figure(figure: Figure) -> str:
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return _embedded(content.getvalue(), "png", "the steps that were read are marked in red")


def _embedded(content: bytes, kind: str, text: str) -> str:
    """Return an image that is part of the page, so that no file is left behind and no second request is needed."""
    return f'<img class="reading" alt="{text}" src="data:image/{kind};base64,{base64.b64encode(content).decode()}">'


INPUTS: dict[Kind, Callable[[Checkpoint, Any], dict[str, Tensor]]] = {
    "image": _image_inputs,
    "text": _text_inputs,
    "sound": _sound_inputs,
    "series": _series_inputs,
}
PICTURES: dict[Kind, Callable[[Checkpoint, dict[str, Tensor], Reading], str]] = {
    "image": _image_picture,
    "text": _text_picture,
    "sound": _steps_picture,
    "series": _steps_picture,
}
NEEDS: dict[Kind, Callable[[Checkpoint], str]] = {
    "image": lambda c: f"a picture of {c.size[0]} x {c.size[1]} pixels: draw it below",
    "text": lambda c: f"a text; it knows {c.config.vocab_size:,} words",
    "sound": lambda c: f"a sound; it is read at {c.processor.sampling_rate:,} samples per second",
    "series": lambda c: f"a series of numbers, {c.config.input_size} at each step",
}
