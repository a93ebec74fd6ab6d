"""The Triton engine's backward pass: chunks of time, latest first.

For every chunk, the transitions in large products (the states after the updates are kept): of all its steps where a
gate is learned, else of its updates; the sums over runs of skipped steps (triton_steps.py); then the sequential kernel
from update to update (triton_backward.py); then weight gradients in large products again. Buffers have room for the
updates of the chunk's row with most of them, as the caller knows it, or for all steps: nothing waits for the device.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from hf_skiprnn.model.cells_skip_rnn import CELLS, state_dtype

from .buffers import Optional
from .forward_pass import by_length, forward, stacked
from .kernels_backward import resident_backward, streamed_backward
from .kernels_skipped import segments, transition
from .room import chunk_steps
from .tiling import FUSED, INLINE_INPUTS, LANGUAGE, Choice, Tiling, multiprocessors, precision, tiling
from .tuning import choose, trial


@dataclass
class Clock:
    """Where the updates stand."""

    is_update: Tensor  # [B, T] bool
    ended: Tensor  # [B, T], updates up to and with each step
    since: Tensor  # [B, T], k of a real step
    kind: Tensor  # [B, T]: 0 skipped, 1 update, 2 masked

    @classmethod
    def of(cls, gates: Tensor, mask: Optional, since: Tensor) -> "Clock":
        """From the gates [B, T], the mask and the steps since the last update at the start [B]."""
        is_update = gates > 0.5
        ended = is_update.cumsum(1, dtype=torch.int32)
        real = torch.ones_like(is_update) if mask is None else mask
        index = real.cumsum(1, dtype=torch.int32)
        latest = (index * is_update).cummax(1).values if gates.shape[1] else index
        latest, before = (F.pad(part, (1, 0))[:, :-1] for part in (latest, ended))
        steps = index - latest + torch.where(before == 0, since.unsqueeze(1), 0)
        kind = is_update.int() + 2 * (~real).int()
        return cls(is_update, ended, steps.contiguous(), kind.contiguous())


@dataclass
class Chunk:
    """Steps first .. first + steps - 1, in which no row has more than `room` updates; V of a row's steps are visited.

    V is all its C steps where what a skipped step would do is asked for, else its U updates, `room` of them.
    """

    first: int
    steps: int
    room: int
    is_update: Tensor  # [B, C]
    base: Tensor  # [B], updates before
    updates: Tensor  # [B], in it
    slot: Tensor  # [B, C], the one before each step
    times: Tensor  # [B, U], of the updates, as steps of the sequence; any step where there are fewer
    filled: Tensor  # [B, U], where there is an update
    held_h: Tensor  # [L, B, U + 1, H], slot by slot
    held_c: Tensor  # likewise; held_h for a GRU

    @classmethod
    def of(cls, first: int, steps: int, room: int, clock: Clock, records: Sequence[Tensor]) -> "Chunk":
        """Of states [L, B, S, H] after every update, when they were [B, T], and their number [B]."""
        h, c, times, counts = records
        layers, batch, _, units = h.shape
        is_update = clock.is_update[:, first : first + steps].contiguous()
        ended = clock.ended[:, first : first + steps].long()
        base = ended[:, 0] - is_update[:, 0].long()
        updates = ended[:, -1] - base
        slots = torch.arange(room + 1, device=h.device)
        event = base.unsqueeze(1) + slots
        filled = slots[:-1] < updates.unsqueeze(1)
        when = times.gather(1, event[:, :-1].clamp(max=times.shape[1] - 1)).long().where(filled, first)
        event = event.minimum(counts.unsqueeze(1).long()).view(1, batch, room + 1, 1).expand(layers, -1, -1, units)
        held_h = h.gather(2, event)
        held_c = held_h if c.numel() == 0 else c.gather(2, event)
        slot = ended - is_update.long() - base.unsqueeze(1)
        return cls(first, steps, room, is_update, base, updates, slot, when, filled, held_h, held_c)

    def visits(self, every_step: bool) -> tuple[Tensor, Tensor]:
        """Of the visited steps: the state before, an index among B * (U + 1), and whether it is an update; [B * V]."""
        slot, is_update = (self.slot, self.is_update) if every_step else (self.filled.cumsum(1) - 1, self.filled)
        rows = torch.arange(len(slot), device=slot.device).unsqueeze(1) * (self.room + 1)
        return (rows + slot.clamp(min=0)).flatten(), is_update.flatten()

    def states_before(self, layer: int) -> Tensor:
        """A layer's h before each update: [B * U, H]."""
        return self.held_h[layer, :, :-1].flatten(0, 1)

    def states_after(self, states: Tensor, layer: int) -> Tensor:
        """A layer's held_h or held_c after each update, 0 where there is none: [B * U, H]."""
        return states[layer, :, 1:].masked_fill(~self.filled.unsqueeze(-1), 0).flatten(0, 1)


