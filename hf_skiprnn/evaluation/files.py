"""Write files atomically: a reader never sees half a file, even if the writer is killed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield the path of a draft beside `path`. On success the draft replaces `path`; after an error it is deleted.

    The draft's name holds the process id, so two processes can write the same file at once; the later one wins.
    """
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield draft
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write `text` in UTF-8 to `path`, atomically."""
    with whole_file(path) as draft:
        draft.write_text(text, encoding="utf-8")
