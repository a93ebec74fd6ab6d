"""Bad arguments of the native CPU scan are refused by name."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from scan_cases import NEEDS_NATIVE
from scan_problems import Case, Problem, make_problem

from hf_skiprnn.kernels.cpu.operators import cpu_scan

pytestmark = NEEDS_NATIVE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: replace(p, inputs=p.inputs[0]), "inputs must be"),
        (lambda p: replace(p, inputs=p.inputs[..., :2]), "weight_ih"),
        (lambda p: replace(p, layers=[p.layers[0]._replace(bias=p.layers[0].bias[1:])]), "bias"),
        (lambda p: replace(p, layers=[]), "Four weights"),
        (lambda p: replace(p, state=p.state._replace(c=None)), "state of a 'lstm'"),
        (lambda p: replace(p, state=p.state._replace(h=p.state.h[:, :1])), r"state\.h"),
        (lambda p: replace(p, state=p.state._replace(increment=p.state.increment[:1])), r"state\.increment"),
        (lambda p: replace(p, mask=torch.ones(4, 22, dtype=torch.bool)), "mask"),
        (lambda p: replace(p, mask=torch.ones(4, 23)), "mask must be torch.bool"),
        (lambda p: replace(p, forced_gates=torch.ones(3, 23, dtype=torch.bool)), "forced_gates"),
        (lambda p: replace(p, case=replace(p.case, cell="rnn")), "cell must be one of"),
        (lambda p: replace(p, inputs=p.inputs.to("meta")), "on the CPU"),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_bad_arguments_are_refused_by_name(change: Callable[[Problem], Problem], message: str, training: bool) -> None:
    problem = change(make_problem(Case()))
    with torch.set_grad_enabled(training), pytest.raises(ValueError, match=message):
        problem.run(cpu_scan)
