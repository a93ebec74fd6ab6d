"""The native engine reads memory only where there is some: wrappers, freed storages, views, changed saved tensors."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from scan_cases import NEEDS_NATIVE
from scan_problems import Case, Problem, assert_same_values, gradients, make_problem
from tolerances import EXACT
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from hf_skiprnn.kernels import choose_engine
from hf_skiprnn.kernels.cpu.operators import WrappedTensorError, cpu_scan
from hf_skiprnn.model.cells_skip_rnn import LayerWeights
from hf_skiprnn.model.dense_scan_skip_rnn import dense_scan
from hf_skiprnn.model.event_scan_skip_rnn import event_scan

pytestmark = NEEDS_NATIVE


class Scaled(torch.Tensor):
    """A wrapper that owns no memory, as quantised weights are: small numbers and their scale."""

    @staticmethod
    def __new__(cls, small: Tensor, scale: float) -> "Scaled":
        return torch.Tensor._make_wrapper_subclass(cls, small.shape, dtype=small.dtype)

    def __init__(self, small: Tensor, scale: float) -> None:
        self.small, self.scale = small, scale

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return cls(args[0].small, args[0].scale)
        plain = tree_map(lambda v: v.small * v.scale if isinstance(v, cls) else v, (args, kwargs or {}))
        return function(*plain[0], **plain[1])


class Named(torch.Tensor):
    """A tensor of another class with memory of its own, as torchvision's images are."""


def change(problem: Problem, name: str, function: Callable[[Tensor], Tensor]) -> Problem:
    """`problem` with `function` of one of its tensors."""
    if name == "inputs":
        return replace(problem, inputs=function(problem.inputs))
    if name.startswith("gate"):
        field = name.split(".")[1]
        return replace(problem, gate=problem.gate._replace(**{field: function(getattr(problem.gate, field))}))
    if name.startswith("state"):
        field = name.split(".")[1]
        return replace(problem, state=problem.state._replace(**{field: function(getattr(problem.state, field))}))
    layer = problem.layers[0]
    return replace(problem, layers=[layer._replace(**{name: function(getattr(layer, name))})])


def frozen(case: Case) -> Problem:
    problem = make_problem(case)
    for leaf in problem.leaves().values():
        leaf.requires_grad_(False)
    return problem


EVERYWHERE = ["inputs", "weight_ih", "weight_hh", "bias", "gate.weight", "gate.bias", "gate.shift", "state.h"]


@pytest.mark.parametrize("name", EVERYWHERE)
def test_auto_computes_with_wrappers_in_torch_operators(name: str) -> None:
    problem = frozen(Case(shifted=True, sequence=True))
    wrapped = change(problem, name, lambda t: Scaled(t / 4, 4.0))
    want = problem.run(cpu_scan)
    assert int(want.update_gates.sum()) < want.update_gates.numel()  # a gate that counts as absent reads every step
    engine = choose_engine("auto", problem.inputs, 100)
    assert engine.name == "cpu"
    for scan in (engine.scan, event_scan, dense_scan):
        assert_same_values(wrapped.run(scan), want, EXACT.values)
    with pytest.raises(
        WrappedTensorError, match=rf"{name.rsplit('.', maxsplit=1)[-1]}.* is a Scaled, which has none.*'events'"
    ):
        wrapped.run(cpu_scan)


def test_auto_looks_tokens_up_in_a_wrapper() -> None:
    problem = frozen(Case())
    table, ids = torch.randn(11, 3, dtype=torch.float64), torch.randint(0, 11, (4, 23))
    engine = choose_engine("auto", ids, 100)
    assert engine.scan_tokens is not None
    rest = (problem.layers, problem.gate, problem.state)
    want = engine.scan_tokens(ids, table, *rest, cell="lstm")
    assert_same_values(engine.scan_tokens(ids, Scaled(table / 4, 4.0), *rest, cell="lstm"), want, EXACT.values)


def test_a_subclass_with_memory_of_its_own_is_read() -> None:
    problem = make_problem(Case(mask="right"))
    want = problem.run(cpu_scan)
    other = replace(problem, inputs=problem.inputs.as_subclass(Named), mask=problem.mask.as_subclass(Named))
    got = other.run(cpu_scan)
    assert_same_values(got, want, 0)
    wanted = gradients(problem, want)
    for name, grad in gradients(problem, got).items():
        assert torch.equal(grad, wanted[name]), name


def test_fake_tensors_have_shapes_only() -> None:
    problem = frozen(Case())
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = replace(problem, inputs=mode.from_tensor(problem.inputs))
        assert fake.run(cpu_scan).state.h.shape == (1, 4, 7)
    alone = replace(problem, inputs=FakeTensorMode().from_tensor(problem.inputs))
    with pytest.raises(Exception, match="convert all Tensors to FakeTensors"):
        alone.run(cpu_scan)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", EVERYWHERE)
def test_a_storage_smaller_than_the_shape_is_refused(name: str, training: bool) -> None:
    problem = make_problem(Case(shifted=True))

    def free(bytes_left: int) -> Callable[[Tensor], Tensor]:
        def shrunk(tensor: Tensor) -> Tensor:
            copy = tensor.detach().clone()
            copy.untyped_storage().resize_(bytes_left)
            return copy

        return shrunk

    for left in (0, 7):
        with (
            torch.set_grad_enabled(training),
            pytest.raises(ValueError, match=rf"needs \d+ bytes; its storage holds {left}"),
        ):
            change(problem, name, free(left)).run(cpu_scan)


