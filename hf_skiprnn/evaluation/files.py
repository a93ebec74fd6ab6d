"""Write a file whole or not at all: whoever reads it never sees half of it, even after a kill."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give the path of a draft beside `path`; on success the draft takes the place of `path`, else it is deleted.

    The draft's name holds the process id, so two processes can write the same file at once: the later one wins.
    """
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield draft
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write `text` in UTF-8 to `path`, whole or not at all."""
    with whole_file(path) as draft:
        draft.write_text(text, encoding="utf-8")
