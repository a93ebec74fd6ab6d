"""Find the digit: the class of a handwritten digit on a black canvas, read pixel by pixel. Not in the paper; offline.

Source: the images of the task `digits` (scikit-learn's `load_digits`; Alpaydin and Kaynak 1998; licence CC BY 4.0), 8 x
8 pixels each, with the same 1077 images for training, 360 for validation and 360 for test. Each image is pasted at
`places` random places of a black canvas of 16 x 16 (or up to 28 x 28) pixels. This gives 256 steps of one value in
[0, 1], most of them black. The places of validation and test images are fixed; the run's seed decides those of training
images.

    {"image": <PIL image 16x16, mode L>, "label": 5}
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from datasets import Dataset
from PIL import Image as PILImage

from .base import TEST, TRAIN, VALIDATION, ImageTask, Row, Splits
from .digits import Digits

LARGEST = 28  # largest side of a canvas in pixels, as in MNIST
EVALUATED_PLACES = 4  # number of places for each validation and test image


@dataclass
class FindDigit(ImageTask):
    """The task to classify a digit that stands somewhere on a black canvas."""

    name = "find_digit"
    labels = Digits.labels
    canvas: int = field(default=16, metadata={"help": "Height and width of the canvas in pixels, 8 to 28."})
    places: int = field(default=10, metadata={"help": "Places at which each training image is pasted."})

    def __post_init__(self) -> None:
        if not Digits.size[0] <= self.canvas <= LARGEST:
            raise ValueError(f"canvas must be {Digits.size[0]} to {LARGEST} pixels; got {self.canvas}.")
        if self.places < 1:
            raise ValueError(f"places must be at least 1; got {self.places}.")
        super().__post_init__()

    def image_size(self) -> tuple[int, int]:
        return self.canvas, self.canvas

    def load(self, seed: int) -> Splits:
        """Return the splits; `seed` decides the places of the training images."""
        train, validation, test = Digits().load(0)

        def held_out(rows: Dataset, split: int) -> Dataset:
            return Dataset.from_list(list(self._pasted(rows, EVALUATED_PLACES, [split])), features=rows.features)

        return Splits(
            partial(self.training_rows, self._pasted(train, self.places, [TRAIN, seed])),
            partial(held_out, validation, VALIDATION),
            partial(held_out, test, TEST),
        )

    def _pasted(self, rows: Iterable[Row], places: int, seed: list[int]) -> Iterator[Row]:
        """Yield every image at `places` random places."""
        rng, free = np.random.default_rng(seed), self.canvas - Digits.size[0] + 1
        for row in rows:
            for x, y in rng.integers(free, size=(places, 2)).tolist():
                canvas = PILImage.new("L", (self.canvas, self.canvas))
                canvas.paste(row["image"], (x, y))
                yield row | {"image": canvas}
