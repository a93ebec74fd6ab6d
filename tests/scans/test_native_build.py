"""What an installation builds on each platform, and what it says where there is no engine."""

import logging
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from paths import ROOT
from setuptools import Distribution, Extension
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

from hf_skiprnn import kernels
from hf_skiprnn.kernels.cpu import build_native, library
from hf_skiprnn.kernels.cpu.build_native import NOT_BUILT, NOT_FOR_WINDOWS, BuildNative
from hf_skiprnn.model.event_scan_skip_rnn import EVENTS

# setuptools says so of two tables of pyproject.toml.
pytestmark = pytest.mark.filterwarnings("ignore:.*is still \\*experimental\\*")


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BuildNative:
    """The command that an installation runs, with folders of its own."""
    monkeypatch.chdir(ROOT)
    distribution = Distribution()
    distribution.parse_config_files([str(ROOT / "pyproject.toml")])
    command = BuildNative(distribution)
    command.build_lib, command.build_temp = str(tmp_path / "lib"), str(tmp_path / "temp")
    command.ensure_finalized()
    return command


def on(monkeypatch: pytest.MonkeyPatch, system: str, machine: str) -> None:
    monkeypatch.setattr(build_native, "sys", SimpleNamespace(platform=system))
    monkeypatch.setattr(build_native, "platform", SimpleNamespace(machine=lambda: machine))


@pytest.mark.parametrize(
    ("system", "machine", "libraries"),
    [
        ("linux", "x86_64", ["portable", "avx2", "avx512"]),
        ("linux", "aarch64", ["portable"]),
        ("darwin", "arm64", ["portable"]),
        ("win32", "AMD64", []),
    ],
)
def test_what_is_built(
    system: str, machine: str, libraries: list[str], command: BuildNative, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[str] = []

    def compiles(self: build_ext, ext: Extension) -> None:
        path = Path(self.get_ext_fullpath(ext.name))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        built.append(re.sub(".*_cpu_", "", ext.name))

    said: list[str] = []
    on(monkeypatch, system, machine)
    monkeypatch.setattr(build_ext, "build_extension", compiles)
    monkeypatch.setattr(command, "warn", said.append)
    sources = command.get_source_files()
    assert {path.name for path in (ROOT / "hf_skiprnn/kernels/cpu/csrc").iterdir()} <= {Path(s).name for s in sources}
    command.run()
    assert built == libraries
    assert said == ([] if libraries else [NOT_FOR_WINDOWS])


def test_an_assembler_without_amx_builds_the_engine_without_it(
    command: BuildNative, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: dict[str, dict[str, str]] = {}

    def compiles(self: build_ext, ext: Extension) -> None:
        macros = built[re.sub(".*_cpu_", "", ext.name)] = dict(ext.define_macros)
        if ext.name.endswith("avx512") and "SKIP_RNN_AMX" not in macros:
            raise CompileError("no such instruction: ldtilecfg")

    on(monkeypatch, "linux", "x86_64")
    monkeypatch.setattr(build_ext, "build_extension", compiles)
    command.run()
    assert {name: macros.get("SKIP_RNN_AMX") for name, macros in built.items()} == {
        "portable": None,
        "avx2": None,
        "avx512": "0",
    }


@pytest.mark.parametrize(
    ("built", "used"),
    [({"portable", "avx2", "avx512"}, "amx"), ({"portable", "avx2"}, "avx2"), ({"portable"}, "portable")],
)
def test_the_widest_set_that_was_built_is_used(built: set[str], used: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_find", lambda isa: Path(isa) if isa in built else None)
    monkeypatch.setattr(library, "_load", lambda isa: SimpleNamespace(skip_rnn_cpu_level=lambda: 3))
    assert library._instruction_set.__wrapped__(None) == used


def test_a_missing_compiler_is_told_and_ends_nothing(
    command: BuildNative, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(command, "warn", said.append)
    command.run()
    assert said[-1] == NOT_BUILT
    assert all("building extension" in line for line in said[:-1])


def test_on_windows_auto_takes_events_and_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(library, "find_spec", lambda name: None)
    monkeypatch.setattr(library, "sys", SimpleNamespace(platform="win32"))
    for cached in (library._instruction_set, library._load):
        monkeypatch.setattr(library, cached.__name__, cached.__wrapped__)
    monkeypatch.setattr(kernels, "_reasons", {})
    monkeypatch.setattr(kernels, "logger", logging.getLogger("engine"))
    assert kernels.choose_engine("auto", torch.zeros(2, 3, 1), 100) == EVENTS
    (message,) = caplog.messages
    assert "several times slower. There is no native CPU engine for Windows" in message
    with pytest.raises(RuntimeError, match=r"for Windows\. Everything works without it on the 'events' backend"):
        kernels.choose_engine("cpu", torch.zeros(2, 3, 1), 100)
