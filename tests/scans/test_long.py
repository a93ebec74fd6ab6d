"""Long sequences: memory follows the updates, not the steps."""

import subprocess
import sys

import pytest
from survival.ledger import SCALE, note

from hf_skiprnn.kernels.cpu.operators import unavailable_reason

MEASURE = """
import resource, torch
from hf_skiprnn import SkipRNNConfig, SkipRNNForSequenceClassification

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MiB

torch.set_num_threads(1)
torch.manual_seed(0)
"""

# The gate's weights are 0 and its bias is the logit of 0.5 / 20: every 20th step is an update.
TRAINING_STEP = """
model = SkipRNNForSequenceClassification(SkipRNNConfig(input_size=4, hidden_size=110, num_labels=3))
model.set_scan_backend({backend!r})
gate = model.base_model.update_gate
torch.nn.init.zeros_(gate.weight)
torch.nn.init.constant_(gate.bias, torch.logit(torch.tensor(0.5 / 20 + 1e-6)))
optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
out = model(input_values=torch.randn({rows}, 100_000, 4), labels=torch.arange({rows}) % 3)
out.loss.backward()
optimizer.step()
assert (out.num_updates / 100_000 - 0.05).abs().max() < 1e-3, out.num_updates
assert all(p.grad.isfinite().all() for p in model.parameters())
print(peak())
"""

STREAM = """
model = SkipRNNForSequenceClassification(SkipRNNConfig(input_size=4, hidden_size=16, num_labels=3, update_bias=-3.0))
stream, x = model.eval().stream(), torch.randn(997, 4)

def push(steps):
    return sum(stream.push(x[i % 997]) for i in range(steps))

push(20_000)
before, updates = peak(), push({steps})
assert 0 < updates < {steps} / 2, updates
assert stream.step == 20_000 + {steps}
assert stream.logits.isfinite().all()
print(peak() - before)
"""


def measured(code: str) -> float:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE + code], capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, done.stderr
    return float(done.stdout.split()[-1])


NATIVE = pytest.mark.skipif(unavailable_reason() is not None, reason="the native engine is not built")
LONG_FORM = pytest.mark.skipif(SCALE == 1, reason="5000 rounds in plain PyTorch take half a minute: make soak")


@pytest.mark.parametrize(
    ("backend", "rows"), [pytest.param("cpu", 16, marks=NATIVE), pytest.param("events", 2, marks=LONG_FORM)]
)
def test_a_training_step_on_100_000_steps_at_5_percent_stays_within_2_gb(backend: str, rows: int) -> None:
    memory = measured(TRAINING_STEP.format(backend=backend, rows=rows))
    note(f"training step, {rows} x 100 000 steps, {backend}: peak MiB of the process", str(round(memory)))
    assert memory < 2000


def test_a_stream_takes_no_memory() -> None:
    steps = 100_000 * SCALE
    memory = measured(STREAM.format(steps=steps))
    note(f"stream of {steps} steps: MiB more at its end", str(round(memory, 1)))
    assert memory < 2
