"""`make gpu` from end to end where there is no GPU, in miniature: every line of its scripts but for the processes.

    TRITON_INTERPRET=1 python tests/gpu_dry_run.py FOLDER        # PYTHONPATH: the checkout and its folder scripts

Triton interprets, "cuda" means the CPU, and torch.cuda is played: its clock runs, its graphs replay nothing. Shapes,
data and durations are tiny. Numbers go to the folder, and mean nothing.
"""

import contextlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


class OnTheCPU(TorchFunctionMode):
    """What is asked for on "cuda" comes on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def here(value: Any) -> Any:
            is_cuda = value == "cuda" if isinstance(value, str) else getattr(value, "type", None) == "cuda"
            return CPU if is_cuda else value

        return func(*map(here, args), **{name: here(value) for name, value in (kwargs or {}).items()})


class Event:
    def __init__(self, enable_timing: bool):
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, later: "Event") -> float:
        return 1e3 * (later.at - self.at)


def play_torch_cuda() -> None:
    stream = SimpleNamespace(wait_stream=lambda other: None)
    played = {
        "is_available": lambda: True,
        "get_device_name": lambda device=None: "no GPU",
        "get_device_capability": lambda device=None: (9, 0),
        "synchronize": lambda: None,
        "memory_allocated": lambda: 0,
        "max_memory_allocated": lambda: 3 << 20,
        "reset_peak_memory_stats": lambda: None,
        "empty_cache": lambda: None,
        "Event": Event,
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda entered: contextlib.nullcontext(),
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
        "graph": lambda graph: contextlib.nullcontext(),
    }
    for name, value in played.items():
        assert hasattr(torch.cuda, name), name
        setattr(torch.cuda, name, value)


def call(main: Callable[[], None], *arguments: str) -> int:
    sys.argv = ["script", *arguments]
    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    return 0


def main(folder: Path) -> None:
    import triton_interpreter  # noqa: F401 - speeds the interpreter up
    import triton_suite

    from hf_skiprnn.kernels.triton.operators import triton_scan
    from hf_skiprnn.model import layers_skip_rnn
    from hf_skiprnn.model.dense_scan_skip_rnn import Engine
    from hf_skiprnn.model.event_scan_skip_rnn import EVENTS
    from scripts.benchmarks import gpu as benchmark_gpu
    from scripts.benchmarks import gpu_targets as benchmark_gpu_targets
    from scripts.benchmarks.workload import Shape
    from scripts.gpu import check as gpu
    from scripts.gpu import train_mnist as gpu_training

    play_torch_cuda()

    def select_engine(backend: str, inputs: torch.Tensor, num_weights: int) -> Engine:
        return EVENTS if backend == "events" else Engine("triton", triton_scan)

    layers_skip_rnn.select_engine = select_engine
    tiny, stack = Shape(2, 4, 1, 3), Shape(1, 3, 17, 3, 2, True)
    benchmark_gpu.PARTS = {
        name: part._replace(shapes=[tiny], rates=(0.5,), precisions=("tf32",), cells=("lstm",))
        for name, part in benchmark_gpu.PARTS.items()
    }
    benchmark_gpu.PARTS["all"] = benchmark_gpu.Part([tiny, stack], (0.5,), ("gru",), ("bfloat16",))
    benchmark_gpu_targets.TARGETS = [benchmark_gpu_targets.Target(*tiny[:4], rate, 0.0) for rate in (0.5, 0.25)]

    def fails(workload: Any) -> None:
        raise RuntimeError("This peer fails.\nWhy it does is no matter here.")

    benchmark_gpu.PEERS["masked_loop_compiled"] = fails
    benchmark_gpu.ROOT = gpu_training.ROOT = gpu.ROOT = folder
    gpu.OUTPUT = folder / "model_cards" / "speed"
    gpu.ALL, gpu.REACH, gpu.TRAINING = 3000.0, 1000.0, 1.0
    gpu_training.CONFIG |= {"hidden_size": 3}
    gpu_training.BATCH, gpu_training.HELD_OUT = 2, 2
    mains = {
        "tests/triton_suite.py": lambda: sys.exit(triton_suite.main()),
        "scripts/benchmark.py": lambda: benchmark_gpu.main(sys.argv[2:]),
        "scripts/gpu_training.py": gpu_training.main,
    }

    def run(name: str, limit: float, script: str, *arguments: str, more: bool = False) -> int:
        assert limit > 0
        print(f"== {name}: {script} {' '.join(arguments)} ==", flush=True)
        few = ("uneven rows",) if name == "suite" else ("--seconds", "0") if "benchmark" in name else ()
        return call(mains[script], *few, *arguments)

    gpu.run = run
    data = folder / "mnist.npz"
    draw = np.random.default_rng(0)
    arrays = {
        f"{split}_{what}": draw.integers(0, 10, (size, 5) if what == "images" else size, dtype=np.uint8)
        for split, size in (("train", 6), ("test", 3))
        for what in ("images", "labels")
    }
    np.savez(data, **arrays)
    with OnTheCPU():
        status = call(gpu.main, str(data))
        print("again")
        call(lambda: benchmark_gpu.main(sys.argv[1:]), "--resume")
    print(f"exit status {status}")


if __name__ == "__main__":
    os.environ["HF_SKIPRNN_AUTOTUNE"] = "0"
    main(Path(sys.argv[1]))
