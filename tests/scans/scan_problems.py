"""Random scan problems, and the comparison of any backend with the definition (the dense scan in float64).

Plain Python and torch, so that it also runs where pytest is absent.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from tolerances import EXACT, Tolerance
from torch import Tensor

from hf_skiprnn.model.cells_skip_rnn import CELLS, GateWeights, LayerWeights
from hf_skiprnn.model.dense_scan_skip_rnn import Scan, dense_scan
from hf_skiprnn.model.outputs_skip_rnn import ScanOutput, SkipRNNState


@dataclass(frozen=True)
class Case:
    """One scan problem; every field changes the path taken."""

    cell: str = "lstm"
    layers: int = 1
    batch: int = 4
    steps: int = 23
    inputs: int = 3
    hidden: int = 7
    gate: str = "learned"  # "learned" | "always" | "planned" | "forced" (learned weights, given gates)
    mask: str = "none"  # "none" | "right" | "left" | "ragged" (inner holes, an empty row)
    state: str = "fresh"  # "fresh" | "running" (in the middle of skipped steps)
    sequence: bool = False
    bias: bool = True
    shifted: bool = False  # every row has a shift of its own on the gate's bias
    capped: int = 0  # as GateWeights.capped
    gate_bias: float = -1.5  # at 0 about every other step is skipped; lower skips more

    def __str__(self) -> str:
        shown = (f"{k}={v}" for k, v in vars(self).items() if v != getattr(Case, k))
        return "-".join(shown) or "default"


@dataclass
class Problem:
    """Arguments of a scan, all leaves of autograd."""

    case: Case
    inputs: Tensor
    layers: list[LayerWeights]
    gate: GateWeights | None
    state: SkipRNNState
    mask: Tensor | None
    forced_gates: Tensor | None

    def run(self, scan: Callable[..., ScanOutput], forced_gates: Tensor | None = None) -> ScanOutput:
        return scan(
            self.inputs,
            self.layers,
            self.gate,
            self.state,
            cell=self.case.cell,
            mask=self.mask,
            forced_gates=self.forced_gates if forced_gates is None else forced_gates,
            sequence=self.case.sequence,
        )

    def leaves(self) -> dict[str, Tensor]:
        """Everything that gets a gradient, by name."""
        named = {"inputs": self.inputs}
        named |= {f"state.{k}": v for k, v in self.state._asdict().items() if v is not None}
        if self.gate is not None:
            named |= {f"update_gate.{k}": v for k, v in self.gate._asdict().items() if isinstance(v, Tensor)}
        for index, w in enumerate(self.layers):
            named |= {f"layers.{index}.{k}": v for k, v in w._asdict().items() if v is not None}
        return named

    def to(self, dtype: torch.dtype | None = None, device: str | None = None) -> "Problem":
        """Return the same numbers in another precision or on another device, as new leaves."""

        def leaf(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.detach().to(device=device, dtype=dtype).requires_grad_()

        def flags(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device=device)

        return replace(
            self,
            inputs=leaf(self.inputs),
            layers=[LayerWeights(*map(leaf, w)) for w in self.layers],
            gate=self.gate and GateWeights(*map(leaf, self.gate[:3]), self.gate.capped),
            state=SkipRNNState(*map(leaf, self.state)),
            mask=flags(self.mask),
            forced_gates=flags(self.forced_gates),
        )


def make_problem(case: Case, seed: int = 0, dtype: torch.dtype = torch.float64) -> Problem:
    """Weights of a scale at which gates are busy and float32 does not drift."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64) * scale

    cell, units = CELLS[case.cell], case.hidden
    layers = []
    for index in range(case.layers):
        width = case.inputs if index == 0 else units
        layers.append(
            LayerWeights(
                randn(cell.num_gates * units, width, scale=0.8 / width**0.5),
                randn(cell.num_gates * units, units, scale=0.8 / units**0.5),
                randn(cell.num_gates * units, scale=0.3) if case.bias else None,
                randn(units, scale=0.3) if case.bias and case.cell == "gru_reset_after" else None,
            )
        )
    gate = None
    if case.gate in ("learned", "forced"):
        gate = GateWeights(randn(1, units, scale=2.0 / units**0.5), torch.tensor([case.gate_bias], dtype=torch.float64))
        gate = gate._replace(shift=randn(case.batch) if case.shifted else None, capped=case.capped)
    problem = Problem(
        case,
        randn(case.batch, case.steps, case.inputs),
        layers,
        gate,
        _state(case, cell.has_cell_state, randn, g),
        _mask(case, g),
        torch.rand(case.batch, case.steps, generator=g) < 0.4 if case.gate in ("planned", "forced") else None,
    )
    return problem.to(dtype)


