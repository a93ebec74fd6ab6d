"""The build of the native libraries, which pyproject.toml names as `build_ext`. It imports nothing of this package."""

import hashlib
from pathlib import Path

from setuptools import Extension
from setuptools.command.build_ext import build_ext


class BuildNative(build_ext):  # type: ignore[misc]  # setuptools ships no types
    """Compile a hash of the source into each library, so that library.py can tell a library of another source."""

    def build_extension(self, ext: Extension) -> None:
        files = sorted(Path(ext.sources[0]).parent.glob("*"))
        source = b"".join(path.read_bytes() for path in files if path.suffix in (".h", ".cpp"))
        digest = hashlib.sha256(source).hexdigest()[:15]  # library.py's source_hash
        ext.define_macros.append(("SKIP_RNN_SOURCE", f"0x{digest}"))
        super().build_extension(ext)
