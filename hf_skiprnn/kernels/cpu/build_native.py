"""Build the native libraries; pyproject.toml names this class as `build_ext`. Imports nothing from this package."""

import hashlib
import platform
import sys
from pathlib import Path

from setuptools import Extension
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

EVENTS = "Scans will run in plain PyTorch (backend 'events'): the same results, several times slower."
NOT_FOR_WINDOWS = f"hf_skiprnn has no native CPU engine for Windows; none is built. {EVENTS}"
NOT_BUILT = f"The native CPU engine of hf_skiprnn was not built: is a C++17 compiler installed? {EVENTS}"


class BuildNative(build_ext):  # type: ignore[misc]  # setuptools ships no types
    """Build the libraries that this platform can run, and say so if there is none.

    A hash of the source is compiled into each library, so that library.py can detect a library of other source.
    """

    extensions: list[Extension]

    def run(self) -> None:
        # Here, not before: a source distribution holds the source of all libraries, wherever it is made.
        self.extensions = [ext for ext in self.extensions if _runs_here(ext.name)]
        super().run()
        if not self.extensions:
            self.warn(NOT_FOR_WINDOWS)
        elif not any(Path(self.get_ext_fullpath(ext.name)).is_file() for ext in self.extensions):
            self.warn(NOT_BUILT)  # the extensions are optional: a compiler's error does not end the installation

    def build_extension(self, ext: Extension) -> None:
        files = sorted(Path(ext.sources[0]).parent.glob("*"))
        source = b"".join(path.read_bytes() for path in files if path.suffix in (".h", ".cpp"))
        digest = hashlib.sha256(source).hexdigest()[:15]  # library.py's source_hash
        ext.define_macros.append(("SKIP_RNN_SOURCE", f"0x{digest}"))
        try:
            super().build_extension(ext)
        except CompileError:
            if not ext.name.endswith("_cpu_avx512"):
                raise
            ext.define_macros.append(("SKIP_RNN_AMX", "0"))  # some assemblers do not know AMX
            super().build_extension(ext)


def _runs_here(name: str) -> bool:
    """Return whether a library is for this platform: none on Windows; AVX2 and AVX-512 on x86-64 only."""
    if sys.platform == "win32":  # the source uses POSIX threads, signals and dlsym
        return False
    return name.endswith("_cpu_portable") or platform.machine().lower() in ("x86_64", "amd64")
