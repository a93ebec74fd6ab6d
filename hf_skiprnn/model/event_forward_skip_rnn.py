"""The forward pass of the event scan: it computes only updates, each row at its own position.

An event is the state after an update. It holds until the row's next update. The first B events are the initial states
of the rows. Round r computes the r-th update of every row that has one, so the number of rounds is the largest number
of updates of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cells_skip_rnn import Cell, GateWeights, LayerWeights, increment_of, product, steps_to_update
from .outputs_skip_rnn import SkipRNNState


def update(
    x: Tensor, h: list[Tensor], c: list[Tensor], layers: Sequence[LayerWeights], gate: GateWeights | None, cell: Cell
) -> Tensor | None:
    """Update N rows from inputs [N, I]: replace h and c ([N, H] for each layer) in their lists.

    Returns:
        The new increments [N]; None without a learned gate.
    """
    for index, w in enumerate(layers):
        old_h, old_c = h[index], c[index] if c else None
        step = cell.step(w, product(x, w.weight_ih, w.bias), cell.recurrent_product(w, old_h), old_h, old_c)
        x = h[index] = step.h
        if step.c is not None:
            c[index] = step.c
    return None if gate is None else increment_of(gate, c[-1] if c else h[-1])


class Timeline:
    """Finds each row's next update. Its indices count real steps only, so that other code need not know of masks."""

    def __init__(self, batch: int, steps: int, mask: Tensor | None, forced_gates: Tensor | None, device: torch.device):
        self.batch, self.steps, self.mask = batch, steps, mask
        self.positions: Tensor | None = None  # [B, T]: positions of the real steps, in order; None: all are real
        self.lengths = torch.full((batch,), steps, device=device)
        if mask is not None:
            self.positions = torch.argsort((~mask).byte(), dim=1, stable=True)
            self.lengths = mask.sum(1)
        self.planned: Tensor | None = None  # [B, T + 1]: for each real step, the first forced update from it on
        if forced_gates is not None:
            self.planned = self._plan(
                forced_gates if self.positions is None else forced_gates.gather(1, self.positions)
            )

    def _plan(self, gates: Tensor) -> Tensor:
        never = torch.full((self.batch, 1), self.steps, device=gates.device)
        index = torch.arange(self.steps, device=gates.device).where(gates, self.steps)
        index = index.where(index < self.lengths.unsqueeze(1), self.steps)
        return torch.cat((index, never), 1).flip(1).cummin(1).values.flip(1)

    def flat_position(self, rows: Tensor, real_index: Tensor) -> Tensor:
        """Return the index into [B * T] of one real step of each row in `rows`."""
        if self.positions is not None:
            real_index = self.positions[rows, real_index]
        return rows * self.steps + real_index

    def next_update(self, front: "Front", learned: bool) -> Tensor:
        """Return the real index of each row's next update; at least the row's length if there is none."""
        if self.planned is not None:
            return self.planned[front.rows, front.ran]
        if not learned:
            return front.ran
        return front.ran + steps_to_update(front.increment, front.steps_since_update, front.length - front.ran) - 1


class Events(NamedTuple):
    """All E = B + N events of a forward pass: first B initial states, then N updates, round by round."""

    h: tuple[Tensor, ...]  # [E, H] for each layer
    c: tuple[Tensor, ...]  # [E, H] for each layer; empty for a GRU
    increments: Tensor  # [E]
    rows: Tensor  # [E]
    flat: Tensor  # [N], position of the update in [B * T]
    previous: Tensor  # [N], the row's event before the update
    steps_since_update: Tensor  # [N], k at the update
    offsets: tuple[int, ...]  # first event of every round, and E

    def holders(self, batch: int, steps: int) -> Tensor:
        """Return the event whose state holds at each step: [B, T]."""
        held = self.rows[:batch].unsqueeze(1).repeat(1, steps)
        held.view(-1)[self.flat] = torch.arange(batch, len(self.rows), device=held.device)
        return held.cummax(1).values


