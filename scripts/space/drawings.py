"""Drawings: what the pad sends, and images like those that the models were trained on."""

import base64
import io

import numpy as np
from PIL import Image

SIDE = 320  # width and height of the pad in screen pixels
PREFIX = "data:image/png;base64,"
LONGEST = 200_000  # characters of a pad's value; a pad full of strokes has about a tenth
# Height of a digit in training images of this size; digits of 28 x 28 are centred, as in MNIST.
DIGIT_HEIGHTS = {(8, 8): 8, (16, 16): 8, (28, 28): 20}


def ink(value: str | None) -> np.ndarray | None:
    """Return the ink [SIDE, SIDE] in [0, 1] of a pad's value: how opaque it is; None for an empty pad.

    Raises:
        ValueError: the value is no picture that a pad made.
    """
    if not value:
        return None
    if not value.startswith(PREFIX) or len(value) > LONGEST:
        raise ValueError(f"The pad sends a PNG of at most {LONGEST} characters; got {value[:30]!r}.")
    try:
        image = Image.open(io.BytesIO(base64.b64decode(value.removeprefix(PREFIX), validate=True)), formats=["PNG"])
        if image.size != (SIDE, SIDE):
            raise ValueError(f"its size is {image.size}, not {SIDE} x {SIDE}")
        return np.asarray(image.convert("RGBA"), np.float32)[..., 3] / 255
    except (ValueError, OSError, SyntaxError) as error:  # PIL raises SyntaxError for a damaged PNG
        raise ValueError(f"The drawing could not be read: {error}") from error


def value_of(drawing: np.ndarray) -> str:
    """Return the pad's value for a drawing [H, W] of ink in [0, 1]."""
    pixels = np.zeros((*drawing.shape, 4), np.uint8)
    pixels[..., 3] = 255 * drawing
    content = io.BytesIO()
    Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.NEAREST).save(content, "PNG")
    return PREFIX + base64.b64encode(content.getvalue()).decode()


def drawn(strokes: np.ndarray | None, size: tuple[int, int]) -> np.ndarray:
    """Turn a drawing [H', W'] of ink in [0, 1] into an image [H, W] like those that a model was trained on.

    For sizes in DIGIT_HEIGHTS the ink is scaled to that height. 28 x 28: it is centred. 16 x 16: it stays where it was
    drawn, as far as there is room.

    Raises:
        ValueError: there is no ink.
    """
    if strokes is None:
        raise ValueError("Draw something first.")
    page, (height, width) = Image.fromarray((255 * strokes).astype(np.uint8)), size
    box = page.point([255 if ink > 25 else 0 for ink in range(256)]).getbbox()
    if box is None:
        raise ValueError("Draw something first.")
    if size not in DIGIT_HEIGHTS:
        return np.asarray(page.resize((width, height), Image.Resampling.BOX), np.float32) / 255
    tall, wide = box[3] - box[1], box[2] - box[0]
    scale = DIGIT_HEIGHTS[size] / max(tall, wide)
    digit = page.crop(box).resize((max(1, round(wide * scale)), max(1, round(tall * scale))), Image.Resampling.BOX)
    middle = ((box[0] + box[2]) / 2 / page.width, (box[1] + box[3]) / 2 / page.height)
    if size == (28, 28):
        middle = (0.5, 0.5)
    left = min(max(round(middle[0] * width - digit.width / 2), 0), width - digit.width)
    top = min(max(round(middle[1] * height - digit.height / 2), 0), height - digit.height)
    canvas = Image.new("L", (width, height))
    canvas.paste(digit, (left, top))
    return np.asarray(canvas, np.float32) / 255
