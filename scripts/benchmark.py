"""Run a benchmark in a fresh process: by name, with all libraries held to one instruction set.

    python scripts/benchmark.py                          # cpu, with the widest instruction set of this machine
    python scripts/benchmark.py cpu --isa avx2           # ours and PyTorch held to AVX2
    python scripts/benchmark.py memory                   # peak memory of a training step
    python scripts/benchmark.py streaming                # a step of a stream, and exported graphs
    python scripts/benchmark.py gpu --parts reach        # against cuDNN
    python scripts/benchmark.py cpu --help               # the benchmark's own options

Libraries read these variables once, when they load; so each benchmark starts in a process of its own.
"""

import os
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path

BENCHMARKS = ("cpu", "memory", "streaming", "gpu")
ISA = "HF_SKIPRNN_CPU_ISA"  # our engine
# oneDNN's, MKL's and ATen's own names of the sets. AVX-512 is the widest that we build for, so there the peers may use
# all that the machine has, its bfloat16 and matrix instructions too.
PEERS = {
    "portable": {"ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "ATEN_CPU_CAPABILITY": "default"},
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
    "avx512": {},
}


def environment(isa: str | None) -> dict[str, str]:
    """Return this process's environment with every library held to `isa`; None: to what the machine has."""
    variables = {name: value for name, value in os.environ.items() if name not in (ISA, *PEERS["avx2"])}
    if isa is not None:
        variables |= {ISA: isa, **PEERS[isa]}
    root = str(Path(__file__).resolve().parents[1])
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return {"OMP_NUM_THREADS": "1"} | variables  # a workload of more threads sets its own number


def main(arguments: list[str]) -> int:
    """Run the benchmark that the first argument names, with the rest; return its exit status."""
    name, rest = (arguments[0], arguments[1:]) if arguments[:1] and arguments[0] in BENCHMARKS else ("cpu", arguments)
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--isa", choices=list(PEERS))
    options, rest = parser.parse_known_args(rest)
    command = [sys.executable, "-m", f"scripts.benchmarks.{name}", *rest]
    return subprocess.run(command, env=environment(options.isa), check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
