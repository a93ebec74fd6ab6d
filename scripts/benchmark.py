"""Run a benchmark in a new process in which all libraries use the same vector instruction set.

    python scripts/benchmark.py                          # cpu, with the widest instruction set of this machine
    python scripts/benchmark.py cpu --isa avx2           # our engine and PyTorch use at most AVX2
    python scripts/benchmark.py memory                   # peak memory of a training step
    python scripts/benchmark.py streaming                # a step of a stream, and exported graphs
    python scripts/benchmark.py training --task digits   # rows per second of train.py, and where the time goes
    python scripts/benchmark.py pipelines                # rows per second of pipelines and of Trainer.predict
    python scripts/benchmark.py gpu --parts reach        # against cuDNN
    python scripts/benchmark.py cpu --help               # the benchmark's own options

The libraries read their environment variables once, when they load. So each benchmark runs in its own process.
"""

import os
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path

BENCHMARKS = ("cpu", "memory", "streaming", "training", "pipelines", "gpu")
ISA = "HF_SKIPRNN_CPU_ISA"  # the variable of our engine
# The names of the sets in oneDNN, MKL and ATen. With AVX-512 all may use everything that the machine has, including its
# bfloat16 and matrix instructions (AMX).
PEERS = {
    "portable": {"ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "ATEN_CPU_CAPABILITY": "default"},
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
    "avx512": {},
}


def widest() -> str:
    """Return the set with AVX-512 that this machine runs, for our engine."""
    from hf_skiprnn.kernels.cpu import library  # imports torch

    return "amx" if library.instruction_set() == "amx" else "avx512"


def environment(isa: str | None) -> dict[str, str]:
    """Return this process's environment with every library limited to `isa`; None: to the machine's widest set."""
    variables = {name: value for name, value in os.environ.items() if name not in (ISA, *PEERS["avx2"])}
    if isa is not None:
        variables |= {ISA: isa if PEERS[isa] else widest(), **PEERS[isa]}
    root = str(Path(__file__).resolve().parents[1])
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return {"OMP_NUM_THREADS": "1"} | variables  # workloads with more threads set their own number


def main(arguments: list[str]) -> int:
    """Run the benchmark named by the first argument, and pass it the other arguments; return its exit status."""
    name, rest = (arguments[0], arguments[1:]) if arguments[:1] and arguments[0] in BENCHMARKS else ("cpu", arguments)
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--isa", choices=list(PEERS))
    options, rest = parser.parse_known_args(rest)
    command = [sys.executable, "-m", f"scripts.benchmarks.{name}", *rest]
    return subprocess.run(command, env=environment(options.isa), check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
