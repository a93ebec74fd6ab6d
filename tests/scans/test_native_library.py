"""A native library that cannot be loaded, or was built of another source, is no engine; one that was copied is."""

import logging
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from scan_cases import NEEDS_NATIVE

from hf_skiprnn import kernels
from hf_skiprnn.kernels.cpu import library
from hf_skiprnn.model.event_scan_skip_rnn import EVENTS

pytestmark = NEEDS_NATIVE


def portable_library() -> Path:
    spec = find_spec("hf_skiprnn.kernels.cpu._cpu_portable")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin)


@pytest.fixture
def loaded_from(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Return a function that has every library loaded from one file."""

    def use(path: Path) -> None:
        monkeypatch.setattr(library, "find_spec", lambda name: SimpleNamespace(origin=str(path)))
        for cached in (library._instruction_set, library._load):
            monkeypatch.setattr(library, cached.__name__, cached.__wrapped__)
        monkeypatch.setattr(kernels, "_reasons", {})

    return use


def damaged(kind: str, folder: Path) -> Path:
    path = folder / f"{kind}.so"
    whole = portable_library().read_bytes()
    if kind == "foreign":  # for another processor
        path.write_bytes(whole[:18] + b"\xf3\x00" + whole[20:])
    elif kind == "other library":
        shutil.copy(torch._C.__file__, path)
    elif kind != "missing":
        path.write_bytes({"empty": b"", "text": b"not a library\n" * 99}.get(kind, whole[: len(whole) // 2]))
    return path


@pytest.mark.parametrize("kind", ["empty", "half", "text", "foreign", "other library", "missing"])
def test_auto_says_so_once_and_takes_events(
    kind: str,
    tmp_path: Path,
    loaded_from: Callable[[Path], None],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded_from(damaged(kind, tmp_path))
    monkeypatch.setattr(kernels, "logger", logging.getLogger("engine"))
    inputs = torch.zeros(2, 3, 1)
    assert [kernels.choose_engine("auto", inputs, 100) for _ in range(2)] == [EVENTS, EVENTS]
    (said,) = caplog.messages
    assert (
        "in plain PyTorch ('events'), several times slower. The native CPU engine (portable) cannot be loaded" in said
    )
    with pytest.raises(RuntimeError, match=r"cannot be loaded: .*reinstall"):
        kernels.choose_engine("cpu", inputs, 100)


def test_a_library_of_another_source_is_refused(
    tmp_path: Path, loaded_from: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Judged by what the files hold: `cp -r` of a checkout gives them new times, in any order."""
    source = Path(library.__file__).parent / "csrc"
    loaded_from(portable_library())
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    assert library.unavailable_reason() is None  # as installed: without the source
    shutil.copytree(source, tmp_path / "csrc", copy_function=shutil.copyfile)  # with the times of now
    (tmp_path / "csrc" / ".call.h.swp").write_text("an editor's")
    assert library.unavailable_reason() is None
    with (tmp_path / "csrc" / "call.h").open("a") as file:
        file.write("// another\n")
    assert "was built of another source" in str(library.unavailable_reason())