def _state(case: Case, has_cell_state: bool, randn: Callable[..., Tensor], g: torch.Generator) -> SkipRNNState:
    shape = (case.layers, case.batch, case.hidden)
    increment, steps = torch.ones(case.batch, dtype=torch.float64), torch.zeros(case.batch, dtype=torch.float64)
    if case.state == "running":
        increment = torch.rand(case.batch, generator=g, dtype=torch.float64) * 0.2
        steps = torch.randint(0, 4, (case.batch,), generator=g).double()
    return SkipRNNState(
        randn(*shape, scale=0.5), randn(*shape, scale=0.5) if has_cell_state else None, increment, steps
    )


def _mask(case: Case, g: torch.Generator) -> Tensor | None:
    if case.mask == "none":
        return None
    lengths = torch.randint(0, case.steps + 1, (case.batch, 1), generator=g)
    if case.mask == "ragged":
        mask = torch.rand(case.batch, case.steps, generator=g) < 0.7
        mask[:1] = False
        return mask
    place = torch.arange(case.steps).expand(case.batch, -1)
    return place < lengths if case.mask == "right" else place >= case.steps - lengths


def low(problem: Problem, dtype: torch.dtype = torch.bfloat16) -> Problem:
    """Return the problem with its inputs and weights in another precision."""
    layers = [LayerWeights(*(None if part is None else part.detach().to(dtype) for part in w)) for w in problem.layers]
    return replace(problem, inputs=problem.inputs.detach().to(dtype), layers=layers)


def cotangents(output: ScanOutput, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    """(output, random cotangent) for everything of `output` that is differentiable."""
    g = torch.Generator().manual_seed(seed)
    parts = [output.sequence, *output.state, output.num_updates, output.update_gates]
    pairs = []
    for part in parts:
        if part is None:
            continue
        grad = torch.randn(part.shape, generator=g, dtype=torch.float64).to(part)
        if part.requires_grad:
            pairs.append((part, grad))
    return pairs


def gradients(problem: Problem, output: ScanOutput) -> dict[str, Tensor]:
    """Gradients of random cotangents on every output, by name; zero where the graph does not reach."""
    leaves = problem.leaves()
    pairs = cotangents(output)
    grads = torch.autograd.grad([p for p, _ in pairs], list(leaves.values()), [c for _, c in pairs], allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True)
    }


def assert_same_values(got: ScanOutput, want: ScanOutput, tolerance: float) -> None:
    """Gates exactly, the rest to `tolerance` of the largest value."""
    assert torch.equal(got.update_gates.double(), want.update_gates.double()), "gates"
    assert torch.equal(got.num_updates.double(), want.num_updates.double()), "num_updates"
    assert torch.equal(got.state.steps_since_update.double(), want.state.steps_since_update.double()), "steps"
    for name in ("h", "c", "increment"):
        assert_close(f"state.{name}", getattr(got.state, name), getattr(want.state, name), tolerance)
    assert_close("sequence", got.sequence, want.sequence, tolerance)


def assert_rows_alone(problem: Problem, whole: ScanOutput, scan: Scan) -> None:
    """Some rows of 29, in a batch of their own, have the results that they have among all, bit for bit."""
    for rows in ([0], [28], [3, 4], [5, 1, 9, 20, 21, 22, 23]):
        state = problem.state.reorder(torch.tensor(rows))
        part = replace(problem, inputs=problem.inputs[rows], state=state).run(scan)
        assert torch.equal(part.sequence, whole.sequence[rows])
        assert torch.equal(part.state.h, whole.state.h[:, rows])
        assert torch.equal(part.update_gates, whole.update_gates[rows])


def assert_close(name: str, got: Tensor | None, want: Tensor | None, tolerance: float) -> None:
    """Largest difference against the largest value, floor 1."""
    assert (got is None) == (want is None), name
    if got is None or not got.numel():
        return
    assert got.shape == want.shape, f"{name}: {tuple(got.shape)} against {tuple(want.shape)}"
    got, want = got.detach().double(), want.detach().double()
    error = (got - want).abs().max() / max(1.0, float(want.abs().max()))
    assert error <= tolerance, f"{name}: differs by {float(error):.2e}, allowed {tolerance:.0e}"


def everything(problem: Problem, scan: Scan) -> list[Tensor]:
    """Every value and every gradient, for comparisons to the bit."""
    out = problem.run(scan)
    values = [out.sequence, *out.state, out.num_updates, out.update_gates]
    return [*(part.detach() for part in values if part is not None), *gradients(problem, out).values()]


def assert_same_gradients(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
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
