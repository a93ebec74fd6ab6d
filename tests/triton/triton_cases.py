"""What the Triton engine is held to, each a check of triton_suite.py: CHECKS, and on a GPU GPU_CHECKS too.

The small ones run interpreted on a CPU as well; FUZZ_SCALE above 1 adds combinations (`make fuzz`).
"""

import itertools
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from scan_problems import Case, Problem, assert_close, assert_same_values, gradients, make_problem
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hf_skiprnn.kernels.triton import buffers as triton_buffers
from hf_skiprnn.kernels.triton import tiling as triton_tiling
from hf_skiprnn.kernels.triton.kernels_backward import resident_backward, streamed_backward
from hf_skiprnn.kernels.triton.kernels_forward import resident_forward, streamed_forward
from hf_skiprnn.kernels.triton.operators import triton_scan
from hf_skiprnn.model.cells_skip_rnn import CELLS, LayerWeights, gate_opens
from hf_skiprnn.model.dense_scan_skip_rnn import dense_scan
from hf_skiprnn.model.outputs_skip_rnn import ScanOutput

INTERPRETED = triton_tiling.INTERPRETED
KERNELS = (resident_forward, streamed_forward, resident_backward, streamed_backward)
CANDIDATES = [kernel.configs for kernel in KERNELS]
DEVICE = "cpu" if INTERPRETED else "cuda"
SCALE = min(49, int(os.environ.get("FUZZ_SCALE", "1")))
# Against the largest value. float64: thousands of additions in another order. float32: 60 steps of 6e-8 each. TF32 and
# half precision: operands of 11 and 8 bits, and errors that a recurrent net carries on.
EXACT, EXACT_GRADIENT = 1e-11, 1e-10
TOLERANCE = {"float32": (5e-6, 1e-4), "tf32": (1e-2, 5e-2), "float16": (1e-2, 5e-2), "bfloat16": (6e-2, 2e-1)}


@contextmanager
def engine(resident: bool = True, chunk: int | None = None, config: int | None = 0) -> Iterator[None]:
    """Stream weights although they fit; cut the backward pass into short chunks; take another candidate, None: tune."""
    before = triton_tiling.RESIDENT_BYTES, triton_buffers.CHUNK_NUMBERS, triton_buffers.SHORTEST_CHUNK
    configs = [kernel.configs for kernel in KERNELS]
    for kernel, candidates in zip(KERNELS, CANDIDATES, strict=True):  # a single one: nothing is timed
        kernel.configs = candidates if config is None else [candidates[config % len(candidates)]]
    if not resident:
        triton_tiling.RESIDENT_BYTES = 0
    if chunk is not None:
        triton_buffers.CHUNK_NUMBERS, triton_buffers.SHORTEST_CHUNK = 0, chunk
    try:
        yield
    finally:
        triton_tiling.RESIDENT_BYTES, triton_buffers.CHUNK_NUMBERS, triton_buffers.SHORTEST_CHUNK = before
        for kernel, before_it in zip(KERNELS, configs, strict=True):
            kernel.configs = before_it


def on_device(problem: Problem) -> Problem:
    """Return the same problem where the kernels run, as new leaves."""
    return problem.to(device=DEVICE)


def assert_is_the_definition(problem: Problem) -> None:
    """Values, gates, and every gradient by name, in float64; and the same in inference."""
    problem = on_device(problem)
    want, got = problem.run(dense_scan), problem.run(triton_scan)
    assert_same_values(got, want, EXACT)
    wanted = gradients(problem, want)
    for name, grad in gradients(problem, got).items():
        assert_close(f"gradient of {name}", grad, wanted[name], EXACT_GRADIENT)
    with torch.inference_mode():
        assert_same_values(problem.run(triton_scan), want, EXACT)