class Reverse:
    """One backward pass; `gradients` runs it. The choice is the tuned one, if none is given."""

    def __init__(
        self,
        inputs: Tensor,
        weights: Sequence[Tensor],
        gate: Sequence[Tensor],
        state: Sequence[Optional],
        mask: Optional,
        records: Sequence[Tensor],
        grads: Sequence[Optional],
        cell: str,
        grad_inputs: bool,
        rooms: Sequence[int] = (),
        choice: Choice | None = None,
    ) -> None:
        self.rooms = rooms
        self.inputs, self.weights, self.gate, self.cell, self.mask = inputs, weights, gate, cell, mask
        self.choice = choice
        self.gates, self.h, self.c, self.increments, self.times, self.counts = records
        (self.batch, self.steps, self.width), self.units = inputs.shape, weights[1].shape[1]
        self.layers, self.operand = len(weights) // 4, weights[1].dtype
        self.dtype, self.has_c = state_dtype(weights[1]), state[1] is not None
        outputs = CELLS[cell].num_gates * self.units
        upper = stacked(weights[4:], 0, outputs, self.units) if self.layers > 1 else weights[0]
        self.stacks = (upper, stacked(weights, 1, outputs, self.units), stacked(weights, 3, self.units))
        self._start(state, grads)
        self.of_inputs = torch.zeros_like(inputs) if grad_inputs else inputs.new_zeros(0)
        self.of_weights = [w.new_zeros(w.shape, dtype=self.dtype) for w in weights]
        self.of_gate = [part.new_zeros(part.shape, dtype=self.dtype) for part in gate]

    def _start(self, state: Sequence[Optional], grads: Sequence[Optional]) -> None:
        """The cotangents that come in: of every step's gate and output, and of the last state."""
        of_sequence, of_h, of_c, of_increment, of_since, of_num, of_gates = grads
        batch, steps, zeros = self.batch, self.steps, self.increments.new_zeros
        since = state[3]
        assert since is not None
        self.clock = Clock.of(self.gates, self.mask, since)
        of_steps = zeros(batch, steps) if of_gates is None else of_gates
        self.grad_gates = (of_steps if of_num is None else of_steps + of_num.unsqueeze(1)).contiguous()
        self.grad_sequence = None if of_sequence is None else of_sequence.contiguous()
        shape = (self.layers, batch, self.units)
        self.carry_h = zeros(shape) if of_h is None else of_h.clone(memory_format=torch.contiguous_format)
        self.carry_c = self.carry_h
        if self.has_c:
            self.carry_c = zeros(shape) if of_c is None else of_c.clone(memory_format=torch.contiguous_format)
        self.carry_d = (
            zeros(batch) if of_increment is None else of_increment.clone(memory_format=torch.contiguous_format)
        )
        self.carry_q = zeros(batch)
        if of_since is not None and self.gate:  # the steps carry the accumulator's cotangent, scaled by the increment
            last = self.increments.gather(1, self.counts.long().unsqueeze(1)).squeeze(1)
            self.carry_q = (of_since / last).where(last != 0, 0)

    def gradients(self) -> list[Tensor]:
        """Of inputs (empty unless asked for), h, c, increment, since, gate and weights."""
        if self.batch and self.steps:
            gates = CELLS[self.cell].num_gates
            processors = multiprocessors(self.inputs.device)
            choice = self.choice or best_choice(self.weights, self.cell, self.width)
            cut = tiling(self.batch, self.units, gates, self.layers, self.operand, processors, choice)
            order = by_length(self.counts)
            chunk = chunk_steps(self.batch, self.steps, self.width, self.units, self.layers)
            starts = range(0, self.steps, chunk)
            rooms = self.rooms or [min(chunk, self.steps - first) for first in starts]
            for first, room in reversed(list(zip(starts, rooms, strict=True))):
                if room or self.gate or self.grad_sequence is not None:
                    self._through(first, min(chunk, self.steps - first), max(1, room), cut, order)
        of_since = self.carry_q * self.increments[:, 0] if self.gate else torch.zeros_like(self.carry_q)
        of_c = self.carry_c if self.has_c else self.carry_h.new_zeros(0)
        of_gate = [part.to(p.dtype) for part, p in zip(self.of_gate, self.gate, strict=True)]
        of_weights = [part.to(w.dtype) for part, w in zip(self.of_weights, self.weights, strict=True)]
        return [self.of_inputs, self.carry_h, of_c, self.carry_d, of_since, *of_gate, *of_weights]

    def _through(self, first: int, steps: int, room: int, cut: Tiling, order: Tensor) -> None:
        """One chunk, in which no row has more than `room` updates."""
        chunk = Chunk.of(first, steps, room, self.clock, (self.h, self.c, self.times, self.counts))
        gates, sums = self._before_the_kernel(chunk)
        batch, layers, units = self.batch, self.layers, self.units
        outputs = CELLS[self.cell].num_gates * units
        grad_inputs = self.inputs.new_zeros(layers, batch * room, outputs)
        is_after, is_split = self.cell == "gru_reset_after", cut.split > 1
        grad_recurrent = self.inputs.new_zeros((layers, batch * room, units) if is_after else (1,))
        grad_gate = self.carry_d.new_zeros(batch * room)
        blocks = triton.cdiv(batch, cut.rows)
        empty = self.carry_d.new_empty(1)
        kernel = resident_backward if cut.resident else streamed_backward
        kernel[(blocks, cut.split)](
            self.stacks[1],
            self.stacks[0],
            self.gate[0].contiguous() if self.gate else empty,
            order,
            chunk.updates.int(),
            chunk.base.int(),
            self.times,
            self.increments,
            self.clock.since,
            self.grad_gates,
            chunk.held_h,
            chunk.held_c,
            gates,
            *sums,
            self.carry_h,
            self.carry_c,
            self.carry_d,
            self.carry_q,
            grad_inputs,
            grad_recurrent,
            grad_gate,
            empty if cut.resident else self.carry_d.new_empty(batch, units),
            self.carry_d.new_empty(blocks, 2, 3, cut.split, cut.block_rows) if is_split else empty,
            torch.zeros(blocks, dtype=torch.int32, device=empty.device),
            batch,
            self.steps,
            room,
            H=units,
            LAYERS=layers,
            CELL=self.cell,
            LEARNED=bool(self.gate),
            SEQUENCE=self.grad_sequence is not None,
            STATE=LANGUAGE[self.dtype],
            PRECISION=precision(self.operand),
            **cut.constants(),
            **cut.options(),
        )
        del sums
        self._add_gradients(chunk, gates, grad_inputs, grad_recurrent, grad_gate)

    def _before_the_kernel(self, chunk: Chunk) -> tuple[Tensor, list[Tensor]]:
        """The updates' gates [L, B * U, 4, H], and the sums of `segments`; S(s, x) of all steps lives only here."""
        gates, h, c = self._transitions(chunk)
        return gates, self._segments(chunk, h, c)

    def _transitions(self, chunk: Chunk) -> tuple[Tensor, Tensor, Tensor]:
        """The updates' gates [L, B * U, 4, H]; S(s, x) at every step, h and c [L, B * C, H], if the gate is learned."""
        layers, units, learned = self.layers, self.units, bool(self.gate)
        visited = chunk.steps if learned else chunk.room
        rows = self.batch * visited
        held, is_update = chunk.visits(learned)
        h = self.carry_h.new_empty(layers, rows if learned else 0, units)
        c = torch.empty_like(h) if self.has_c else h
        gates = self.carry_h.new_empty(layers, self.batch * chunk.room, 4, units)
        below = self.inputs[:, chunk.first : chunk.first + chunk.steps].flatten(0, 1)
        if not learned:
            below = self._inputs_at(chunk)
        for index in range(layers):
            weight_ih, weight_hh, bias, _ = self.weights[4 * index : 4 * index + 4]
            inline = index == 0 and self.width <= INLINE_INPUTS
            read = below.contiguous() if inline else F.linear(below, weight_ih, bias if bias.numel() else None)
            state = chunk.held_h[index].flatten(0, 1).to(self.operand)
            recurrent = F.linear(state, weight_hh[: 2 * units] if self.cell == "gru" else weight_hh)
            reset_h = reset_product = self.carry_h
            block_n, block_units = 16, min(128, triton.next_power_of_2(units))
            grid = (triton.cdiv(rows, block_n), triton.cdiv(units, block_units))
            if self.cell == "gru":
                reset_h = self.inputs.new_empty(rows, units)
            for resets in (True, False) if self.cell == "gru" else (False,):
                transition[grid](
                    read,
                    weight_ih.contiguous(),
                    bias.contiguous() if bias.numel() else weight_ih.new_zeros(len(weight_ih)),
                    recurrent,
                    reset_product,
                    self.stacks[2][index],
                    held,
                    is_update,
                    chunk.held_h[index],
                    chunk.held_c[index],
                    h[index],
                    c[index],
                    gates[index],
                    reset_h,
                    rows,
                    below.shape[1],
                    visited,
                    H=units,
                    CELL=self.cell,
                    RESETS=resets,
                    INLINE=inline,
                    KEEP=learned,
                    STATE=LANGUAGE[self.dtype],
                    BLOCK_N=block_n,
                    BLOCK_UNITS=block_units,
                    **FUSED,
                )
                if resets:
                    reset_product = F.linear(reset_h, weight_hh[2 * units :])
            below = (h[index] if learned else chunk.states_after(chunk.held_h, index)).to(self.operand)
        return gates, h, c

    def _inputs_at(self, chunk: Chunk) -> Tensor:
        """What the updates read, 0 where there is none: [B * U, I]."""
        at = self.inputs.gather(1, chunk.times.unsqueeze(-1).expand(-1, -1, self.width))
        return at.masked_fill(~chunk.filled.unsqueeze(-1), 0).flatten(0, 1)

    def _segments(self, chunk: Chunk, new_h: Tensor, new_c: Tensor) -> list[Tensor]:
        """Sums over runs of skipped steps: matrix, constant, by_h, by_c, output_sum; see `segments`."""
        learned, is_lstm, sequence = bool(self.gate), self.cell == "lstm", self.grad_sequence is not None
        batch, slots, units, layers = self.batch, chunk.room + 1, self.units, self.layers
        empty = self.carry_d.new_empty
        by_h = empty((2, layers, batch, slots, units) if learned else (1,))
        sums = [
            empty((batch, slots, 4) if learned else (1,)),
            empty((batch, slots, 2) if learned else (1,)),
            by_h,
            torch.empty_like(by_h) if is_lstm else by_h,
            empty((batch, slots, units) if sequence else (1,)),
        ]
        if not learned and not sequence:
            return sums
        block_layers, block_units = triton.next_power_of_2(layers), triton.next_power_of_2(units)
        segments[(batch,)](
            new_h,
            new_c,
            chunk.held_h,
            chunk.held_c,
            *(part.contiguous() for part in self.gate or (by_h, by_h)),
            self.clock.kind,
            self.clock.since,
            self.grad_gates,
            self.grad_gates if self.grad_sequence is None else self.grad_sequence,
            self.increments,
            chunk.base.int(),
            *sums,
            batch,
            self.steps,
            chunk.steps,
            chunk.room,
            chunk.first,
            H=units,
            LAYERS=layers,
            BLOCK_LAYERS=block_layers,
            BLOCK_UNITS=block_units,
            HAS_C=is_lstm,
            LEARNED=learned,
            SEQUENCE=sequence,
            STATE=LANGUAGE[self.dtype],
            num_warps=1 if block_layers * block_units <= 256 else 4,
            **FUSED,
        )
        return sums

    def _add_gradients(
        self, chunk: Chunk, gates: Tensor, grad_inputs: Tensor, grad_recurrent: Tensor, grad_gate: Tensor
    ) -> None:
        """Of the weights, and of the chunk's inputs. Slots that are no updates have cotangents of 0."""
        units, below = self.units, self._inputs_at(chunk)
        for index in range(self.layers):
            of_input, of_hidden, of_bias, of_bias_n = self.of_weights[4 * index : 4 * index + 4]
            d, h = grad_inputs[index], chunk.states_before(index)
            of_input += d.T @ below
            below = chunk.states_after(chunk.held_h, index).to(self.operand)
            if of_bias.numel():
                of_bias += d.sum(0, dtype=self.dtype)
            if self.cell == "lstm":
                of_hidden += d.T @ h.to(self.operand)
                continue
            of_hidden[: 2 * units] += d[:, : 2 * units].T @ h.to(self.operand)
            if self.cell == "gru":
                reset_h = (gates[index, :, 0] * h).masked_fill(~chunk.filled.view(-1, 1), 0)
                of_hidden[2 * units :] += d[:, 2 * units :].T @ reset_h.to(self.operand)
                continue
            of_hidden[2 * units :] += grad_recurrent[index].T @ h.to(self.operand)
            if of_bias_n.numel():
                of_bias_n += grad_recurrent[index].sum(0, dtype=self.dtype)
        if self.gate:
            top = chunk.states_after(chunk.held_c if self.cell == "lstm" else chunk.held_h, -1)
            self.of_gate[0] += grad_gate @ top
            self.of_gate[1] += grad_gate.sum(0, keepdim=True)
        if self.of_inputs.numel():
            part = (grad_inputs[0] @ self.weights[0]).view(self.batch, chunk.room, self.width)
            at = chunk.slot.clamp(max=chunk.room - 1).unsqueeze(-1).expand(-1, -1, self.width)
            part = part.gather(1, at).masked_fill_(~chunk.is_update.unsqueeze(-1), 0)
            self.of_inputs[:, chunk.first : chunk.first + chunk.steps] = part


def best_choice(weights: Sequence[Tensor], cell: str, width: int) -> Choice:
    """The tuned choice for the backward pass of layers like these."""

    def prepare() -> Callable[[Choice], object]:
        inputs, like, gate, state = trial(weights, cell, width)
        results = forward(inputs, like, gate, state, None, None, cell, False, True)
        grads = (None, torch.ones_like(results[1]), *[None] * 5)

        def run(choice: Choice) -> object:
            return Reverse(inputs, like, gate, state, None, results[6:], grads, cell, False, choice=choice).gradients()

        return run

    return choose("backward", weights, cell, width, prepare)
