"""Cache rows that are costly to make, such as features of videos, in Arrow files."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import xxhash
from datasets import Dataset, Features, concatenate_datasets
from datasets.arrow_writer import ArrowWriter
from datasets.config import HF_DATASETS_CACHE
from tqdm.auto import tqdm

from hf_skiprnn.evaluation.files import whole_file

ROWS_PER_FILE = 16  # also the largest number of rows that are lost when a run is interrupted


def cached_rows(
    name: str,
    parts: Sequence[Any],
    make: Callable[[Any], dict[str, Any]],
    features: Features,
    facts: dict[str, Any],
    folder: str | None = None,
) -> Dataset:
    """Return the rows `make(part)` of all parts, in order. Rows in the cache are read; the others are made and cached.

    An interrupted run continues after the last complete file.

    Args:
        name: name in the cache's folder and in the progress bar.
        parts: the inputs of `make`, one for each row.
        make: makes a row from a part.
        features: `datasets` features of the rows.
        facts: everything that the content of the rows depends on (files and their sizes, models, options), as JSON. A
            hash of it is part of the folder's name, so that other facts use another folder.
        folder: folder of all caches; default: `hf_skiprnn` in the cache of `datasets`.
    """
    content = json.dumps({"facts": facts, "features": str(features)}, sort_keys=True, default=str)
    fingerprint = xxhash.xxh64(content.encode()).hexdigest()
    cache = Path(folder or Path(HF_DATASETS_CACHE, "hf_skiprnn")) / f"{name}-{fingerprint}"
    cache.mkdir(parents=True, exist_ok=True)
    files = []
    with tqdm(total=len(parts), desc=f"{name}: features", unit="row") as bar:
        for start in range(0, len(parts), ROWS_PER_FILE):
            chunk = parts[start : start + ROWS_PER_FILE]
            path = cache / f"rows-{start:06}.arrow"
            if path.is_file():
                bar.update(len(chunk))
            else:
                _write(path, chunk, make, features, bar)
            files.append(Dataset.from_file(str(path)))
    return concatenate_datasets(files)


def _write(
    path: Path, parts: Sequence[Any], make: Callable[[Any], dict[str, Any]], features: Features, bar: Any
) -> None:
    """Make the rows of one file and write it."""
    with whole_file(path) as draft, ArrowWriter(path=str(draft), features=features) as writer:
        for part in parts:
            writer.write(make(part))
            bar.update()
        writer.finalize()
