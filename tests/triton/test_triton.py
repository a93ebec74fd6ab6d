"""The Triton engine without a GPU: its suite interpreted, every kernel compiled, and who gets it."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scan_problems import Case, Problem, make_problem

from hf_skiprnn import SkipLSTM
from hf_skiprnn.kernels import choose_engine
from hf_skiprnn.kernels.triton import operators as triton_scan
from hf_skiprnn.model.cells_skip_rnn import CELLS, LayerWeights

pytest.importorskip("triton", reason="Triton exists for Linux on x86-64 and aarch64")


def test_the_suite_passes_interpreted() -> None:
    """In a process of its own: Triton decides at import whether it interprets."""
    suite = Path(__file__).with_name("triton_suite.py")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, suite], check=False, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-3000:]}"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_suite_passes_on_a_gpu() -> None:
    suite = Path(__file__).with_name("triton_suite.py")
    done = subprocess.run([sys.executable, suite], check=False, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-3000:]}"


def in_precision(problem: Problem, dtype: torch.dtype) -> Problem:
    problem = problem.to(torch.promote_types(dtype, torch.float32))
    problem.inputs = problem.inputs.detach().to(dtype).requires_grad_()
    problem.layers = [
        LayerWeights(*(None if part is None else part.detach().to(dtype).requires_grad_() for part in w))
        for w in problem.layers
    ]
    return problem


@pytest.mark.parametrize(
    ("case", "dtype", "resident"),
    [
        (Case(hidden=32, inputs=1), torch.bfloat16, True),
        (Case(hidden=32, cell="gru", mask="ragged", sequence=True), torch.float16, True),
        (Case(hidden=20, cell="gru_reset_after", gate="planned"), torch.float32, True),
        (Case(hidden=40, layers=2, mask="ragged", sequence=True, inputs=20), torch.float32, False),
        (Case(hidden=200, cell="gru", batch=20, gate="forced"), torch.bfloat16, False),
        (Case(hidden=260, cell="gru_reset_after", batch=20, sequence=True), torch.float16, False),
        (Case(hidden=17), torch.float64, True),
    ],
    ids=str,
)
def test_every_kernel_compiles_for_gpus_that_are_not_here(case: Case, dtype: torch.dtype, resident: bool) -> None:
    from triton_compiling import compiling

    problem = in_precision(make_problem(case), dtype)
    with compiling(80, 90, resident=resident) as compiled:
        out = problem.run(triton_scan.triton_scan)
        parts = [out.state.h, out.num_updates, *([] if out.sequence is None else [out.sequence])]
        torch.autograd.backward([part.sum() for part in parts if part.requires_grad])
    path = "resident" if resident else "streamed"
    names = {name.split(" ")[0] for name in compiled}
    assert {f"{path}_forward", f"{path}_backward", "transition"} <= names
    for name, kernel in compiled.items():
        assert kernel.metadata.shared <= 160 << 10, name  # an A100's multiprocessor has 164 KiB
        assert len(kernel.asm["cubin"]) > 1000


@pytest.fixture
def tf32() -> Iterator[None]:
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("choice", range(4))
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (Case(hidden=110, inputs=1, batch=256), torch.bfloat16),
        (Case(hidden=128, inputs=1, batch=256), torch.float32),
        (Case(hidden=512, inputs=20, batch=64), torch.bfloat16),
        (Case(hidden=512, inputs=20, batch=64), torch.float32),
        (Case(hidden=768, inputs=20, batch=16, cell="gru"), torch.bfloat16),
        (Case(hidden=64, inputs=1, batch=1), torch.float32),
    ],
    ids=str,
)
def test_every_choice_of_the_tuner_fits_a_gpu(
    case: Case, dtype: torch.dtype, choice: int, tf32: None, tmp_path: Path
) -> None:
    """Sizes of the benchmark: each choice compiles, and takes no more than a multiprocessor has."""
    from triton_compiling import compiling, usage

    from hf_skiprnn.kernels.triton.tiling import choices

    if choice >= len(choices(case.hidden, CELLS[case.cell].num_gates, 1, dtype)):
        pytest.skip("there are fewer choices")
    problem = in_precision(make_problem(replace(case, steps=2)), dtype)
    with compiling(80, 90, choice=choice) as compiled:
        out = problem.run(triton_scan.triton_scan)
        torch.autograd.backward([out.state.h.sum(), out.num_updates.sum()])
    for name, kernel in compiled.items():
        registers, spilled, shared = usage(kernel, tmp_path)
        assert registers * 32 * kernel.metadata.num_warps <= 65536, name
        assert shared <= 160 << 10, name  # an A100's multiprocessor has 164 KiB
        assert spilled <= 400, name  # bytes a thread: they stay in the first-level cache


def test_what_is_cut_how() -> None:
    """Sizes of the issue, on an H100's 132 multiprocessors."""
    from hf_skiprnn.kernels.triton.tiling import tiling

    assert tiling(256, 110, 4, 1, torch.bfloat16, 132)[:2] == (True, 2)  # weights stay on chip, all processors busy
    assert tiling(1, 64, 4, 1, torch.float32, 132).resident
    assert not tiling(256, 128, 4, 1, torch.float32, 132).resident  # 256 KiB
    for batch, units, dtype in ((64, 512, torch.bfloat16), (16, 768, torch.float32), (256, 128, torch.float32)):
        cut = tiling(batch, units, 4, 1, dtype, 132)
        assert cut.split > 1
        assert cut.split * cut.block_units >= units
        assert -(-batch // cut.rows) * cut.split <= 132  # they wait for each other, so all must run at once
    assert tiling(100_000, 512, 4, 1, torch.bfloat16, 132).split == 1


def test_a_choice_has_neither_rows_nor_steps_in_it() -> None:
    """So one that was tuned serves every batch; programs that wait for each other fit the device at every batch."""
    from hf_skiprnn.kernels.triton.tiling import choices, tiling

    for units, dtype in ((64, torch.bfloat16), (128, torch.float32), (512, torch.bfloat16), (777, torch.float32)):
        for choice in choices(units, 4, 1, dtype):
            for batch in (1, 2, 16, 17, 64, 300, 2000, 5000):
                cut = tiling(batch, units, 4, 1, dtype, 132, choice)
                assert (cut.warps, cut.stages) == (choice.warps, choice.stages)
                assert cut.block_units >= choice.block_units
                assert cut.split == 1 or -(-batch // cut.rows) * cut.split <= 132


def test_the_engine_says_why_it_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match=r"needs inputs on a CUDA GPU; they are on cpu\. Use 'events'"):
        choose_engine("triton", torch.zeros(1, 1, 1), 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "There is no CUDA GPU here" in str(triton_scan.unavailable_reason())
    monkeypatch.setattr(triton_scan, "find_spec", lambda name: None)
    assert "pip install triton" in str(triton_scan.unavailable_reason())


def test_old_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert "Tesla T4 has compute capability 7.5" in str(triton_scan.unavailable_reason())


def test_layers_ask_for_it_by_name() -> None:
    layer = SkipLSTM(2, 4)
    layer.set_scan_backend("triton")
    with pytest.raises(RuntimeError, match="needs inputs on a CUDA GPU"):
        layer(torch.zeros(3, 1, 2))
