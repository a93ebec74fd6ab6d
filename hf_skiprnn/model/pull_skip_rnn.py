"""Pull inference: the model fetches only the steps that it reads.

    def fetch(positions):                        # [(row, position), ...]: the steps that are needed next
        return [encode(videos[row], frame) for row, frame in positions]

    out = model.pull(fetch, length=[250, 180])   # the output of model(...) for all steps, without computing all steps

Each round fetches the next step of every row that will read another one, so the number of rounds is the largest number
of updates of a row.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from .cells_skip_rnn import NEVER
from .layers_skip_rnn import plan_gates
from .losses_skip_rnn import budget_of
from .operating_point_skip_rnn import Shift, fixed_shifts
from .outputs_skip_rnn import ScanOutput, SkipRNNClassifierOutput, SkipRNNModelOutput, SkipRNNState
from .reader_skip_rnn import Reader, as_count

Position = tuple[int, int]  # row, step
Fetch = Callable[[list[Position]], Any]


class EndOfSequence(LookupError):  # noqa: N818 - not an error, like StopIteration
    """Raised by `fetch` if rows end before the wanted step.

    lengths: row -> its number of steps. All other positions are fetched again, so raise it before any other work.
    """

    def __init__(self, lengths: dict[int, int]) -> None:
        super().__init__(f"lengths of the rows that end: {lengths}")
        self.lengths = lengths


def pull(
    model: Any,
    fetch: Fetch,
    length: int | Sequence[int] | None = None,
    *,
    batch_size: int | None = None,
    state: SkipRNNState | None = None,
    generator: torch.Generator | None = None,
    check_inputs: bool = True,
    gate_shift: Shift | None = None,
    update_rate: Shift | None = None,
) -> SkipRNNModelOutput | SkipRNNClassifierOutput:
    """Run sequences, and fetch only the steps that the model reads. There are no gradients and no dropout.

    Args:
        model: a Skip RNN with or without a head.
        fetch: takes a list of n (row, position) pairs, one for each row, and returns their steps in that order:
            [n, input_size] floating point (array, tensor or list of such), or n token ids. It raises EndOfSequence if
            rows end. Its other exceptions are passed on, with a note of what was fetched.
        length: number of steps of each row [B], or one number for all rows. None: unknown until fetch raises
            EndOfSequence. (A row of unknown length that never reads again ends after its last read.)
        batch_size: number of rows, if `length` is not a list; default 1.
        state: SkipRNNState to continue from; default: the initial state.
        generator: draws the gates of gate="random", as in a forward pass over all rows; needs known lengths.
        check_inputs: refuse steps that are not finite. Otherwise a NaN causes an update and shows in the logits.
        gate_shift: number or [B] numbers, as in the model's forward: each row's operating point.
        update_rate: likewise.

    Returns:
        The model's output for the whole sequences, padded on the right to the longest. Gates equal those of a forward
        pass, and logits are equal up to rounding. The output always holds update_gates [B, T].

    Raises:
        ValueError: lengths, a fetched step or the state have a wrong shape or type, or are not finite; or a row ends
            before a step that was already fetched.
    """
    lengths = _lengths(length, batch_size)
    shift = fixed_shifts(model, len(lengths), gate_shift, update_rate)
    run = _Pull(Reader(model, generator, check_inputs, shift), fetch, lengths, state)
    is_base = run.reader.head is None
    out, real = run.run(sequence=is_base or model.per_frame)
    dtype = run.reader.dtype
    pooled = out.state.h[-1].to(dtype)
    loss = budget_of(run.reader.base.config, out.num_updates, real)
    common: dict[str, Any] = {
        "state": out.state,
        "num_updates": out.num_updates,
        "update_gates": out.update_gates,
        "budget_loss": loss,
    }
    if is_base:
        held = None if out.sequence is None else out.sequence.to(dtype)
        return SkipRNNModelOutput(last_hidden_state=held, pooler_output=pooled, **common)
    return SkipRNNClassifierOutput(logits=run.reader.logits(pooled if out.sequence is None else out.sequence), **common)


def _lengths(length: int | Sequence[int] | None, batch_size: int | None) -> list[int | None]:
    """Return the number of steps of every row; None if it is unknown."""
    if length is None or np.ndim(length) == 0:
        one = None if length is None else as_count(length, "length")
        lengths = [one] * (1 if batch_size is None else batch_size)
    else:
        lengths = [as_count(steps, "length") for steps in cast(Sequence[int], length)]
        if batch_size not in (None, len(lengths)):
            raise ValueError(f"length has {len(lengths)} rows, but batch_size is {batch_size}. Give one of the two.")
    if not lengths or any(steps is not None and steps < 0 for steps in lengths):
        raise ValueError(
            f"pull needs at least one row, and lengths of 0 or more; got {length}, batch_size={batch_size}."
        )
    return lengths


class _Pull:
    """The state of a pull: the position of each row, and what was read."""

    def __init__(self, reader: Reader, fetch: Fetch, lengths: list[int | None], state: SkipRNNState | None) -> None:
        self.reader, self.fetch = reader, fetch
        self.rows = len(lengths)
        self.ends = [NEVER if steps is None else steps for steps in lengths]
        self.state = reader.start(state, self.rows)
        self.ran = [0] * self.rows  # number of steps up to the last read, which is included
        self.plan = self._planned()
        pairs = zip(self.state.increment.float().tolist(), self.state.steps_since_update.tolist(), strict=True)
        self.at = [self._next(row, *pair) for row, pair in enumerate(pairs)]
        self.reads: list[tuple[Tensor, list[int], Tensor]] = []  # for every round: rows, positions, top layer's h

    def _planned(self) -> Tensor | None:
        """Draw the gates [B, T] of gate="random" as a forward pass does; return None for other gates."""
        base = self.reader.base
        if base.gate != "random":
            return None
        if NEVER in self.ends:
            raise ValueError("gate='random' draws the gates of whole rows in advance: give their length.")
        shape = torch.Size((self.rows, max(self.ends)))
        return plan_gates(base.gate, self.state, None, shape, base.skip_probability, base.stride, self.reader.generator)

    def _next(self, row: int, increment: float, steps_since_update: float) -> int:
        """Return the next step that a row reads, or NEVER."""
        if self.plan is not None:
            later = self.plan[row, self.ran[row] :].nonzero()
            return self.ran[row] + int(later[0]) if len(later) else NEVER
        wait = self.reader.steps_to_skip(increment, steps_since_update)
        return NEVER if wait == NEVER else self.ran[row] + wait

    def run(self, sequence: bool) -> tuple[ScanOutput, Tensor]:
        """Run all rounds; return the output and the rows' lengths [B]."""
        start = self.state.h[-1].clone()
        while wanted := [(row, self.at[row]) for row in range(self.rows) if self.at[row] < self.ends[row]]:
            x = self._ask(wanted)
            if x is not None:
                self._update(x, wanted, sequence)
        # Rows whose length is still unknown never read again.
        lengths = [self.ran[row] if end == NEVER else end for row, end in enumerate(self.ends)]
        return self._outcome(lengths, start if sequence else None)

    def _ask(self, wanted: list[Position]) -> Tensor | None:
        """Fetch the wanted steps [n, I]; return None if rows ended instead."""
        try:
            answer = self.fetch(list(wanted))
        except EndOfSequence as end:
            self._end(end.lengths, wanted)
            return None
        except Exception as error:
            error.add_note(f"raised by fetch, which was asked for (row, position) {_some(wanted)}")
            raise
        return self.reader.inputs(answer, len(wanted), f"What fetch answered to (row, position) {_some(wanted)}")

    def _end(self, lengths: dict[int, int], wanted: list[Position]) -> None:
        for row, length in lengths.items():
            steps = as_count(length, f"EndOfSequence's length of row {row}")
            if row not in range(self.rows) or steps < self.ran[row]:
                given = self.ran[row] if row in range(self.rows) else "no such row"
                raise ValueError(f"fetch ended row {row} after {steps} steps; steps already passed there: {given}.")
            self.ends[row] = steps
        if all(at < self.ends[row] for row, at in wanted):
            raise ValueError(
                f"fetch raised EndOfSequence({lengths}), but nothing that was asked for lies behind an end: "
                f"(row, position) {_some(wanted)}. Raise it only where a step is missing, with {{row: its length}}."
            )

    def _update(self, x: Tensor, wanted: list[Position], sequence: bool) -> None:
        state = self.state
        rows = torch.tensor([row for row, _ in wanted], device=x.device)
        self.reader.update(state, rows, x)
        self.reads.append((rows, [at for _, at in wanted], state.h[-1, rows if sequence else rows[:0]]))
        for (row, at), d in zip(wanted, state.increment[rows].float().tolist(), strict=True):
            self.ran[row] = at + 1
            self.at[row] = self._next(row, d, 0)

    def _outcome(self, lengths: list[int], start: Tensor | None) -> tuple[ScanOutput, Tensor]:
        """Return the output and the lengths. start [B, H]: the initial h; None if outputs of steps are not wanted."""
        state, device = self.state, self.state.h.device
        gates = state.increment.new_zeros(self.rows, max(lengths))
        events = torch.zeros(gates.shape, dtype=torch.long, device=device)  # index into `held` at each step
        events += torch.arange(self.rows, device=device).unsqueeze(1)
        held, count = [start] if start is not None else [], self.rows
        for rows, at, h in self.reads:
            steps = torch.tensor(at, device=device)
            gates[rows, steps] = 1
            events[rows, steps] = torch.arange(count, count + len(at), device=device)
            held.append(h)
            count += len(at)
        passed = torch.tensor([end - ran for end, ran in zip(lengths, self.ran, strict=True)], device=device)
        state = state._replace(steps_since_update=state.steps_since_update + passed)
        sequence = None if start is None else torch.cat(held)[events.cummax(1).values]
        real = torch.tensor(lengths, device=device)
        return ScanOutput(sequence, state, gates.sum(1), gates), real


def _some(wanted: list[Position]) -> str:
    return f"{wanted[:4]}" if len(wanted) <= 4 else f"{wanted[:4]} and {len(wanted) - 4} more"
