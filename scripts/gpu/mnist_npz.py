"""Pack MNIST into one file of under 20 MB, for machines without `datasets`.

    python -m scripts.gpu.mnist_npz ylecun/mnist mnist.npz      # or a folder in the same layout

Arrays: train_images [60000, 784] uint8 and train_labels [60000]; test_images and test_labels likewise, 10000 of them.
"""

import sys
from typing import Any

import numpy as np
from datasets import load_dataset


def pack(data: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return images [N, 784] and labels [N] of one split."""
    images = [np.asarray(image, dtype=np.uint8).reshape(-1) for image in data["image"]]
    return np.stack(images), np.asarray(data["label"], dtype=np.uint8)


def main(source: str, target: str) -> None:
    """Read MNIST, and write the file."""
    data = load_dataset(source)
    (train, train_labels), (test, test_labels) = pack(data["train"]), pack(data["test"])
    np.savez_compressed(
        target, train_images=train, train_labels=train_labels, test_images=test, test_labels=test_labels
    )


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
