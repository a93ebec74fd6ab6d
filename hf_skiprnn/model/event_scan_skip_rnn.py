"""The event scan: it computes only updates, gives the same values as the dense scan, and has its own backward pass.

The backward pass visits the rounds of events in reverse. At an update it runs the cell's own backward. A skipped step
needs only the cotangent g_u of the straight-through gate. With r the cotangent of the gate itself, q the accumulator, D
the increment, and D~ and S(s, x) the increment and state that an update would have given,

    g_u = r + <g_s, S(s, x) - s> + g_D (D~ - D) - g_q update_prob
    g_q += w g_u;  g_D += g_q                                       since update_prob = q + D; its value is k D

w is the gate's slope du / d(update_prob); it is 1, or depends on D (`gate_slope`).

S(s, x) is a forward value that does not depend on other skipped steps. So all skipped steps of a round are computed as
one batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cells_skip_rnn import (
    CELLS,
    Cell,
    GateWeights,
    LayerWeights,
    Step,
    StepGradient,
    gate_slope,
    increment_of,
    product,
)
from .dense_scan_skip_rnn import Engine
from .event_forward_skip_rnn import Events, Recorder, Timeline, run_updates
from .outputs_skip_rnn import ScanOutput, SkipRNNState

SKIPPED_BLOCK = 1 << 14  # largest number of skipped steps computed at once; limits the memory of the backward pass


class Plan(NamedTuple):
    """The arguments of the scan that are not tensors."""

    cell: Cell
    time: Timeline
    num_layers: int
    learned: bool
    capped: int
    sequence: bool

    def unpack(self, tensors: Sequence[Any]) -> tuple[Tensor, SkipRNNState, GateWeights | None, list[LayerWeights]]:
        """Return inputs, state, gate and layers from the flat list of tensors that `event_scan` makes of them."""
        inputs, state, rest = tensors[0], SkipRNNState(*tensors[1:5]), list(tensors[5:])
        gate = GateWeights(rest.pop(0), rest.pop(0), rest.pop(0), self.capped) if self.learned else None
        return inputs, state, gate, [LayerWeights(*rest[4 * i : 4 * i + 4]) for i in range(self.num_layers)]


@dataclass
class Cotangents:
    """Cotangents of the current state, for A of the B rows."""

    h: list[Tensor]  # [A, H] for each layer
    c: list[Tensor]
    increment: Tensor  # [A]
    accumulator: Tensor  # [A]

    def take(self, rows: Tensor) -> "Cotangents":
        """Return the cotangents of `rows`."""
        if len(rows) == len(self.increment):  # all rows, because they are always in ascending order
            return Cotangents(list(self.h), list(self.c), self.increment, self.accumulator)
        parts = [part[rows] for part in self.h], [part[rows] for part in self.c]
        return Cotangents(*parts, self.increment[rows], self.accumulator[rows])

    def put(self, rows: Tensor, other: "Cotangents") -> None:
        """Replace the cotangents of `rows`."""
        if len(rows) == len(self.increment):
            self.h, self.c, self.increment, self.accumulator = other.h, other.c, other.increment, other.accumulator
            return
        for mine, theirs in zip([*self.h, *self.c], [*other.h, *other.c], strict=True):
            mine[rows] = theirs
        self.increment[rows], self.accumulator[rows] = other.increment, other.accumulator


class HeldSteps:
    """The steps at which each event holds, and the skipped ones among them, sorted by round."""

    def __init__(self, events: Events, time: Timeline, gates: Tensor, steps_since_update: Tensor):
        real = torch.ones_like(gates, dtype=torch.bool) if time.mask is None else time.mask
        self.event = events.holders(time.batch, time.steps).view(-1)  # [B * T]
        self.order = self.event.argsort(stable=True)
        self.rank = torch.empty_like(self.order)
        self.rank[self.order] = torch.arange(len(self.order), device=self.order.device)
        self.counts = torch.bincount(self.event, minlength=len(events.rows))  # [E]
        self.bounds = self._bounds(self.counts, events.offsets)

        is_skipped = (real & (gates == 0)).view(-1)
        self.skipped = self.order[is_skipped[self.order]]
        skipped_counts = torch.bincount(self.event[self.skipped], minlength=len(events.rows))
        self.skipped_bounds = self._bounds(skipped_counts, events.offsets)
        round_of = torch.repeat_interleave(
            torch.arange(len(events.offsets) - 1, device=gates.device),
            torch.tensor(events.offsets, device=gates.device).diff(),
        )
        zeros = torch.zeros(len(events.offsets) - 1, dtype=torch.long, device=gates.device)
        # The most skipped steps, and the most steps, of an event in each round.
        self.longest: list[int] = zeros.scatter_reduce(0, round_of, skipped_counts, "amax").tolist()
        self.longest_held: list[int] = zeros.scatter_reduce(0, round_of, self.counts, "amax").tolist()

        real_index = real.cumsum(1).view(-1)
        waited = (
            real_index[self.skipped]
            - torch.cat((torch.zeros_like(time.lengths), real_index[events.flat]))[self.event[self.skipped]]
        )
        self.slot = waited - 1  # position among the skipped steps of its event
        before = torch.zeros_like(events.increments)
        before[: time.batch] = steps_since_update
        self.steps_since_update = waited + before[self.event[self.skipped]]  # k

    @staticmethod
    def _bounds(counts: Tensor, offsets: Sequence[int]) -> list[int]:
        ends = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
        return ends[torch.tensor(offsets, device=counts.device)].tolist()


class Reverse:
    """One backward pass. It carries cotangents back in time and collects the factors of the weight gradients."""

    def __init__(self, plan: "Plan", tensors: Sequence[Any], events: Events, gates: Tensor, grads: Sequence[Any]):
        self.plan, self.events = plan, events
        self.inputs, state, self.gate, self.layers = plan.unpack(tensors)
        self.flat_inputs = self.inputs.reshape(-1, self.inputs.shape[-1])
        grad_sequence, grad_h, grad_c, grad_increment, grad_steps_since_update, grad_num, grad_gates = grads
        self.grad_gate = (grad_gates + grad_num.unsqueeze(1)).reshape(-1)  # r of every step
        self.grad_sequence = None if grad_sequence is None else grad_sequence.flatten(0, 1)
        self.carry = Cotangents(
            list(grad_h.clone().unbind()),
            [] if state.c is None else list(grad_c.clone().unbind()),
            grad_increment.clone(),
            self._across_seam(events, grad_steps_since_update),
        )
        self.held = HeldSteps(events, plan.time, gates, state.steps_since_update)
        self._recompute_updates()
        for index in reversed(range(len(events.offsets) - 1)):
            self._round(index)

    def _across_seam(self, events: Events, grad_steps_since_update: Tensor) -> Tensor:
        """Return the cotangent of the accumulator, which is steps_since_update * increment in the last state."""
        event = torch.arange(len(events.rows), device=grad_steps_since_update.device)
        last = torch.zeros_like(self.plan.time.lengths).scatter_reduce(0, events.rows, event, "amax")
        increment = events.increments[last]
        return (grad_steps_since_update / increment).where((increment != 0) & self.plan.learned, 0)

    def _recompute_updates(self) -> None:
        """Recompute the activations of all updates in one batch, which is possible because all states are known."""
        events, cell = self.events, self.plan.cell
        below = self.flat_inputs.index_select(0, events.flat)
        self.updates: list[Step] = []
        self.recurrent: list[Tensor] = []  # [E, .] for each layer: the recurrent product of every event's state
        self.operands: list[Tensor] = []  # [N, I or H] for each layer: the inputs of W_ih
        for index, w in enumerate(self.layers):
            recurrent = cell.recurrent_product(w, events.h[index])
            h, c = self._before(index, events.previous)
            x_product = product(below, w.weight_ih, w.bias)
            self.updates.append(cell.step(w, x_product, recurrent[events.previous], h, c))
            self.recurrent.append(recurrent)
            self.operands.append(below)
            below = events.h[index][self.plan.time.batch :]
        self.gradients_at: list[list[StepGradient]] = [[] for _ in self.layers]  # by layer and round, last round first
        self.grad_z: list[Tensor] = []  # by round, last first: cotangents of the gate's pre-activation W_p top + b_p

    def _before(self, index: int, event: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.events.h[index][event], self.events.c[index][event] if self.events.c else None

    def _round(self, index: int) -> None:
        first, last = self.events.offsets[index : index + 2]
        rows = self.events.rows[first:last]
        carry = self.carry.take(rows)
        self._through_held_steps(index, first, last, rows, carry)
        if index:
            self._through_update(first, last, rows, carry)
        self.carry.put(rows, carry)

    def _through_held_steps(self, index: int, first: int, last: int, rows: Tensor, carry: Cotangents) -> None:
        """Go back through the steps at which the round's events hold, without the updates themselves."""
        start, end = self.held.skipped_bounds[index : index + 2]
        skipped = self.held.skipped[start:end]
        suffix, total = self._output_sums(index, first, last, skipped)
        if self.plan.learned and len(skipped):
            terms = [
                self._gate_terms(
                    block,
                    self.held.event[block],
                    first,
                    carry,
                    None if suffix is None else suffix[at : at + len(block)],
                )
                for at, block in zip(range(0, len(skipped), SKIPPED_BLOCK), skipped.split(SKIPPED_BLOCK), strict=True)
            ]
            constant, slope = (torch.cat(part) for part in zip(*terms, strict=True))
            place = (self.held.slot[start:end], self.held.event[skipped] - first)
            increment = self.events.increments[self.held.event[skipped]]
            update_prob = self.held.steps_since_update[start:end] * increment
            values = (constant, slope, update_prob, gate_slope(increment, self.plan.capped), torch.ones_like(slope))
            self._recur(self.held.longest[index], last - first, place, values, carry)
        if total is not None:
            carry.h[-1] = carry.h[-1] + total

    def _output_sums(self, index: int, first: int, last: int, skipped: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Sum the outputs' cotangents over each event's steps: from each skipped step on [M, H], and all [A, H]."""
        if self.grad_sequence is None:
            return None, None
        start, end = self.held.bounds[index : index + 2]
        order = self.held.order[start:end]
        grad, local = self.grad_sequence[order], self.held.event[order] - first
        counts = self.held.counts[first:last]
        place = torch.arange(end - start, device=grad.device) - (counts.cumsum(0) - counts)[local]
        # Each event's steps in a row of their own: a NaN or a large number stays there.
        padded = grad.new_zeros(
            last - first, max(1, self.held.longest_held[index]), grad.shape[1], dtype=_sum_dtype(grad)
        )
        suffix = padded.index_put((local, place), grad.to(padded.dtype)).flip(1).cumsum(1).flip(1)
        rank = self.held.rank[skipped] - start
        return suffix[local[rank], place[rank]].to(grad.dtype), suffix[:, 0].to(grad.dtype)

    def _gate_terms(
        self, flat: Tensor, event: Tensor, first: int, carry: Cotangents, outputs: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Compute r + <g_s, S(s, x) - s> and D~ - D at skipped steps: two tensors [M]."""
        assert self.gate is not None
        local = event - first
        constant = self.grad_gate[flat]
        x = self.flat_inputs.index_select(0, flat)
        for index, w in enumerate(self.layers):
            h, c = self._before(index, event)
            step = self.plan.cell.step(w, product(x, w.weight_ih, w.bias), self.recurrent[index][event], h, c)
            grad_h = carry.h[index][local]
            if outputs is not None and index == len(self.layers) - 1:
                grad_h = grad_h + outputs
            constant = constant + ((step.h - h) * grad_h).sum(-1)
            if step.c is not None and c is not None:
                constant = constant + ((step.c - c) * carry.c[index][local]).sum(-1)
            x = step.h
        top = step.h if step.c is None else step.c
        gate = self.gate.of_rows(self.events.rows[event])
        return constant, increment_of(gate, top) - self.events.increments[event]

    def _recur(
        self,
        longest: int,
        rows: int,
        place: tuple[Tensor, Tensor],
        terms: Sequence[Tensor],
        carry: Cotangents,
    ) -> None:
        """Run the recurrence of g_u over each event's skipped steps, latest first; shorter runs are padded."""
        padded = [term.new_zeros(longest, rows).index_put(place, term) for term in terms]
        by_step = zip(*(part.flip(0).unbind() for part in padded), strict=True)
        for constant, slope, update_prob, of_rounding, skipped in by_step:
            grad_u = torch.addcmul(constant, carry.increment, slope).addcmul_(carry.accumulator, update_prob, value=-1)
            carry.accumulator = torch.addcmul(carry.accumulator, of_rounding, grad_u)
            carry.increment = torch.addcmul(carry.increment, carry.accumulator, skipped)

    def _through_update(self, first: int, last: int, rows: Tensor, carry: Cotangents) -> None:
        """Run the backward pass of an update: of the cell, and of the gate that selected it."""
        batch, events = self.plan.time.batch, self.events
        now = slice(first - batch, last - batch)
        previous = events.previous[now]
        if self.plan.learned:
            grad_z = carry.increment * events.increments[first:last] * (1 - events.increments[first:last])
            self.grad_z.append(grad_z)
            grad_u = self._gate_at_update(first, last, now, carry)
        above: Tensor | None = None
        for index in reversed(range(len(self.layers))):
            w, top = self.layers[index], index == len(self.layers) - 1
            h, c = self._before(index, previous)
            grad_h = carry.h[index] if above is None else carry.h[index] + above
            grad_c = carry.c[index] if carry.c else None
            if self.gate is not None and top:
                into_top = torch.outer(grad_z, self.gate.weight.to(grad_z.dtype).squeeze(0))
                grad_h, grad_c = (grad_h + into_top, None) if grad_c is None else (grad_h, grad_c + into_top)
            step = self.updates[index]
            step = Step(step.h[now], None if step.c is None else step.c[now], tuple(g[now] for g in step.activations))
            gradient = self.plan.cell.backward(w, step, h, c, grad_h, grad_c)
            self.gradients_at[index].append(gradient)
            carry.h[index] = gradient.h
            if gradient.c is not None:
                carry.c[index] = gradient.c
            above = product(gradient.inputs, w.weight_ih.T) if index else None
        carry.increment = carry.accumulator = grad_u if self.plan.learned else torch.zeros_like(carry.increment)

    def _gate_at_update(self, first: int, last: int, now: slice, carry: Cotangents) -> Tensor:
        """Compute w g_u at updates: [A]."""
        events, previous = self.events, self.events.previous[now]
        update_prob = events.steps_since_update[now] * events.increments[previous]
        grad_u = self.grad_gate[events.flat[now]] - carry.accumulator * update_prob
        grad_u = grad_u + carry.increment * (events.increments[first:last] - events.increments[previous])
        for states, grads in ((events.h, carry.h), (events.c, carry.c)):
            for state, grad in zip(states, grads, strict=True):
                grad_u = grad_u + ((state[first:last] - state[previous]) * grad).sum(-1)
        return grad_u * gate_slope(events.increments[previous], self.plan.capped)

    def gradients(self) -> tuple[Tensor | None, ...]:
        """Return the gradients of the flat list of tensors, in its order."""
        weights: list[Tensor | None] = []
        for index, w in enumerate(self.layers):
            rounds = self.gradients_at[index][::-1]
            width = self.plan.cell.num_gates * self.events.h[index].shape[1]
            none = self.events.h[index].new_zeros(0, width)
            inputs = torch.cat([none, *(g.inputs for g in rounds)])
            recurrent = torch.cat([none, *(g.recurrent for g in rounds)])
            weights += self._weight_gradients(index, w, inputs, recurrent)
            if index == 0:
                grad_x = torch.zeros_like(self.flat_inputs)
                grad_x[self.events.flat] = product(inputs, w.weight_ih.T).to(grad_x.dtype)
        gate: list[Tensor | None] = []
        if self.gate is not None:
            shift = self.gate.shift
            grad_z = torch.cat([self.events.steps_since_update[:0], *self.grad_z[::-1]])
            top = (self.events.c or self.events.h)[-1][self.plan.time.batch :]
            gate = [
                (grad_z @ top).unsqueeze(0).to(self.gate.weight.dtype),
                grad_z.sum(0, keepdim=True).to(self.gate.bias.dtype),
                None if shift is None else self._by_row(grad_z).to(shift.dtype),
            ]
        carry = self.carry
        steps_since_update = carry.accumulator * self.events.increments[: self.plan.time.batch]
        state = [torch.stack(carry.h), torch.stack(carry.c) if carry.c else None, carry.increment, steps_since_update]
        return grad_x.view_as(self.inputs), *state, *gate, *weights

    def _by_row(self, values: Tensor) -> Tensor:
        """Sum over each row's updates: [N] -> [B]."""
        batch = self.plan.time.batch
        return values.new_zeros(batch).index_add(0, self.events.rows[batch:], values)

    def _weight_gradients(self, index: int, w: LayerWeights, inputs: Tensor, recurrent: Tensor) -> list[Tensor | None]:
        """Compute the gradients of one layer's LayerWeights from the cotangents of all updates [N, G*H]."""
        gates = self.plan.cell.num_gates
        h, _ = self._before(index, self.events.previous)
        operands = self.plan.cell.recurrent_operands(self.updates[index], h)
        pairs = zip(recurrent.chunk(gates, 1), operands, strict=True)
        grads = [
            inputs.T @ self.operands[index].to(inputs.dtype),
            torch.cat([grad.T @ operand for grad, operand in pairs]),
            None if w.bias is None else inputs.sum(0),
            None if w.bias_hh_n is None else recurrent.chunk(gates, 1)[-1].sum(0),
        ]
        return [None if grad is None else grad.to(w.weight_ih.dtype) for grad in grads]


def _sum_dtype(grad: Tensor) -> torch.dtype:
    """The dtype of cumulative sums whose differences are taken: float64, or float32 on Apple's GPUs."""
    return grad.dtype if grad.device.type == "mps" else torch.float64


class SkipScan(torch.autograd.Function):
    """The autograd function of the event scan: `run_updates` forward, `Reverse` backward."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, *tensors: Any) -> tuple[Tensor | None, ...]:
        inputs, state, gate, layers = plan.unpack(tensors)
        trains, held = any(ctx.needs_input_grad), None
        recorder = Recorder() if trains or plan.sequence else None
        last, gates = run_updates(inputs, layers, gate, state, plan.cell, plan.time, recorder)
        if recorder is not None:
            events = recorder.events()
            if plan.sequence:
                held = events.h[-1][events.holders(plan.time.batch, plan.time.steps)]
            if trains:
                ctx.plan, ctx.offsets = plan, events.offsets
                ctx.save_for_backward(*tensors, *events.h, *events.c, *events[2:7], gates)
        num_updates = gates.sum(1)
        if not plan.learned:
            ctx.mark_non_differentiable(last.steps_since_update, num_updates, gates)
        return held, *last, num_updates, gates

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "The 'events' backend has no second derivative (backward was called with create_graph=True). "
                "Use the 'dense' backend: model.set_scan_backend('dense')."
            )
        plan, saved = ctx.plan, list(ctx.saved_tensors)
        count = 5 + 3 * plan.learned + 4 * plan.num_layers
        tensors, saved = saved[:count], saved[count:]
        h, c = saved[: plan.num_layers], saved[plan.num_layers : -6]
        increments, rows, flat, previous, steps_since_update, gates = saved[-6:]
        events = Events(tuple(h), tuple(c), increments, rows, flat, previous, steps_since_update, ctx.offsets)
        return None, *Reverse(plan, tensors, events, gates, grads).gradients()


# The number of rounds depends on the data, so torch.compile must call this function without tracing it.
@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch has no types here
def event_scan(
    inputs: Tensor,
    layers: Sequence[LayerWeights],
    gate: GateWeights | None,
    state: SkipRNNState,
    *,
    cell: str,
    mask: Tensor | None = None,
    forced_gates: Tensor | None = None,
    sequence: bool = False,
) -> ScanOutput:
    """Compute only the updates; values, gates and first derivatives equal `dense_scan`'s. No second derivative."""
    time = Timeline(inputs.shape[0], inputs.shape[1], mask, forced_gates, inputs.device)
    plan = Plan(CELLS[cell], time, len(layers), gate is not None, gate.capped if gate else 0, sequence)
    tensors = (inputs, *state, *(gate or ())[:3], *(part for w in layers for part in w))
    held, h, c, increment, steps_since_update, num_updates, gates = SkipScan.apply(plan, *tensors)
    return ScanOutput(held, SkipRNNState(h, c, increment, steps_since_update), num_updates, gates)


EVENTS = Engine("events", event_scan)