def options(cell: str, path: str) -> None:
    """Layers, gates, masks, states, outputs, inputs in the kernel and before it, several chunks."""
    few = [
        Case(steps=11),
        Case(steps=12, layers=2, mask="ragged", state="running", sequence=True),
        Case(steps=14, layers=2, mask="ragged", sequence=True, capped=4, gate_bias=-2.5),
        Case(steps=5, hidden=19, gate="always", mask="left", sequence=True),
        Case(steps=8, gate="planned", mask="ragged", bias=False),
        Case(steps=9, inputs=18, gate="forced", sequence=True, mask="right"),
    ]
    many = [
        Case(layers=layers, gate=gate, mask=mask, state=state, sequence=sequence)
        for layers, gate, mask, state, sequence in itertools.product(
            (1, 2, 3),
            ("learned", "always", "planned", "forced"),
            ("none", "right", "left", "ragged"),
            ("fresh", "running"),
            (False, True),
        )
    ]
    with engine(path == "resident", chunk=5):
        for case in few + many[:: 49 // SCALE] if not INTERPRETED or SCALE > 1 else few:  # compiling takes most time
            if path == "streamed" or case.layers == 1:
                assert_is_the_definition(make_problem(replace(case, cell=cell, batch=3), seed=len(str(case))))


def awkward_shapes() -> None:
    """Lengths 1, 63 and 500, one unit, none, no rows, no steps; H and B beyond a block's edge."""
    cases = [
        Case(steps=1, mask="ragged", sequence=True),
        Case(steps=63, hidden=1, inputs=1, cell="gru", batch=2, gate_bias=-5.0),
        Case(steps=500, batch=1, gate_bias=-7.0, sequence=True),
        Case(batch=0),
        Case(steps=0, sequence=True),
        Case(steps=3, hidden=17, batch=18, cell="gru_reset_after"),
    ]
    if not INTERPRETED:
        cases += [
            Case(batch=300, steps=60, hidden=110, inputs=1, sequence=True, mask="ragged"),
            Case(batch=65, steps=500, hidden=64, gate_bias=-4.0),
            Case(batch=40, steps=30, hidden=260, inputs=70, layers=2),
            Case(batch=40, steps=30, hidden=200, cell="gru", sequence=True),
        ]
    for case in cases:
        assert_is_the_definition(make_problem(case))


def uneven_rows() -> None:
    """A row that never skips beside one that almost always does; no update at all; rows of masked steps only."""
    steps = 20 if INTERPRETED else 300
    problem = make_problem(Case(batch=2, steps=steps, gate="forced", sequence=True))
    gates = torch.zeros(2, steps, dtype=torch.bool)
    gates[0] = True
    gates[1, [0, steps - 5]] = True
    nothing = torch.zeros_like(gates)
    with engine(chunk=7):
        for forced, mask in ((gates, None), (nothing, None), (gates, nothing)):
            assert_is_the_definition(replace(problem, forced_gates=forced, mask=mask))


def autograd_tools() -> None:
    """A kept graph can be gone through twice; a checkpointed scan, computed again, has the same gradients."""
    problem = on_device(make_problem(Case(batch=2, steps=6, gate_bias=-1.0)))

    def run(x: Tensor) -> Tensor:
        return replace(problem, inputs=x).run(triton_scan).state.h.sin().sum()

    loss = run(problem.inputs)
    (want,) = torch.autograd.grad(loss, problem.inputs, retain_graph=True)
    assert torch.equal(want, torch.autograd.grad(loss, problem.inputs)[0])
    for reentrant in (False, True):
        problem.inputs.grad = None
        checkpoint(run, problem.inputs, use_reentrant=reentrant).backward()
        assert torch.equal(problem.inputs.grad, want)


def low_precision(cell: str, dtype: torch.dtype, name: str, configs: tuple[int, ...] = (0,), hidden: int = 100) -> None:
    """Floats under the gates of float64 (in float32 a recurrent net is chaotic near a tie)."""
    batch, steps, hidden = (3, 11, 18) if INTERPRETED else (40, 60, hidden)
    problem = make_problem(Case(cell=cell, batch=batch, steps=steps, hidden=hidden, sequence=True))
    if dtype in (torch.float16, torch.bfloat16):  # the yardstick has the same weights
        problem = replace(
            problem,
            inputs=problem.inputs.detach().to(dtype).double().requires_grad_(),
            layers=[
                LayerWeights(*(None if x is None else x.detach().to(dtype).double().requires_grad_() for x in w))
                for w in problem.layers
            ],
        )
    problem = on_device(problem)
    with torch.no_grad():
        gates = problem.run(dense_scan).update_gates > 0.5
    want = problem.run(dense_scan, forced_gates=gates)
    wanted = gradients(problem, want)
    kept = problem.to(torch.float32)
    low = replace(
        kept,
        inputs=kept.inputs.detach().to(dtype).requires_grad_(),
        layers=[
            LayerWeights(*(None if x is None else x.detach().to(dtype).requires_grad_() for x in w))
            for w in kept.layers
        ],
    )
    for resident, config in itertools.product((True, False), configs):
        with engine(resident, config=config):
            got = low.run(triton_scan, forced_gates=gates)
            assert got.state.h.dtype == torch.float32
            assert_same_values(got, want, TOLERANCE[name][0])
            for leaf, grad in gradients(low, got).items():
                assert_close(f"gradient of {leaf}", grad, wanted[leaf], TOLERANCE[name][1])


def every_candidate(cell: str) -> None:
    """Every candidate of the tuner: other warps, other stages. GPU only."""
    low_precision(cell, torch.bfloat16, "bfloat16", (1, 2, 3))
    low_precision(cell, torch.bfloat16, "bfloat16", (1, 2, 3), hidden=400)


def autotuning() -> None:
    """Triton times the candidates once, and what it chose changes no result beyond rounding. GPU only."""
    problem = on_device(make_problem(Case(batch=20, steps=30, hidden=110, inputs=1), dtype=torch.float32))
    gates = problem.run(triton_scan).update_gates > 0.5
    with engine():
        want = problem.run(triton_scan, forced_gates=gates)
        wanted = gradients(problem, want)
    for resident in (True, False):
        with engine(resident, config=None):
            got = problem.run(triton_scan, forced_gates=gates)
            grads = gradients(problem, got)
        assert_same_values(got, want, TOLERANCE["float32"][0])
        for name, grad in grads.items():
            assert_close(f"gradient of {name}", grad, wanted[name], TOLERANCE["float32"][1])
    for kernel in KERNELS:
        assert kernel.cache, kernel.base_fn.__name__
        print(kernel.base_fn.__name__, [(str(form[0]), str(config)) for form, config in kernel.cache.items()])


def tf32() -> None:
    """torch's own switch decides."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        for cell in CELLS:
            low_precision(cell, torch.float32, "tf32")
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def ties_zero_and_nan() -> None:
    """Increments at ties, zero, NaN: the first update comes when the definition says."""
    increments = [0.0, -0.0, 1e-45, 1e-30, 0.25, 0.5, 1 / 3, 0.1, 0.05, 1 / 12, 1.0, math.inf, math.nan, -1.0]
    increments += [0.5 / n for n in range(1, 30)]
    batch, steps = len(increments), 12 if INTERPRETED else 40
    problem = make_problem(Case(batch=batch, steps=steps, gate_bias=-50.0, inputs=1), dtype=torch.float32)
    for steps_since_update in (0.0, 3.0):
        state = problem.state._replace(
            increment=torch.tensor(increments), steps_since_update=torch.full((batch,), steps_since_update)
        )
        with torch.no_grad():
            got = on_device(replace(problem, state=state)).run(triton_scan).update_gates.bool().cpu()
        opens = gate_opens(
            steps_since_update + torch.arange(1, steps + 1).unsqueeze(0), torch.tensor(increments).unsqueeze(1)
        )
        first = torch.where(opens.any(1), opens.int().argmax(1), steps)
        for row in range(batch):
            assert not got[row, : first[row]].any(), increments[row]
            assert first[row] == steps or got[row, first[row]], increments[row]


def what_is_not_read() -> None:
    """NaN at masked steps reaches no gradient, NaN at skipped steps no output; a NaN that is read updates and shows."""
    problem = make_problem(Case(steps=10, mask="ragged", sequence=True))
    assert problem.mask is not None
    hidden = problem.inputs.detach().masked_fill(~problem.mask.unsqueeze(-1), math.nan).requires_grad_()
    plain, poisoned = on_device(problem), on_device(replace(problem, inputs=hidden))
    want, got = plain.run(triton_scan), poisoned.run(triton_scan)
    assert_same_values(got, want, 0)
    wanted = gradients(plain, want)
    for name, grad in gradients(poisoned, got).items():
        assert_close(name, grad, wanted[name], 0)
    skipped = (want.update_gates == 0).unsqueeze(-1)
    with torch.no_grad():
        unread = replace(plain, inputs=plain.inputs.masked_fill(skipped, math.nan))
        assert_same_values(unread.run(triton_scan), want, 0)
        broken = replace(plain, inputs=plain.inputs.index_fill(1, torch.tensor(9, device=DEVICE), math.nan), mask=None)
        forced = torch.ones(4, 10, dtype=torch.bool, device=DEVICE)
        assert broken.run(triton_scan, forced_gates=forced).state.h.isnan().all()


def chunks_of_a_sequence() -> None:
    """Continuing from the returned state, with gradients across the seams, is running through."""
    whole = on_device(make_problem(Case(batch=2, steps=16, layers=2, mask="ragged", state="running", gate_bias=-2.0)))
    want = whole.run(dense_scan)
    assert whole.mask is not None
    state, gates = whole.state, []
    for start, end in ((0, 1), (1, 7), (7, 16)):
        part = replace(whole, inputs=whole.inputs[:, start:end], mask=whole.mask[:, start:end], state=state)
        out = part.run(triton_scan)
        state = out.state
        gates.append(out.update_gates)
    got = ScanOutput(None, state, sum(g.sum(1) for g in gates), torch.cat(gates, 1))
    assert_same_values(got, want, EXACT)
    wanted = gradients(whole, want)
    for name, grad in gradients(whole, got).items():
        assert_close(name, grad, wanted[name], EXACT_GRADIENT)


def strided_arguments() -> None:
    """Transposed and expanded tensors: the kernels take contiguous ones."""
    problem = on_device(make_problem(Case(batch=2, steps=6, mask="ragged", gate="forced", sequence=True, layers=2)))

    def strided(x: Tensor) -> Tensor:
        return x.transpose(0, -1).contiguous().transpose(0, -1)

    other = replace(
        problem,
        inputs=strided(problem.inputs),
        layers=[LayerWeights(*(None if part is None else strided(part) for part in w)) for w in problem.layers],
        state=problem.state._replace(h=problem.state.h[:, :1].expand(-1, 2, -1)),
        mask=strided(problem.mask),
        forced_gates=strided(problem.forced_gates),
    )
    with engine(chunk=5):
        want, got = other.run(dense_scan), other.run(triton_scan)
        assert_same_values(got, want, EXACT)
        wanted = gradients(problem, want)
        for name, grad in gradients(problem, got).items():
            assert_close(f"gradient of {name}", grad, wanted[name], EXACT_GRADIENT)


def operators() -> None:
    """Schema, fake tensors, torch.compile without a graph break, and what is refused."""
    problem = on_device(make_problem(Case(steps=6, batch=2)))
    weights = [problem.inputs.new_empty(0) if part is None else part for w in problem.layers for part in w]
    gate = [part for part in problem.gate or () if isinstance(part, Tensor)]
    arguments = (problem.inputs, weights, gate, *problem.state, None, None, "lstm", False, False, True)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.hf_skiprnn.triton_forward.default, arguments, test_utils=checks)

    def loss(inputs: Tensor) -> Tensor:
        out = replace(problem, inputs=inputs * 2).run(triton_scan)
        return out.state.h.sin().sum() + out.num_updates.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (want,), (got,) = (torch.autograd.grad(f(problem.inputs), problem.inputs) for f in (loss, compiled))
    assert_close("compiled", got, want, EXACT)
    refused(
        RuntimeError,
        "Use the 'dense' backend",
        lambda: torch.autograd.grad(
            torch.autograd.grad(loss(problem.inputs), problem.inputs, create_graph=True)[0].sum(), problem.inputs
        ),
    )
    refused(ValueError, "weight_ih", lambda: replace(problem, inputs=problem.inputs[..., :2]).run(triton_scan))
    short = torch.ones(2, 5, dtype=torch.bool, device=DEVICE)
    refused(ValueError, "mask must be", lambda: replace(problem, mask=short).run(triton_scan))


def refused(error: type[Exception], message: str, run: Callable[[], object]) -> None:
    """`run` raises `error`, and says `message`."""
    said = "nothing"
    try:
        run()
    except error as caught:
        said = str(caught)
    assert message in said, said


def shared_units() -> None:
    """Several programs to a row block (large H): equal to one program, and the same bits every time. GPU only."""
    for cell in CELLS:
        problem = make_problem(Case(cell=cell, batch=20, steps=40, hidden=512, inputs=40, layers=2, sequence=True))
        assert triton_tiling.tiling(20, 512, 4, 2, torch.float64, 132).split > 1
        assert_is_the_definition(problem)
        low = on_device(problem.to(torch.float32))
        first, second = (gradients(low, low.run(triton_scan)) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)


def cuda_graph() -> None:
    """Forward and backward in one CUDA graph: nothing waits for the device. GPU only."""
    problem = on_device(make_problem(Case(batch=70, steps=80, hidden=110, inputs=1), dtype=torch.float32))
    leaves = list(problem.leaves().values())

    def step() -> list[Tensor]:
        out = problem.run(triton_scan)
        grads = torch.autograd.grad(out.state.h.sum() + out.num_updates.sum(), leaves, allow_unused=True)
        return [out.state.h, *(g for g in grads if g is not None)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        want = [part.clone() for part in step()]
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(got, want, strict=True))


def long_offsets() -> None:
    """More than 2^31 numbers in the recorded states: the last row is what it is alone. GPU only."""
    rows, steps = 600, 40_000
    problem = make_problem(Case(batch=rows, steps=1, hidden=100, inputs=1, gate="planned"), dtype=torch.float32)
    gates = torch.zeros(rows, steps, dtype=torch.bool)
    gates[:, ::100] = True
    whole = on_device(replace(problem, inputs=torch.randn(rows, steps, 1), forced_gates=gates))
    assert whole.forced_gates is not None
    last = torch.tensor([rows - 1], device=DEVICE)
    alone = replace(
        whole, inputs=whole.inputs[last], state=whole.state.reorder(last), forced_gates=whole.forced_gates[last]
    )
    want, got = alone.run(triton_scan), whole.run(triton_scan)
    assert got.num_updates.min() == steps // 100
    for name in ("h", "c"):
        mine, theirs = getattr(got.state, name)[:, last], getattr(want.state, name)
        assert_close(f"state.{name}", mine, theirs, TOLERANCE["float32"][0])


CHECKS: dict[str, Callable[[], None]] = {
    **{
        f"options, {cell}, {path}": (lambda cell=cell, path=path: options(cell, path))
        for cell in CELLS
        for path in ("resident", "streamed")
    },
    "awkward shapes": awkward_shapes,
    "uneven rows": uneven_rows,
    **{
        f"{name}, {cell}": (lambda cell=cell, name=name: low_precision(cell, getattr(torch, name), name))
        for name in ("float32", "float16", "bfloat16")
        for cell in CELLS
        if not INTERPRETED or (name, cell) in (("float32", "lstm"), ("float16", "gru_reset_after"), ("bfloat16", "gru"))
    },
    "ties, zero and NaN": ties_zero_and_nan,
    "what is not read": what_is_not_read,
    "chunks of a sequence": chunks_of_a_sequence,
    "strided arguments": strided_arguments,
    "autograd tools": autograd_tools,
    "operators": operators,
}
GPU_CHECKS: dict[str, Callable[[], None]] = {
    **{f"candidates, {cell}": (lambda cell=cell: every_candidate(cell)) for cell in CELLS},
    "TF32": tf32,
    "shared units": shared_units,
    "autotuning": autotuning,
    "CUDA graph": cuda_graph,
    "long offsets": long_offsets,
}
