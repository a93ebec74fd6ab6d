"""Code that travelled with checkpoints of version 0.1.0 asks the installed package for `select` and `of_tokens`."""

from typing import NamedTuple

import pytest
import torch
from scan_cases import MISSING, NEEDS_NATIVE
from scan_problems import Case, assert_same_values, make_problem
from tolerances import EXACT
from torch import Tensor, nn

from hf_skiprnn.model.dense_scan_skip_rnn import dense_scan
from hf_skiprnn.model.event_scan_skip_rnn import event_scan
from hf_skiprnn.model.outputs_skip_rnn import ScanOutput


class GateWeights(NamedTuple):
    """The class of that version, from the checkpoint's cells_skip_rnn.py."""

    weight: Tensor
    bias: Tensor


def scan_of_the_checkpoint(backend: str, inputs: Tensor, table: Tensor | None, *operands: object) -> ScanOutput:
    """What layers_skip_rnn.py of that version did with the two functions."""
    from hf_skiprnn.kernels import of_tokens, select

    scan = select(backend, inputs, 200) or event_scan
    tokens_scan = of_tokens(scan) if table is not None and scan not in (dense_scan, event_scan) else None
    if tokens_scan is not None:
        return tokens_scan(inputs, table, *operands, cell="lstm", sequence=True)
    if table is not None:
        inputs = nn.functional.embedding(inputs, table)
    return scan(inputs, *operands, cell="lstm", sequence=True)


@NEEDS_NATIVE  # plain PyTorch comes from the checkpoint itself
@pytest.mark.parametrize("backend", ["auto", "cpu"])
@pytest.mark.parametrize("text", [False, True])
def test_they_run_the_engine(backend: str, text: bool) -> None:
    problem = make_problem(Case(sequence=True))
    ids, table = torch.randint(0, 9, (4, 23)), torch.randn(9, 3, dtype=torch.float64)
    if text:
        problem.inputs = table[ids]
    want = problem.run(dense_scan)
    operands = (problem.layers, GateWeights(*problem.gate[:2]), problem.state)
    with torch.no_grad():
        got = scan_of_the_checkpoint(backend, *((ids, table) if text else (problem.inputs, None)), *operands)
    assert_same_values(got, want, EXACT.values)


def test_they_name_the_scans() -> None:
    from hf_skiprnn.kernels import choose_engine, of_tokens, select

    inputs = torch.zeros(2, 3, 1)
    assert select("auto", inputs.to("meta"), 100) is None
    assert of_tokens(event_scan) is None
    if not MISSING:
        for backend in ("auto", "cpu"):
            engine = choose_engine(backend, inputs, 100)
            assert select(backend, inputs, 100) is engine.scan
            assert of_tokens(engine.scan) is engine.scan_tokens
