"""The problems of scan_problems.py, and the backends that tests loop over."""

import pytest
from scan_problems import (
    Case,
    Problem,
    assert_close,
    assert_same_values,
    cotangents,
    gradients,
    make_problem,
)

from hf_skiprnn.kernels.cpu.operators import cpu_scan, unavailable_reason
from hf_skiprnn.model.dense_scan_skip_rnn import dense_scan
from hf_skiprnn.model.event_scan_skip_rnn import event_scan

__all__ = [
    "FAST_SCANS",
    "SCANS",
    "Case",
    "Problem",
    "assert_close",
    "assert_same_values",
    "cotangents",
    "gradients",
    "make_problem",
]

# Every backend that this machine runs; tests loop over them.
MISSING = unavailable_reason()
NATIVE = pytest.param(cpu_scan, id="cpu", marks=pytest.mark.skipif(MISSING is not None, reason=MISSING or ""))
FAST_SCANS = [pytest.param(event_scan, id="events"), NATIVE]
SCANS = [pytest.param(dense_scan, id="dense"), *FAST_SCANS]
