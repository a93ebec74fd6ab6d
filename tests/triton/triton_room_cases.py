"""Training records that are sized by updates: checks of triton_suite.py, interpreted on a CPU or on a GPU."""

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace

import torch
from scan_problems import Case, Problem, assert_close, assert_same_values, gradients, make_problem
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from triton_cases import DEVICE, EXACT, EXACT_GRADIENT, engine, on_device, records_of

from hf_skiprnn import SkipLSTM
from hf_skiprnn.kernels.triton.operators import triton_scan
from hf_skiprnn.model.dense_scan_skip_rnn import dense_scan
from hf_skiprnn.model.outputs_skip_rnn import ScanOutput


def saved_bytes(output: ScanOutput) -> int:
    """Of what a scan keeps for its backward pass."""
    assert output.state.h.grad_fn is not None
    saved = [part for part in output.state.h.grad_fn.saved_tensors if part is not None]
    return sum(part.untyped_storage().nbytes() for part in saved)


def too_few_slots(cell: str) -> None:
    """Rows with more updates than there are slots: every result and gradient has the bits of a scan with enough."""
    cases = [
        Case(batch=3, steps=6, inputs=18, gate_bias=4.0),
        Case(batch=2, steps=8, layers=2, mask="ragged", gate_bias=1.0),
        Case(batch=3, steps=7, gate="planned", mask="left", inputs=1),
        Case(batch=2, steps=7, gate="forced", state="running"),
    ]
    for case in cases:
        problem = on_device(make_problem(replace(case, cell=cell)))
        with engine(chunk=3), records_of(case.steps + 1):
            want = problem.run(triton_scan)
            enough = saved_bytes(want)
            wanted = wanted_by_the_definition(problem, gradients(problem, want))
        assert want.num_updates.max() >= 2
        with engine(chunk=3), records_of(2):
            got = problem.run(triton_scan)
            assert saved_bytes(got) < enough
            assert_same_values(got, want, 0)
            for name, grad in gradients(problem, got).items():
                assert torch.equal(grad, wanted[name]), f"{case}: {name}"


def wanted_by_the_definition(problem: Problem, grads: dict[str, Tensor]) -> dict[str, Tensor]:
    """`grads`, found to be the dense scan's."""
    for name, grad in gradients(problem, problem.run(dense_scan)).items():
        assert_close(f"gradient of {name}", grads[name], grad, EXACT_GRADIENT)
    return grads


def uneven_rows() -> None:
    """One row updates at every step and the others never; then no row at all, and rows of masked steps only."""
    problem = make_problem(Case(batch=3, steps=5, gate="forced"))
    gates = torch.zeros(3, 5, dtype=torch.bool)
    gates[1] = True
    nothing = torch.zeros_like(gates)
    for forced, mask in ((gates, None), (nothing, None), (gates, nothing)):
        case = on_device(replace(problem, forced_gates=forced, mask=mask))
        for slots in (0, 2):
            with engine(chunk=3), records_of(slots):
                out = case.run(triton_scan)
                assert_same_values(out, case.run(dense_scan), EXACT)
                wanted_by_the_definition(case, gradients(case, out))


def with_rate(problem: Problem, gate_bias: float) -> None:
    """Another rate of updates from now on, of the same weights."""
    assert problem.gate is not None
    with torch.no_grad():
        problem.gate.weight.zero_()
        problem.gate.bias.fill_(gate_bias)


