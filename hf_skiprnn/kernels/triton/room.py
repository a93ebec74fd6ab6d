"""Room for what training keeps of every update: how many a row has is known only when the scan has run.

So a scan gets as many slots a row as rows of the same gate took lately, and some more; its records are rings. How many
were needed is copied to the host behind the scan, while the host goes on. The backward pass waits for that number,
before its own scan starts; where the slots were too few it scans once more, with enough. What it keeps of updates has
room for those of the row with most of them, chunk of time by chunk of time.
"""

import math
import threading
import weakref

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

CHUNK_NUMBERS = 1 << 25  # in a chunk's buffers, if every step is an update: 128 MiB of float32
SHORTEST_CHUNK = 16  # steps
SLACK = 9 / 8  # a scan that is run again costs more than this
SIZES = 32  # of records of one length: few, so that the allocator finds them again
FORGETS = 1 / 4  # of what was needed more than now, a call

_shares = WeakTensorKeyDictionary()  # of a gate: updates of the row with most of them, in all steps
_lock = threading.Lock()


def chunk_steps(batch: int, steps: int, width: int, units: int, layers: int) -> int:
    """Steps a chunk of the backward pass, by its memory: of a layer 16 numbers a unit, and 8 for the products at hand.

    It has no slots in it, nor has any other order of additions: gradients do not depend on what was expected.
    """
    numbers = max(1, batch) * (units * (16 * layers + 8) + width)
    return max(1, min(steps, max(SHORTEST_CHUNK, CHUNK_NUMBERS // numbers)))


def expected_slots(gate: Tensor, steps: int) -> int:
    """Slots a row for its initial state and its updates in T steps: T + 1 where nothing is known of this gate."""
    with _lock:
        share = _shares.get(gate)
    if share is None or not steps:
        return steps + 1
    size = math.ceil(steps / SIZES)
    return min(steps, size * max(1, math.ceil(SLACK * share * steps / size))) + 1


def remember(gate: Tensor, most: int, steps: int) -> None:
    """That a row of this gate had that many updates in T steps."""
    share = most / steps
    with _lock:
        before = _shares.get(gate, share)
        _shares[gate] = max(share, before + FORGETS * (share - before))


class Needs:
    """How many updates rows had, on the way to the host."""

    def __init__(self, gates: Tensor, chunk: int, gate: Tensor) -> None:
        """Of gates [B, T], B and T at least 1, in chunks of that many steps; `gate` stands for what learns from it."""
        self.steps, self.gate = gates.shape[1], weakref.ref(gate)
        padded = F.pad(gates, (0, -self.steps % chunk)).unflatten(1, (-1, chunk))
        of_chunks = padded.sum(2)  # [B, chunks]
        found = torch.cat((of_chunks.amax(0), of_chunks.sum(1).amax(0, keepdim=True))).int()
        self.arrived: torch.cuda.Event | None = None
        self.found = found
        if found.is_cuda:
            self.found = torch.empty(found.shape, dtype=found.dtype, pin_memory=True)
            self.found.copy_(found, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record(torch.cuda.current_stream(found.device))

    def read(self) -> tuple[list[int], int]:
        """Of the row with most updates: chunk by chunk, and in all. Waits for the scan."""
        if self.arrived is not None:
            self.arrived.synchronize()
        *of_chunks, most = self.found.tolist()
        gate = self.gate()
        if gate is not None:
            remember(gate, most, self.steps)
        return of_chunks, most


def keeps_records_to_itself() -> bool:
    """Whether no one else counts on the size of what is saved for the backward pass, as activation checkpointing does.

    It computes a forward pass again and demands tensors of the same shapes.
    """
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is None
