"""The Triton engine without a GPU: its suite interpreted, every kernel compiled, and who gets it."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scan_problems import Case, Problem, make_problem
from survival.ledger import SCALE

from hf_skiprnn import SkipLSTM
from hf_skiprnn.kernels import choose_engine
from hf_skiprnn.kernels.triton import operators
from hf_skiprnn.model.cells_skip_rnn import LayerWeights

pytest.importorskip("triton", reason="Triton exists for Linux on x86-64 and aarch64")

HERE = Path(__file__).parent


def run_suite(**environment: str) -> None:
    """In a process of its own: Triton decides at import whether it interprets."""
    path = os.pathsep.join([str(HERE.parent / "scans"), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, HERE / "triton_suite.py"],
        check=False,
        env=os.environ | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
        timeout=900 * SCALE,
    )
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-3000:]}"


def test_the_suite_passes_interpreted() -> None:
    run_suite(TRITON_INTERPRET="1")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_suite_passes_on_a_gpu() -> None:
    run_suite()


@pytest.fixture(autouse=True, params=["tf32"])
def precision(request: pytest.FixtureRequest) -> Iterator[None]:
    """Products of float32 compile for tensor cores ("tf32") or exactly ("ieee", torch's default)."""
    torch.backends.cuda.matmul.allow_tf32 = request.param == "tf32"
    yield
    torch.backends.cuda.matmul.allow_tf32 = False


def in_precision(problem: Problem, dtype: torch.dtype) -> Problem:
    problem = problem.to(torch.promote_types(dtype, torch.float32))
    problem.inputs = problem.inputs.detach().to(dtype).requires_grad_()
    problem.layers = [
        LayerWeights(*(None if part is None else part.detach().to(dtype).requires_grad_() for part in w))
        for w in problem.layers
    ]
    return problem


def compiled(case: Case, dtype: torch.dtype, *targets: int, **options: Any) -> dict[str, Any]:
    """Every kernel of a training step, compiled."""
    from triton_compiling import compiling

    problem = in_precision(make_problem(case), dtype)
    with compiling(*targets, **options) as kernels:
        out = problem.run(operators.triton_scan)
        parts = [out.state.h, out.num_updates, *([] if out.sequence is None else [out.sequence])]
        torch.autograd.backward([part.sum() for part in parts if part.requires_grad])
    return kernels


@pytest.mark.parametrize(
    ("case", "dtype", "resident"),
    [
        (Case(hidden=32, inputs=1), torch.bfloat16, True),
        (Case(hidden=32, cell="gru", mask="ragged", sequence=True), torch.float16, True),
        (Case(hidden=20, cell="gru_reset_after", gate="planned"), torch.float64, True),
        (Case(hidden=40, layers=2, mask="ragged", sequence=True, inputs=20), torch.float32, False),
        (Case(hidden=200, cell="gru", batch=20, gate="forced"), torch.bfloat16, False),
        (Case(hidden=260, cell="gru_reset_after", batch=20, sequence=True), torch.float16, False),
    ],
    ids=str,
)
def test_every_kernel_compiles_for_gpus_that_are_not_here(case: Case, dtype: torch.dtype, resident: bool) -> None:
    kernels = compiled(case, dtype, 80, 90, resident=resident)
    path = "resident" if resident else "streamed"
    found = {name.split(" ")[0] for name in kernels}
    assert found - {"segments"} == {f"{path}_forward", f"{path}_backward"}
    for name, kernel in kernels.items():
        assert kernel.metadata.shared <= 160 << 10, name  # an A100's multiprocessor has 164 KiB
        assert len(kernel.asm["cubin"]) > 1000


@pytest.mark.parametrize("precision", ["ieee"], indirect=True)
@pytest.mark.parametrize(
    "case",
    [Case(hidden=16, inputs=3, batch=5), Case(hidden=64, inputs=1, batch=256), Case(hidden=64, inputs=20, cell="gru")],
    ids=str,
)
def test_exact_products_compile(case: Case) -> None:
    """The LLVM of Triton 3.9 aborted the whole process here."""
    compiled(case, torch.float32, 80, 90, 100)


LARGE = [
    (Case(hidden=110, inputs=1, batch=256, steps=2), torch.bfloat16),
    (Case(hidden=512, inputs=20, batch=64, steps=2), torch.bfloat16),
    (Case(hidden=128, inputs=1, batch=256, steps=2), torch.float32),
    (Case(hidden=512, inputs=20, batch=64, steps=2), torch.float32),
    (Case(hidden=768, inputs=20, batch=16, cell="gru", steps=2), torch.bfloat16),
    (Case(hidden=64, inputs=1, batch=1, steps=2), torch.float32),
]


@pytest.mark.parametrize(("case", "dtype"), LARGE if SCALE > 1 else LARGE[:2], ids=str)
def test_kernels_of_the_benchmark_fit_a_gpu(case: Case, dtype: torch.dtype, tmp_path: Path) -> None:
    """Each candidate of the tuner takes no more than a multiprocessor has (`make fuzz`; else the first one)."""
    from triton_compiling import usage

    targets, configs = ((80, 90), range(4)) if SCALE > 1 else ((90,), (0,))
    for name, kernel in compiled(case, dtype, *targets, configs=configs).items():
        registers, spilled, shared = usage(kernel, tmp_path)
        assert registers * 32 * kernel.metadata.num_warps <= 65536, name
        assert shared <= 160 << 10, name  # an A100's multiprocessor has 164 KiB
        assert spilled <= 400, name  # bytes a thread: they stay in the first-level cache


def test_what_is_cut_how() -> None:
    """Sizes of the benchmark, on an H100's 132 multiprocessors."""
    from hf_skiprnn.kernels.triton.tiling import tiling

    assert tiling(256, 110, 4, 1, torch.bfloat16, 132)[:2] == (True, 2)  # weights stay on chip, all processors busy
    assert tiling(1, 64, 4, 1, torch.float32, 132).resident
    assert not tiling(256, 128, 4, 1, torch.float32, 132).resident  # 256 KiB
    assert tiling(100_000, 512, 4, 1, torch.bfloat16, 132).split == 1
    for units, dtype in ((128, torch.float32), (512, torch.bfloat16), (768, torch.float32), (777, torch.float32)):
        for batch in (1, 2, 16, 17, 64, 256, 300, 2000, 5000):
            cut = tiling(batch, units, 4, 1, dtype, 132)
            assert cut.split == 1 or -(-batch // cut.rows) * cut.split <= 132  # they wait for each other: all must run


TUNED = {
    "resident_forward": (["gates"], []),
    "streamed_forward": (["gates", "arrived"], []),
    "resident_backward": ([], ["carry", "clock"]),
    "streamed_backward": (["arrived"], ["carry", "clock"]),
}


def test_trials_of_the_tuner_leave_nothing_behind() -> None:
    """What a kernel only writes in part is zero before each launch, and what it reads and writes is as it was."""
    from hf_skiprnn.kernels.triton import kernels_backward, kernels_forward

    for module in (kernels_forward, kernels_backward):
        for name in TUNED.keys() & vars(module).keys():
            kernel = getattr(module, name)
            assert kernel.keys == ["FORM"]
            assert (kernel.reset_to_zero, kernel.restore_value) == TUNED[name]


def test_a_kernel_is_timed_once_for_every_form(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Triton's tuner, with a driver and times that are made up: which candidates run, also in the next process."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import autotuner, jit

    from hf_skiprnn.kernels.triton import forward_pass

    ran: list[int] = []

    def run(*args: Any, num_warps: int, **options: Any) -> None:
        gates = args[4]
        assert not gates.any()
        gates += 1
        ran.append(num_warps)

    def bench(call: Any, quantiles: Any) -> list[float]:
        call()
        return [1.0 if ran[-1] == 16 else 2.0] * 3

    active = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_active_torch_device=lambda: torch.device("cpu"),
    )
    kernel: Any = forward_pass.resident_forward
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(autotuner, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(jit, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(forward_pass, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(kernel.fn, "run", run)
    monkeypatch.setattr(kernel, "_do_bench", bench)
    monkeypatch.setattr(kernel, "cache", {})
    for expected, units in (([8, 16, 16], 7), ([16], 7), ([8, 16, 16], 9)):
        ran.clear()
        with torch.no_grad():
            make_problem(Case(hidden=units)).run(operators.triton_scan)
        assert ran == expected
    ran.clear()
    monkeypatch.setattr(kernel, "cache", {})  # as in a new process, which reads the choice from the disk
    with torch.no_grad():
        make_problem(Case(hidden=9)).run(operators.triton_scan)
    assert ran == [16]


def test_the_engine_says_why_it_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match=r"needs inputs on a CUDA GPU; they are on cpu\. Use 'events'"):
        choose_engine("triton", torch.zeros(1, 1, 1), 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "There is no CUDA GPU here" in str(operators.unavailable_reason())
    monkeypatch.setattr(operators, "find_spec", lambda name: None)
    assert "pip install triton" in str(operators.unavailable_reason())


def test_old_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert "Tesla T4 has compute capability 7.5" in str(operators.unavailable_reason())


def test_it_says_once_that_no_gpu_has_run_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton_compiling import compiling

    said: list[str] = []
    monkeypatch.setattr(operators.logger, "warning_once", said.append)
    with compiling():
        make_problem(Case(steps=2)).run(operators.triton_scan)
    assert said == [operators.UNTESTED]


def test_layers_ask_for_it_by_name() -> None:
    layer = SkipLSTM(2, 4)
    layer.set_scan_backend("triton")
    with pytest.raises(RuntimeError, match="needs inputs on a CUDA GPU"):
        layer(torch.zeros(3, 1, 2))
