"""Whether "auto" takes the Triton engine only where it computes what plain PyTorch does: stand-ins on the CPU."""

from pathlib import Path
from typing import Any

import pytest
import torch
from scan_problems import Case, make_problem

pytest.importorskip("triton", reason="Triton exists for Linux on x86-64 and aarch64")

from hf_skiprnn.kernels.triton import trust as triton_trust
from hf_skiprnn.kernels.triton import tuning as triton_tuning
from hf_skiprnn.model.cells_skip_rnn import CELLS
from hf_skiprnn.model.dense_scan_skip_rnn import dense_scan
from hf_skiprnn.model.event_scan_skip_rnn import event_scan
from hf_skiprnn.model.outputs_skip_rnn import ScanOutput


class Engine:
    """Stands where the Triton scan does: the dense one, with or without a fault."""

    def __init__(self) -> None:
        self.fault, self.calls = "", 0

    def __call__(self, inputs: torch.Tensor, *arguments: Any, **named: Any) -> ScanOutput:
        self.calls += 1
        if self.fault == "error":
            raise RuntimeError("no kernel image\nis available")
        out = dense_scan(inputs, *arguments, **named)
        if self.fault == "value":
            return out._replace(state=out.state._replace(h=out.state.h * 1.5))
        if self.fault == "gradient":
            return out._replace(state=out.state._replace(h=2 * out.state.h - out.state.h.detach()))
        return out


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Engine:
    stand_in = Engine()
    monkeypatch.setattr(triton_trust, "triton_scan", stand_in)
    monkeypatch.setattr(triton_trust, "_verdicts", {})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return stand_in


def scan(backend: Any, **case: Any) -> ScanOutput:
    return make_problem(Case(batch=2, steps=3, **case), dtype=torch.float32).run(backend)


@pytest.mark.parametrize("cell", list(CELLS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_scans_that_agree_agree(cell: str, dtype: torch.dtype, stand_in: Engine) -> None:
    for layers, width in ((1, 1), (2, 17)):
        assert triton_trust.compare(20, layers, dtype, torch.device("cpu"), cell, width) == ""


def test_what_agrees_is_compared_once_a_machine(stand_in: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    for expected in (2, 3):
        scan(triton_trust.auto_scan)
        assert stand_in.calls == expected
    monkeypatch.setattr(triton_trust, "_verdicts", {})  # another process
    with torch.inference_mode():
        scan(triton_trust.named_scan)
    assert stand_in.calls == 4
    scan(triton_trust.auto_scan, hidden=9)
    assert stand_in.calls == 6
    monkeypatch.setattr(triton_trust, "_verdicts", {})
    monkeypatch.setattr(triton_tuning, "_engine", lambda: "other sources")
    scan(triton_trust.auto_scan)
    assert stand_in.calls == 8


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("value", "state.h differs by 5.0e-01"),
        ("gradient", "the gradient of"),
        ("error", "RuntimeError: no kernel image. "),
    ],
)
def test_what_differs_is_left_alone(
    fault: str, said: str, stand_in: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    warned: list[str] = []
    monkeypatch.setattr(triton_trust.logger, "warning", warned.append)
    stand_in.fault = fault
    want = scan(event_scan)
    for _ in range(2):
        got = scan(triton_trust.auto_scan)
        assert torch.equal(got.state.h, want.state.h)
    scan(triton_trust.auto_scan, hidden=9)
    assert stand_in.calls == 1  # and never again in this process
    assert len(warned) == 1
    assert said in warned[0]
    with pytest.raises(RuntimeError, match="does not compute on cpu what plain PyTorch does"):
        scan(triton_trust.named_scan)
    assert not list(tmp_path.rglob("*.json"))


def test_nothing_is_compared_while_a_graph_is_captured(stand_in: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    scan(triton_trust.auto_scan)
    assert stand_in.calls == 1
