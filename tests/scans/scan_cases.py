"""The backends that tests loop over, and the comparison of a backend with the definition."""

import os
from importlib.util import find_spec

import pytest
import torch
from scan_problems import Case, Problem, assert_close, assert_same_values, cotangents, gradients, make_problem
from tolerances import EXACT, Tolerance

from hf_skiprnn.kernels.cpu.operators import cpu_scan, unavailable_reason
from hf_skiprnn.model.dense_scan_skip_rnn import Scan, dense_scan
from hf_skiprnn.model.event_scan_skip_rnn import event_scan

__all__ = [
    "FAST_SCANS",
    "INTERPRETED",
    "LONG_SCANS",
    "MISSING",
    "NEEDS_NATIVE",
    "SCANS",
    "Case",
    "Problem",
    "assert_close",
    "assert_is_the_definition",
    "assert_same_gradients",
    "assert_same_values",
    "cotangents",
    "everything",
    "gradients",
    "make_problem",
]

MISSING = unavailable_reason()
NEEDS_NATIVE = pytest.mark.skipif(MISSING is not None, reason=MISSING or "")
NATIVE = pytest.param(cpu_scan, id="cpu", marks=NEEDS_NATIVE)
LONG_SCANS = [pytest.param(event_scan, id="events"), NATIVE]
# Triton decides at import whether its kernels run on the CPU, interpreted: test_triton_interpreted.py starts a process.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None
FAST_SCANS = [*LONG_SCANS]
if INTERPRETED:
    import triton_interpreter  # noqa: F401 - speeds the interpreter up

    from hf_skiprnn.kernels.triton.operators import triton_scan

    # NumPy, which interprets, warns of numbers that a kernel computes and then masks.
    ignored = pytest.mark.filterwarnings("ignore::RuntimeWarning")
    FAST_SCANS.append(pytest.param(triton_scan, id="triton", marks=ignored))
SCANS = [pytest.param(dense_scan, id="dense"), *FAST_SCANS]


def everything(problem: Problem, scan: Scan) -> list[torch.Tensor]:
    """Every value and every gradient, for comparisons to the bit."""
    out = problem.run(scan)
    values = [out.sequence, *out.state, out.num_updates, out.update_gates]
    return [*(part.detach() for part in values if part is not None), *gradients(problem, out).values()]


def assert_same_gradients(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], tolerance: float) -> None:
    assert got.keys() == want.keys()
    for name, grad in want.items():
        assert_close(f"gradient of {name}", got[name], grad, tolerance)


def assert_is_the_definition(problem: Problem, scan: Scan, tolerance: Tolerance = EXACT) -> None:
    """Values, gates and every gradient are those of the dense scan; in inference, too."""
    want, got = problem.run(dense_scan), problem.run(scan)
    assert_same_values(got, want, tolerance.values)
    if problem.case.steps:
        assert got.update_gates.requires_grad == got.num_updates.requires_grad == want.num_updates.requires_grad
    assert_same_gradients(gradients(problem, got), gradients(problem, want), tolerance.gradients)
    with torch.inference_mode():
        assert_same_values(problem.run(scan), want, tolerance.values)
