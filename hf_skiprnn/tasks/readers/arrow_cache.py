"""A cache of rows that are costly to make (decoded videos, features of a CNN), in Arrow files."""

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

ROWS_PER_FILE = 16  # rows that are lost at most when a run is stopped


def cached_rows(
    name: str,
    parts: Sequence[Any],
    make: Callable[[Any], dict[str, Any]],
    features: Features,
    facts: dict[str, Any],
    folder: str | None = None,
) -> Dataset:
    """Return the rows `make(part)` of all parts, in order; those in the cache are read, the others made and written.

    A run that was stopped goes on after the last file that it finished.

    Args:
        name: of the cache's folder and in the progress bar.
        parts: what rows are made from.
        make: part -> row.
        features: of the rows.
        facts: everything that decides what the rows hold (files and their sizes, models, options), as JSON. They are
            hashed into the folder's name: other facts, other files.
        folder: of all caches; default: `hf_skiprnn` in the cache of `datasets`.
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
