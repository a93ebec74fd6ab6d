"""The backward pass, in chunks of time, the latest chunk first.

For every chunk it computes the transition S(s, x) at all steps with large matrix products of PyTorch; sums over runs of
skipped steps (kernels_skipped.py); the cotangents from update to update with the sequential kernel
(kernels_backward.py); and the weight gradients with large matrix products. Nothing waits for the device.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from hf_skiprnn.model.cells_skip_rnn import CELLS, LayerWeights, gate_slope, product, state_dtype

from .buffers import chunk_steps
from .forward_pass import cut_of, form_of, kernel_weights, partial_sums
from .kernels_backward import Chunk, Gradients, resident_backward, streamed_backward
from .kernels_common import Scratch, States, form_name
from .kernels_skipped import Runs, Steps, segments
from .tiling import FUSED, INLINE_INPUTS, LANGUAGE


class Slice(NamedTuple):
    """The chunk's steps first .. first + steps - 1 of every row, and the transitions there; N = B * C."""

    first: int
    steps: int
    read: Tensor  # [N, I], zero where no gradient may come from
    old: States  # before every step [L, N, H]
    new: States  # after it, as if it were an update
    activations: Tensor  # [L, 4, N, H]


def steps_since_updates(is_update: Tensor, mask: Tensor | None, first: Tensor) -> Tensor:
    """Return k at every real step, [B, T]. `first` [B]: k at the start of the scan."""
    real = torch.ones_like(is_update) if mask is None else mask
    index = real.cumsum(1, dtype=torch.int32)
    latest = (index * is_update).cummax(1).values if is_update.shape[1] else index
    latest = F.pad(latest, (1, 0))[:, :-1]
    return index - latest + torch.where(latest == 0, first.unsqueeze(1), 0)