def test_views_reach_exactly_as_far_as_their_storage() -> None:
    """Strided, expanded and offset views are read; one element too few is not."""
    problem = frozen(Case())
    want = problem.run(cpu_scan)
    memory = torch.empty(4 * 23 * 3 * 2, dtype=torch.float64)
    view = memory.as_strided((4, 23, 3), (138, 6, 2), 1).copy_(problem.inputs)
    assert_same_values(replace(problem, inputs=view).run(cpu_scan), want, 0)
    memory.untyped_storage().resize_(8 * (4 * 23 * 3 * 2 - 1))
    with pytest.raises(ValueError, match="needs 4416 bytes; its storage holds 4408"):
        replace(problem, inputs=view).run(cpu_scan)
    row = frozen(Case(batch=1))
    expanded = replace(problem, inputs=row.inputs.expand(4, 23, 3), state=problem.state)
    assert_same_values(expanded.run(cpu_scan), expanded.run(dense_scan), EXACT.values)


@pytest.mark.parametrize("name", EVERYWHERE)
def test_views_with_a_negative_bit_are_resolved(name: str) -> None:
    def conjugated(tensor: Tensor) -> Tensor:
        view = torch.complex(torch.zeros_like(tensor), -tensor).conj().imag  # -(-x)
        assert view.is_neg()
        assert not view.is_conj()
        return view

    problem = make_problem(Case(shifted=True))
    want, got = problem.run(cpu_scan), change(problem, name, conjugated).run(cpu_scan)
    assert_same_values(got, want, 0)
    wanted = gradients(problem, want)
    for leaf, grad in gradients(problem, got).items():
        assert torch.equal(grad, wanted[leaf]), leaf


@pytest.mark.parametrize("name", ["inputs", "weight_hh", "gate.weight"])
def test_sparse_tensors_are_refused_by_name(name: str) -> None:
    problem = change(frozen(Case()), name, lambda t: t.to_sparse())
    with pytest.raises(ValueError, match=r"must be a plain dense tensor; got Tensor of layout torch\.sparse_coo"):
        problem.run(cpu_scan)


def test_meta_weights_say_where_values_come_from() -> None:
    problem = change(frozen(Case()), "weight_hh", lambda t: t.to("meta"))
    with pytest.raises(ValueError, match=r"on meta\. .*has no values: it is offloaded.*preload_module_classes"):
        problem.run(cpu_scan)


@pytest.mark.parametrize(
    ("change_data", "message"),
    [
        (lambda data: data.half(), "weight_hh must be torch.float64"),
        (lambda data: data[:4], "weight_hh must be torch.float64 of shape"),
        (lambda data: data.untyped_storage().resize_(8) and data, "its storage holds 8"),
    ],
)
def test_weights_that_change_before_the_backward_pass_are_refused(change_data: Any, message: str) -> None:
    problem = make_problem(Case())
    weight = torch.nn.Parameter(problem.layers[0].weight_hh.detach().clone())
    out = change(problem, "weight_hh", lambda _: weight).run(cpu_scan)
    weight.data = change_data(weight.data)
    with pytest.raises(ValueError, match=message):
        out.state.h.sum().backward()


@pytest.mark.parametrize(
    ("pack", "message"),
    [
        (
            lambda t: t.half() if t.is_floating_point() else t,
            "reads float32 or float64, in inference also bfloat16; got",
        ),
        (lambda t: t.long() if t.dtype == torch.int32 else t, "updates of the backward pass must be torch.int32"),
        (lambda t: t + 100 if t.dtype == torch.int32 and t.dim() == 2 else t, r"updates .* must be in 0 \.\. 22"),
        (lambda t: -t if t.dtype == torch.int32 and t.dim() == 1 else t, r"counts .* must be in 0 \.\. 23"),
        (lambda t: t[:, :, :, :1] if t.dim() == 5 else t, "checkpoints of the backward pass"),
        (lambda t: t[:1] if t.dim() == 1 else t, "must be"),
    ],
)
def test_saved_tensors_that_come_back_changed_are_refused(pack: Callable[[Tensor], Tensor], message: str) -> None:
    problem = make_problem(Case())
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = problem.run(cpu_scan)
    with pytest.raises(ValueError, match=message):
        out.state.h.sum().backward()


def test_saved_tensors_that_come_back_equal_give_the_gradient() -> None:
    problem = make_problem(Case())
    want = gradients(problem, problem.run(cpu_scan))
    with torch.autograd.graph.save_on_cpu():
        out = problem.run(cpu_scan)
    for name, grad in gradients(problem, out).items():
        assert torch.equal(grad, want[name]), name


def test_an_absent_weight_is_one_by_its_shape() -> None:
    """An empty tensor of another shape is a mistake, never "none"."""
    problem = frozen(Case())
    empty = problem.inputs.new_empty(0, 28)
    with pytest.raises(ValueError, match="bias must be"):
        replace(problem, layers=[LayerWeights(*problem.layers[0][:2], bias=empty)]).run(cpu_scan)
