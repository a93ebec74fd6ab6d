"""`make gpu` from end to end where there is no GPU, in miniature: every line of its scripts but for the processes.

    TRITON_INTERPRET=1 python tests/triton/gpu_dry_run.py FOLDER        # PYTHONPATH: the checkout, its tests/scans

Triton interprets, "cuda" means the CPU, and torch.cuda is played: its clock runs, its graphs replay nothing. Shapes,
data and durations are tiny. Numbers go to the folder, and mean nothing.
Packages that a GPU machine may lack are hidden.
"""

import contextlib
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
HIDDEN = ("accelerate", "datasets", "matplotlib", "PIL", "psutil", "pytest", "sklearn")


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
    from scripts.benchmarks import gpu_targets
    from scripts.benchmarks.workload import Shape
    from scripts.gpu import check, cuda_path, train_mnist

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
    gpu_targets.TARGETS = [gpu_targets.Target(*tiny[:4], rate, 0.0) for rate in (0.5, 0.25)]

    def fails(workload: Any) -> None:
        raise RuntimeError("This peer fails.\nWhy it does is no matter here.")

    benchmark_gpu.PEERS["masked_loop_compiled"] = fails
    check.ROOT = benchmark_gpu.ROOT = train_mnist.ROOT = folder
    check.OUTPUT = folder / "model_cards" / "speed"
    check.ALL, check.REACH, check.TRAINING = 3000.0, 1000.0, 1.0
    train_mnist.CONFIG |= {"hidden_size": 3}
    train_mnist.BATCH, train_mnist.HELD_OUT = 2, 2
    mains = {
        "tests/triton/triton_suite.py": lambda: sys.exit(triton_suite.main()),
        "scripts.benchmarks.gpu": lambda: benchmark_gpu.main(sys.argv[1:]),
        "scripts.gpu.cuda_path": cuda_path.main,
        "scripts.gpu.train_mnist": train_mnist.main,
    }
    few = {
        "suite": ("ties",),
        "cuda_path": ("--device", "cpu", "--only", "autocast", "trainer"),
        "training": (),
        "report": (),
    }

    def run(name: str, limit: float, *command: str, more: bool = False) -> int:
        assert limit > 0
        print(f"== {name}: {' '.join(command)} ==", flush=True)
        module, *arguments = [part for part in command if part != "-m"]
        return call(mains[module], *few.get(name, ("--seconds", "0")), *arguments)

    check.run = run
    data = folder / "mnist.npz"
    draw = np.random.default_rng(0)
    arrays = {
        f"{split}_{what}": draw.integers(0, 10, (size, 5) if what == "images" else size, dtype=np.uint8)
        for split, size in (("train", 6), ("test", 3))
        for what in ("images", "labels")
    }
    np.savez(data, **arrays)
    with OnTheCPU():
        status = call(check.main, str(data))
        print("again")
        call(lambda: benchmark_gpu.main(sys.argv[1:]), "--resume")
    print(f"exit status {status}")


if __name__ == "__main__":
    for name in HIDDEN:
        sys.modules[name] = None  # type: ignore[assignment] - what Python does with a module that cannot be found
    main(Path(sys.argv[1]))