class BackwardPass:
    """One backward pass; `gradients` runs it.

    Args:
        inputs: [B, T, I]; weights, gate, state, mask and cell are as in `forward_pass.forward`, too.
        records: gates [B, T], and the records of `empty_results`.
        grads: cotangents of held, h, c, increment, steps_since_update, num_updates, update_gates; None is zero.
        grad_inputs: whether the inputs' gradient is wanted.
    """

    def __init__(
        self,
        inputs: Tensor,
        weights: Sequence[Tensor],
        gate: Sequence[Tensor],
        state: Sequence[Tensor | None],
        mask: Tensor | None,
        records: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        cell: str,
        capped: int,
        grad_inputs: bool,
    ) -> None:
        self.inputs, self.weights, self.gate, self.mask = inputs, weights, gate, mask
        self.gates, self.h, self.c, self.increments = records
        self.name, self.cell = cell, CELLS[cell]
        (self.batch, self.num_steps, self.width), self.units = inputs.shape, weights[1].shape[1]
        self.layers, self.dtype, self.has_c = len(weights) // 4, state_dtype(weights[1]), state[1] is not None
        self.of_inputs = torch.zeros_like(inputs) if grad_inputs else inputs.new_zeros(0)
        self.of_weights = [w.new_zeros(w.shape, dtype=self.dtype) for w in weights]
        self.of_gate = [part.new_zeros(part.shape, dtype=self.dtype) for part in gate]
        self.is_update = self.gates > 0.5
        self.ended = self.is_update.cumsum(1)  # number of updates up to each step, which is included
        self._start(state[3], grads, capped)

    def _start(self, steps_since_update: Tensor | None, grads: Sequence[Tensor | None], capped: int) -> None:
        """Collect the gate's quantities at every step, and the incoming cotangents."""
        assert steps_since_update is not None
        of_sequence, of_h, of_c, of_increment, of_steps, of_num, of_gates = grads
        zeros, is_update = self.increments.new_zeros, self.is_update.int()
        kind = is_update if self.mask is None else is_update + 2 * (~self.mask).int()
        before, behind = (self.increments.gather(1, event) for event in (self.ended - is_update, self.ended))
        k = steps_since_updates(self.is_update, self.mask, steps_since_update)
        grad_gates = zeros(self.gates.shape) if of_gates is None else of_gates
        grad_gates = (grad_gates if of_num is None else grad_gates + of_num.unsqueeze(1)).contiguous()
        self.steps = Steps(kind.contiguous(), k * before, before, behind, grad_gates, gate_slope(before, capped))
        self.grad_sequence = None if of_sequence is None else of_sequence.contiguous()
        shape = (self.layers, self.batch, self.units)
        states = (of_h, of_c) if self.has_c else (of_h,)
        self.carry = torch.stack([zeros(shape) if part is None else part for part in states])
        self.clock = zeros(2, self.batch)  # cotangents of the accumulator and of the increment
        if of_increment is not None:
            self.clock[1] = of_increment
        if of_steps is not None and self.gate:  # the steps carry the accumulator's cotangent, scaled by the increment
            last = self.increments.gather(1, is_update.sum(1, keepdim=True)).squeeze(1)
            self.clock[0] = (of_steps / last).where(last != 0, 0)

    def gradients(self) -> list[Tensor]:
        """Return the gradients of inputs (empty unless wanted), h, c, increment, steps_since_update, gate, weights."""
        if self.batch and self.num_steps:
            order = self.is_update.sum(1).argsort(descending=True)
            chunk = chunk_steps(self.batch, self.num_steps, self.width, self.units, self.layers)
            for first in reversed(range(0, self.num_steps, chunk)):
                self._through(first, min(chunk, self.num_steps - first), order)
        of_steps = self.clock[0] * self.increments[:, 0] if self.gate else torch.zeros_like(self.clock[0])
        of_h, of_c = self.carry[0], self.carry[1].clone() if self.has_c else self.carry.new_zeros(0)
        of_gate = [part.to(p.dtype) for part, p in zip(self.of_gate, self.gate, strict=True)]
        of_weights = [part.to(w.dtype) for part, w in zip(self.of_weights, self.weights, strict=True)]
        return [self.of_inputs, of_h.clone(), of_c, self.clock[1].clone(), of_steps, *of_gate, *of_weights]

    def _through(self, first: int, steps: int, order: Tensor) -> None:
        """Go back through one chunk."""
        part = self._transitions(first, steps)
        inline = self.width <= INLINE_INPUTS
        weights = kernel_weights(self.weights, self.gate, self.name, inline)
        runs = self._segments(part, weights)
        rows, units, outputs = self.batch * steps, self.units, self.cell.num_gates * self.units
        gradients = Gradients(
            self.inputs.new_zeros(self.layers, rows, outputs),
            self.inputs.new_zeros(self.layers, rows, units) if self.name == "gru_reset_after" else None,
            self.clock.new_zeros(rows) if self.gate else None,
        )
        is_update = self.is_update[:, first : first + steps]
        index = torch.arange(1, steps + 1, device=order.device, dtype=torch.int32) * is_update
        previous = F.pad(index.cummax(1).values, (1, 0)).int().contiguous()
        chunk = Chunk(order, previous, part.old.h, part.new.h, part.old.c, part.new.c, part.activations)
        cut = cut_of(self.weights, self.name, self.batch)
        blocks = triton.cdiv(self.batch, cut.rows)
        arguments = (chunk, weights, self.steps, runs, gradients, self.carry, self.clock)
        form = form_of(cut, self.weights, self.name, keep=True)
        sizes = (self.batch, self.num_steps, steps, first, form, form_name(form))
        if cut.resident:
            resident_backward[(blocks,)](*arguments, *sizes, **cut.options())
        else:
            above = self.clock.new_empty(self.batch, units) if self.layers > 1 else None
            scratch = Scratch(above, partial_sums(cut, blocks, 3, self.clock))
            arrived = torch.zeros(blocks, dtype=torch.int32, device=order.device)
            streamed_backward[(blocks, cut.split)](*arguments, scratch, arrived, *sizes, **cut.options())
        self._add_gradients(part, gradients)

    def _transitions(self, first: int, steps: int) -> Slice:
        """Compute S(s, x) at every step of a chunk, and the activations that its backward pass needs."""
        chunk = slice(first, first + steps)
        is_update = self.is_update[:, chunk]
        # Inputs that are not read must have no effect, even if they are NaN; a learned gate needs skipped steps too.
        unread = ~is_update if not self.gate else None if self.mask is None else ~self.mask[:, chunk]
        read = self.inputs[:, chunk]
        read = (read if unread is None else read.masked_fill(unread.unsqueeze(-1), 0)).flatten(0, 1)
        event = (self.ended[:, chunk] - is_update.long()).view(1, self.batch, steps, 1)
        event = event.expand(self.layers, -1, -1, self.units)
        old_h = self.h.gather(2, event).flatten(1, 2)
        old_c = self.c.gather(2, event).flatten(1, 2) if self.has_c else None
        new_h, new_c = torch.empty_like(old_h), None if old_c is None else torch.empty_like(old_c)
        activations = old_h.new_zeros(self.layers, 4, *old_h.shape[1:])
        below = read
        for index in range(self.layers):
            weight_ih, weight_hh, *biases = self.weights[4 * index : 4 * index + 4]
            w = LayerWeights(weight_ih, weight_hh, *(part if part.numel() else None for part in biases))
            inline = index == 0 and self.width <= INLINE_INPUTS
            x_product = product(below, w.weight_ih.to(self.dtype) if inline else w.weight_ih, w.bias)
            h, c = old_h[index], None if old_c is None else old_c[index]
            step = self.cell.step(w, x_product, self.cell.recurrent_product(w, h), h, c)
            for activation, kept in zip(step.activations, activations[index], strict=False):  # a GRU may have three
                kept.copy_(activation)
            new_h[index] = below = step.h
            if new_c is not None and step.c is not None:
                new_c[index] = step.c
        return Slice(first, steps, read, States(old_h, old_c), States(new_h, new_c), activations)

    def _segments(self, part: Slice, weights: object) -> Runs:
        """Return sums over runs of skipped steps."""
        batch, runs, units, layers = self.batch, part.steps + 1, self.units, self.layers
        learned, sequence, empty = bool(self.gate), self.grad_sequence is not None, self.clock.new_empty
        sums = Runs(
            empty(batch, runs, 2, 2) if learned else None,
            empty(batch, runs, 2) if learned else None,
            empty(2, layers, batch, runs, units) if learned else None,
            empty(2, layers, batch, runs, units) if learned and self.has_c else None,
            empty(batch, runs, units) if sequence else None,
        )
        block_layers, block_units = triton.next_power_of_2(layers), triton.next_power_of_2(units)
        if learned or sequence:
            sizes = (batch, self.num_steps, part.steps, part.first)
            form = (units, layers, block_layers, block_units, LANGUAGE[self.dtype])
            tensors = (part.old, part.new, weights, self.steps, self.grad_sequence, sums)
            warps = 1 if block_layers * block_units <= 256 else 4
            segments[(batch,)](*tensors, *sizes, *form, num_warps=warps, **FUSED)
        return sums

    def _add_gradients(self, part: Slice, gradients: Gradients) -> None:
        """Add the gradients of the weights and of the chunk's inputs. Cotangents are 0 except at updates."""
        below, operand = part.read, self.weights[1].dtype
        for index in range(self.layers):
            of_input, of_hidden, of_bias, of_bias_n = self.of_weights[4 * index : 4 * index + 4]
            d, h = gradients.inputs[index], part.old.h[index]
            of_input += d.T @ below
            below = part.new.h[index].to(operand)
            if of_bias.numel():
                of_bias += d.sum(0, dtype=self.dtype)
            same = 2 * self.units if self.name != "lstm" else len(of_hidden)  # gates that multiply h itself
            of_hidden[:same] += d[:, :same].T @ h.to(operand)
            if self.name == "gru":
                of_hidden[same:] += d[:, same:].T @ (part.activations[index, 0] * h).to(operand)
            if gradients.recurrent is not None:
                of_hidden[same:] += gradients.recurrent[index].T @ h.to(operand)
                if of_bias_n.numel():
                    of_bias_n += gradients.recurrent[index].sum(0, dtype=self.dtype)
        if gradients.gate is not None:
            top = part.new.h if part.new.c is None else part.new.c
            self.of_gate[0] += gradients.gate @ top[-1]
            self.of_gate[1] += gradients.gate.sum(0, keepdim=True)
        if self.of_inputs.numel():
            part_of_inputs = (gradients.inputs[0] @ self.weights[0]).view(self.batch, part.steps, self.width)
            self.of_inputs[:, part.first : part.first + part.steps] = part_of_inputs
