"""The environment of every test: no network, own caches, one thread, fixed seeds, NaN in uninitialised memory."""

import functools
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

TESTS = Path(__file__).resolve().parent
CACHES = tempfile.mkdtemp(prefix="hf_skiprnn-tests-")

# huggingface_hub, datasets and torch read these variables at their first import; child processes inherit them. A
# developer's own settings (caches, a token, another endpoint, a forced backend) are removed.
for _name in list(os.environ):
    if _name.startswith(("HF_", "HUGGING", "TRANSFORMERS_")):
        del os.environ[_name]
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HOME": CACHES,
    "HF_DATASETS_CACHE": f"{CACHES}/datasets",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "Agg",
    # Child processes must find this checkout and the tests' modules as this process does through pytest's pythonpath.
    "PYTHONPATH": os.pathsep.join(map(str, (TESTS.parent, TESTS, *filter(Path.is_dir, TESTS.iterdir())))),
}

import hypothesis
import numpy as np
import pytest
import torch
from hub_server.process import HubClient, HubServer
from paths import ROOT, SHARED_DATA
from survival import ledger

# Every run except `make fuzz` uses the same examples; they have no time limit, and failures are not stored in a folder.
hypothesis.settings.register_profile("tests", derandomize=ledger.SCALE == 1, deadline=None, database=None)
hypothesis.settings.load_profile("tests")


def pytest_unconfigure() -> None:
    ledger.write()
    shutil.rmtree(CACHES, ignore_errors=True)


@pytest.fixture(autouse=True)
def fixed_seeds_and_one_thread() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - libraries use the global generator
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """Return a function: shared_data("mnist") is the folder of a real data set; the test is skipped if it is absent."""

    def folder(name: str) -> Path:
        path = SHARED_DATA / name
        if not path.is_dir():
            pytest.skip(f"no data in {os.path.relpath(path, ROOT)}")
        return path

    return folder


@pytest.fixture(scope="session")
def hub_server() -> Iterator[HubServer]:
    """A Hub on this machine; one process serves all tests."""
    with HubServer() as server:
        yield server


@pytest.fixture
def hub(hub_server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HubClient:
    """The real Hub client of this process, connected to the local Hub with empty caches and alice's token."""
    return HubClient(hub_server, tmp_path / "hf_home", monkeypatch)


@pytest.fixture(scope="session", autouse=True)
def uninitialised_memory_is_nan() -> Iterator[None]:
    """Fill uninitialised tensors with NaN (integers: their largest value; booleans: True), so that reading them shows.

    torch.utils.deterministic.fill_uninitialized_memory needs deterministic mode, which replaces some of the tested
    operators. So the Python functions that return such tensors are wrapped instead. Memory that compiled code allocates
    is not filled.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name in ("empty", "empty_like", "empty_strided", "empty_permuted"):
            patch.setattr(torch, name, _filled(getattr(torch, name)))
        for name in ("new_empty", "new_empty_strided"):
            patch.setattr(torch.Tensor, name, _filled(getattr(torch.Tensor, name)))
        yield


def _filled(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(allocate)
    def wrapper(*args: object, **kwargs: object) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        if torch.compiler.is_compiling():
            return tensor
        with torch.no_grad():
            if tensor.is_floating_point() or tensor.is_complex():
                return tensor.fill_(torch.nan)
            return tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max)

    return wrapper
