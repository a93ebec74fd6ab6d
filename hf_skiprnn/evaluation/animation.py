"""Write an animated GIF that shows which pixels a model reads, in the order in which it reads them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SCALE = 10  # side of an image's pixel in screen pixels
MARGIN, FOOT = 12, 34  # screen pixels around an image, and below it for the text
FRAMES, LAST = 40, 20  # number of frames while reading; the last picture is shown as long as LAST frames
MILLISECONDS = 80  # duration of a frame
READ, UNSEEN, PAGE, INK = (214, 39, 40), (235, 237, 240), (255, 255, 255), (48, 54, 61)


def write_animation(path: Path, images: np.ndarray, gates: np.ndarray, predicted: Sequence[str]) -> None:
    """Write a GIF in which images stand side by side and are read at the same speed.

    Pixels that are read turn red; the more ink a pixel has, the darker the red. Skipped pixels do not change. Below
    each image stands the number of pixels read so far and, at the end, the predicted class.

    Args:
        path: the file to write, .gif.
        images: [N, H, W] in [0, 1].
        gates: [N, H*W] bool, in row order: the pixels that were read.
        predicted: the name of the predicted class of each image.

    Raises:
        ValueError: the gates do not fit the images.
    """
    if gates.shape != (len(images), images.shape[1] * images.shape[2]):
        raise ValueError(f"gates must be [N, H*W] of images {images.shape}; got {gates.shape}.")
    ends = np.linspace(0, gates.shape[1], FRAMES + 1).round().astype(int)
    frames = [_frame(images, gates, end, None) for end in ends]
    last = _frame(images, gates, gates.shape[1], predicted)
    # One palette for all frames: the last one has every colour. A palette for each would take most of the time.
    palette = last.convert("P", palette=Image.Palette.ADAPTIVE)
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in [*frames, *[last] * LAST]]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=MILLISECONDS, loop=0)


def _frame(images: np.ndarray, gates: np.ndarray, end: int, predicted: Sequence[str] | None) -> Image.Image:
    """Return the picture after the first `end` pixels."""
    height, width = images.shape[1] * SCALE, images.shape[2] * SCALE
    page = Image.new("RGB", (MARGIN + (width + MARGIN) * len(images), height + MARGIN + FOOT), PAGE)
    draw = ImageDraw.Draw(page)
    for index, (image, read) in enumerate(zip(images, gates, strict=True)):
        seen = (read & (np.arange(len(read)) < end)).reshape(image.shape)
        red = np.asarray(READ) + (255 - np.asarray(READ)) * (0.75 * (1 - image[..., None]))
        pixels = np.where(seen[..., None], red, UNSEEN).astype(np.uint8)
        tile = Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)
        left = MARGIN + index * (width + MARGIN)
        page.paste(tile, (left, MARGIN))
        text = f"{seen.sum()} of {len(read)} read" + ("" if predicted is None else f": it is a {predicted[index]}")
        draw.text((left, height + MARGIN + 10), text, fill=INK)
    return page
