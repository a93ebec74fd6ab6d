"""The backends that tests loop over."""

import os
from importlib.util import find_spec

import pytest

from hf_skiprnn.kernels.cpu.operators import cpu_scan, unavailable_reason
from hf_skiprnn.model.dense_scan_skip_rnn import dense_scan
from hf_skiprnn.model.event_scan_skip_rnn import event_scan

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