@dataclass
class Recorder:
    """Collects the events of a forward pass, round by round."""

    rounds: list[tuple[Any, ...]] = field(default_factory=list)
    flat: list[Tensor] = field(default_factory=list)
    steps_since_update: list[Tensor] = field(default_factory=list)

    def add(self, front: "Front") -> None:
        self.rounds.append((tuple(front.h), tuple(front.c), front.increment, front.rows))

    def events(self) -> Events:
        h, c, increments, rows = zip(*self.rounds, strict=True)
        all_rows = torch.cat(rows)
        offsets = [0]
        for part in rows:
            offsets.append(offsets[-1] + len(part))
        latest, previous = torch.arange(offsets[1], device=all_rows.device), []
        for part, first in zip(rows[1:], offsets[1:-1], strict=True):
            previous.append(latest[part])
            latest[part] = torch.arange(first, first + len(part), device=all_rows.device)
        empty = all_rows.new_zeros(0)
        return Events(
            tuple(torch.cat(layer) for layer in zip(*h, strict=True)),
            tuple(torch.cat(layer) for layer in zip(*c, strict=True)),
            torch.cat(increments),
            all_rows,
            torch.cat([empty, *self.flat]),
            torch.cat([empty, *previous]),
            torch.cat([increments[0][:0], *self.steps_since_update]),
            tuple(offsets),
        )


@dataclass
class Front:
    """The A rows (of B) that still have updates ahead."""

    rows: Tensor  # [A]
    at: Tensor  # [A], real index of the next update
    length: Tensor  # [A], real steps
    ran: Tensor  # [A], number of real steps up to the last update, which is included
    increment: Tensor  # [A]
    steps_since_update: Tensor  # [A], k after `ran` steps
    h: list[Tensor]  # [A, H] for each layer
    c: list[Tensor]

    def select(self, index: Tensor) -> "Front":
        """Return the front with only the rows `index`."""
        return Front(
            self.rows[index],
            self.at[index],
            self.length[index],
            self.ran[index],
            self.increment[index],
            self.steps_since_update[index],
            [part[index] for part in self.h],
            [part[index] for part in self.c],
        )

    def advance(self, x: Tensor, layers: Sequence[LayerWeights], gate: GateWeights | None, cell: Cell) -> None:
        """Update every row from its input [A, I]."""
        increment = update(x, self.h, self.c, layers, gate and gate.of_rows(self.rows), cell)
        self.increment = torch.zeros_like(self.increment) if increment is None else increment
        self.steps_since_update = torch.zeros_like(self.increment)
        self.ran = self.at + 1


def run_updates(
    inputs: Tensor,
    layers: Sequence[LayerWeights],
    gate: GateWeights | None,
    state: SkipRNNState,
    cell: Cell,
    time: Timeline,
    recorder: Recorder | None = None,
) -> tuple[SkipRNNState, Tensor]:
    """Compute all updates of all rows. The recorder, if given, collects the events.

    Returns:
        The state after the last real step, and the gates [B, T].
    """
    flat_inputs = inputs.reshape(-1, inputs.shape[-1])
    gates = state.increment.new_zeros(time.batch * time.steps)
    h0, c0, increment, steps_since_update = state
    last = state.map(Tensor.clone)
    start, rows = torch.zeros_like(time.lengths), torch.arange(time.batch, device=inputs.device)
    layers_h, layers_c = list(h0.unbind()), [] if c0 is None else list(c0.unbind())
    front = Front(rows, start, time.lengths, start, increment, steps_since_update, layers_h, layers_c)
    if recorder:
        recorder.add(front)
    while len(front.rows):
        front.at = time.next_update(front, gate is not None)
        alive = front.at < front.length
        if not bool(alive.all()):
            _settle(front.select((~alive).nonzero().squeeze(1)), last)
            front = front.select(alive.nonzero().squeeze(1))
            if not len(front.rows):
                break
        flat = time.flat_position(front.rows, front.at)
        if recorder:
            recorder.flat.append(flat)
            recorder.steps_since_update.append(front.steps_since_update + (front.at + 1 - front.ran))
        front.advance(flat_inputs.index_select(0, flat), layers, gate, cell)
        gates[flat] = 1
        if recorder:
            recorder.add(front)
    return last, gates.view(time.batch, time.steps)


def _settle(done: Front, last: SkipRNNState) -> None:
    """Write the states of rows that have no further updates into the last state."""
    last.h[:, done.rows] = torch.stack(done.h)
    if last.c is not None:
        last.c[:, done.rows] = torch.stack(done.c)
    last.increment[done.rows] = done.increment
    last.steps_since_update[done.rows] = done.steps_since_update + (done.length - done.ran)