def records_follow_updates() -> None:
    """The first call has room for all; the next ones for what was needed; a gate that reads more again is right."""
    steps, batch, hidden = 16, 2, 6
    problem = on_device(make_problem(Case(steps=steps, batch=batch, hidden=hidden, inputs=1)))
    assert problem.gate is not None
    state = 2 * batch * hidden * 8  # bytes of h and c in float64

    def step() -> int:
        out = problem.run(triton_scan)
        size = saved_bytes(out)
        wanted_by_the_definition(problem, gradients(problem, out))
        return size

    with_rate(problem, -1.9)  # every fourth step
    first, second = step(), step()
    assert first - second == state * (steps - 5)  # four updates, and one more
    with_rate(problem, 20.0)  # every step: too few slots, once
    assert step() == second
    assert step() == first
    with_rate(problem, -1.9)
    sizes = [step() for _ in range(3)]
    assert first == sizes[0] > sizes[1] > sizes[2] > second  # it forgets slowly
    nothing = replace(problem, inputs=problem.inputs[:, :0])
    assert torch.equal(nothing.run(triton_scan).state.h, problem.state.h)
    other = on_device(make_problem(Case(steps=steps, batch=batch, hidden=hidden, inputs=1)))
    assert saved_bytes(other.run(triton_scan)) == first  # another gate
    with torch.no_grad():
        assert problem.run(triton_scan).state.h.grad_fn is None


def sequences_and_backward_twice() -> None:
    """Every step's state is a result: room for all. A graph that is kept can be gone through twice."""
    problem = on_device(make_problem(Case(batch=2, steps=6, sequence=True)))
    first = saved_bytes(problem.run(triton_scan))
    for _ in range(2):
        out = problem.run(triton_scan)
        assert saved_bytes(out) == first
        wanted_by_the_definition(problem, gradients(problem, out))
    problem = on_device(make_problem(Case(batch=2, steps=6, gate_bias=0.0)))
    with records_of(2):
        loss = problem.run(triton_scan).state.h.sin().sum()
    once = torch.autograd.grad(loss, list(problem.leaves().values()), retain_graph=True, allow_unused=True)
    twice = torch.autograd.grad(loss, list(problem.leaves().values()), allow_unused=True)
    assert all(
        (a is None) == (b is None) and (a is None or torch.equal(a, b)) for a, b in zip(once, twice, strict=True)
    )


def activation_checkpointing() -> None:
    """A pass that is computed again saves what the first did, whatever was learned in between."""
    problem = on_device(make_problem(Case(batch=2, steps=9, gate_bias=-3.0)))

    def run(x: Tensor) -> Tensor:
        return replace(problem, inputs=x).run(triton_scan).state.h

    (want,) = torch.autograd.grad(run(problem.inputs).sin().sum(), problem.inputs)
    for reentrant in (False, True):
        first, second = (checkpoint(run, problem.inputs, use_reentrant=reentrant) for _ in range(2))
        for h in (second, first):
            problem.inputs.grad = None
            h.sin().sum().backward()
            assert torch.equal(problem.inputs.grad, want)


def copies_and_pickles() -> None:
    """What was learned of a model's gate stays with that model, and is no part of it."""
    layer = SkipLSTM(2, 3, update_bias=-3.0).to(DEVICE).double()
    x = torch.randn(9, 2, 2, dtype=torch.float64, device=DEVICE)

    def scan(layer: nn.Module) -> int:
        state = layer.initial_state(2)
        weights, gate = [part.weights() for part in layer.layers], layer.gate_weights()
        out = triton_scan(x.transpose(0, 1), weights, gate, state, cell="lstm")
        size = saved_bytes(out)
        out.state.h.sum().backward()
        return size

    first, second = scan(layer), scan(layer)
    assert second < first
    assert scan(copy.deepcopy(layer)) == first
    assert scan(pickle.loads(pickle.dumps(layer))) == first
    assert scan(layer) == second


CHECKS: dict[str, Callable[[], None]] = {
    **{
        f"too few slots, {cell}": (lambda cell=cell: too_few_slots(cell)) for cell in ("lstm", "gru", "gru_reset_after")
    },
    "records where rows differ": uneven_rows,
    "records follow updates": records_follow_updates,
    "records of sequences": sequences_and_backward_twice,
    "activation checkpointing": activation_checkpointing,
    "records of copies": copies_and_pickles,
}
