"""Rows that are costly to make (decoded, through a CNN), made once: Arrow files under a fingerprint of their facts."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import xxhash
from datasets import Dataset, Features, concatenate_datasets
from datasets.arrow_writer import ArrowWriter
from datasets.config import HF_DATASETS_CACHE
from tqdm.auto import tqdm

ROWS_PER_FILE = 16  # so much work is lost at most when a run is stopped


def cached_rows(
    name: str,
    parts: Sequence[Any],
    make: Callable[[Any], dict[str, Any]],
    features: Features,
    facts: dict[str, Any],
    folder: str | None = None,
) -> Dataset:
    """`make(part)` of every part, in order: read from the cache where it is there, else made and written.

    facts: everything that decides what the rows hold (files and their sizes, models, options); JSON. Other facts, other
    files. A run that was stopped goes on after the last file that it finished. folder: default is `hf_skiprnn` in the
    cache of `datasets`.
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
    """One file: all of it or nothing, and two processes at once do no harm."""
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        with ArrowWriter(path=str(draft), features=features) as writer:
            for part in parts:
                writer.write(make(part))
                bar.update()
            writer.finalize()
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
