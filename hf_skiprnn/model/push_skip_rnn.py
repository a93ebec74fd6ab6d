"""Push inference: steps arrive one by one, and after each update the model tells how many steps it will skip.

    stream = model.stream()
    while sensor.is_on():
        stream.push(sensor.read())              # returns False if the model skips the step, which takes a comparison
        sensor.sleep(stream.steps_to_skip)      # these steps need not be measured
        stream.skip(stream.steps_to_skip)

The number of steps is known in advance (N_skip of section 3.1): the increment D does not change between updates, so the
gate opens at the first k with float32(k * D) >= 0.5. A `Stream` is one sequence, a `StreamBatch` several that advance
together.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .cells_skip_rnn import NEVER
from .changed_modules_skip_rnn import storage_gap
from .operating_point_skip_rnn import Shift, fixed_shifts, stream_shift
from .outputs_skip_rnn import SkipRNNState
from .reader_skip_rnn import Reader, as_count, as_tensor, lasting, on_cpu
from .saved_stream_skip_rnn import pack, unpack


@lasting()
def stream(
    model: Any,
    batch_size: int | None = None,
    *,
    state: SkipRNNState | None = None,
    generator: torch.Generator | None = None,
    check_inputs: bool = True,
    gate_shift: Shift | None = None,
    update_rate: Shift | None = None,
) -> "Stream | StreamBatch":
    """Return a stream, which takes the steps of one or more sequences as they arrive, without gradients and dropout.

    Args:
        model: a Skip RNN with or without a head. The stream uses the model's own memory, so make a new stream after
            moving the model, training it or shifting its gate.
        batch_size: None for one sequence (`Stream`: push takes [input_size] and returns a bool); a number for several
            that advance together (`StreamBatch`: push takes [batch_size, input_size] and returns [batch_size] bool).
        state: SkipRNNState to continue from, of one row or of batch_size rows; default: the initial state.
        generator: draws the gates of gate="random".
        check_inputs: refuse a read step that is not finite. Otherwise a NaN causes an update and shows in the logits.
        gate_shift: number or [batch_size] numbers, as in the model's forward: each row's operating point. One number
            also holds for rows that join later.
        update_rate: likewise.

    Raises:
        ValueError: batch_size is negative or not a whole number; or the state has another shape or is damaged.
    """
    rows = 1 if batch_size is None else as_count(batch_size, "batch_size")
    if rows < 0:
        raise ValueError(f"batch_size must not be negative; got {batch_size}.")
    reader = Reader(model, generator, check_inputs, stream_shift(model, rows, gate_shift, update_rate))
    if batch_size is None:
        return Stream(reader, state)
    return StreamBatch(reader, reader.start(state, rows))


class _Copies:
    """Makes pickles and copies of a stream from its numbers, because they would not share memory with the model."""

    _reader: Reader
    _restore: Any
    state: Any
    step: Any
    steps_to_skip: Any

    def __getstate__(self) -> dict[str, Any]:
        return {"reader": self._reader, "saved": (self.state, self.step, self.steps_to_skip)}

    @lasting()
    def __setstate__(self, copied: dict[str, Any]) -> None:
        self._reader = copied["reader"]
        self._restore(*copied["saved"])


class Stream(_Copies):
    """A sequence that is processed step by step; made by `model.stream()`. A pickle of it contains the model."""

    def __init__(self, reader: Reader, state: SkipRNNState | None) -> None:
        self._reader = reader
        start = reader.start(state, 1)
        self._restore(start, 0, reader.waits(start)[0])

    def _restore(self, state: SkipRNNState, step: int, wait: int) -> None:
        """Continue from a state of one row at the step `step`. The stream will modify this state."""
        self._state, self._update = state, self._reader.row_update(state)
        config = self._reader.base.config
        self._width, self._is_text = (config.input_size,), config.vocab_size is not None
        self._step = step
        self._updated = step - int(state.steps_since_update)  # the step after the last update
        self._next = NEVER if wait == NEVER else step + wait  # the next step to read

    def push(self, x: Any, step: int | None = None) -> bool:
        """Process the next step; return whether the model read it.

        Args:
            x: [input_size] floating point, or a token id. It is ignored, and may be None, if the step is skipped.
            step: index of the step, from 0. Pass it to detect lost, repeated or swapped steps.

        Raises:
            ValueError: `step` is not the next one; or x is read and has a wrong width or type, or is not finite. The
                stream is not changed.
        """
        position = self._step
        if step is not None and step != position:
            raise ValueError(out_of_order(step, position, self.steps_to_skip))
        if position == self._next:
            self._read(x)
            return True
        self._step = position + 1
        return False

    def skip(self, steps: int) -> None:
        """Skip the next `steps` steps, which were not measured.

        Raises:
            ValueError: the model wants to read one of them; `steps` is negative or no whole number.
        """
        steps = as_count(steps, "skip's number of steps")
        if not 0 <= steps <= self.steps_to_skip:
            raise ValueError(must_read(steps, self.steps_to_skip, self._step))
        self._step += steps

    @property
    def step(self) -> int:
        """The index of the next step, from 0; it is also the number of steps so far."""
        return self._step

    @property
    def steps_to_skip(self) -> int:
        """The number of steps that will be skipped next; `cells_skip_rnn.NEVER` if no step will be read any more."""
        return NEVER if self._next == NEVER else self._next - self._step

    @property
    def logits(self) -> Tensor:
        """The logits [num_labels] after the steps so far."""
        return self._reader.logits(self._state.h[-1])[0]

    @property
    def state(self) -> SkipRNNState:
        """A copy of the state, a batch of one row: for `model(..., state=)`, `pull` or another stream."""
        steps_since_update = self._state.increment.new_tensor([self._step - self._updated])
        return self._state.map(Tensor.clone)._replace(steps_since_update=steps_since_update)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the stream as tensors that safetensors can save. The generator of a random gate is not included."""
        return pack(self.state, on_cpu([self._step]), on_cpu([self.steps_to_skip]))

    @lasting()
    def load_state_dict(self, saved: Mapping[str, Tensor]) -> None:
        """Continue exactly where another stream of the same model was saved.

        Raises:
            ValueError: names, shapes or values cannot be from such a stream. This stream is not changed.
        """
        state, step, wait = unpack(saved, self._reader)
        if len(step) != 1:
            raise ValueError(
                f"A Stream is one sequence; {len(step)} were saved. Load them into model.stream(batch_size)."
            )
        self._restore(state, int(step), int(wait))

    def _read(self, x: Any) -> None:
        quick = (
            type(x) is Tensor
            and x.shape == self._width
            and x.dtype == self._reader.dtype
            and x.device == self._reader.device
            and not (x.requires_grad or self._is_text or storage_gap(x))
            # If the sum is finite, all numbers are finite; otherwise the reader checks each number.
            and (not self._reader.check_inputs or math.isfinite(x.sum().item()))
        )
        self._update(x.unsqueeze(0) if quick else self._reader.inputs(x, 1, f"Step {self._step}"))
        self._step += 1
        self._updated = self._step
        wait = self._reader.steps_to_skip(self._state.increment.float().item(), 0)
        self._next = NEVER if wait == NEVER else self._step + wait


class StreamBatch(_Copies):
    """Several sequences that advance together, each with its own gate; made by `model.stream(batch_size)`.

    New rows join at the end. If a row leaves, the rows after it move up, as in a list.
    """

    def __init__(self, reader: Reader, state: SkipRNNState) -> None:
        self._reader = reader
        self._restore(state, on_cpu([0] * len(state.increment)), on_cpu(reader.waits(state)))

    def _restore(self, state: SkipRNNState, step: Tensor, waits: Tensor) -> None:
        self._state = state
        # Counters are on the CPU, so that a push without any read does not wait for a GPU.
        self._step = step
        self._updated = step - state.steps_since_update.long().cpu()  # the step after the last update
        self._next = next_reads(step, waits)

    def __len__(self) -> int:
        return len(self._step)

    def push(self, x: Any, step: Sequence[int] | Tensor | None = None) -> Tensor:
        """Process the next step of every row; return which rows read theirs: [batch_size] bool, on the CPU.

        Args:
            x: [batch_size, input_size] floating point, or token ids [batch_size]. Only rows whose steps_to_skip is 0
                are used; if there are none, x may be None.
            step: [batch_size], index of each row's step, from 0. Pass it to detect lost, repeated or swapped steps.

        Raises:
            ValueError: as in Stream.push. The streams are not changed.
        """
        if step is not None:
            self._check_order(torch.as_tensor(step))
        opened = self._step == self._next
        due = opened.nonzero().squeeze(1)
        if len(due):
            self._read(x, due)
        self._step += 1
        return opened

    def _check_order(self, step: Tensor) -> None:
        if step.shape != self._step.shape:
            raise ValueError(f"step must hold the index of each of {len(self)} rows' step; got {tuple(step.shape)}.")
        for row in (step != self._step).nonzero().flatten().tolist()[:1]:
            message = out_of_order(int(step[row]), int(self._step[row]), int(self.steps_to_skip[row]))
            raise ValueError(f"Row {row}: {message}")

    def _read(self, x: Any, due: Tensor) -> None:
        reader, state = self._reader, self._state
        x = as_tensor(x, reader.device, "x")
        if len(self) == 1 and x.dim() == (reader.base.config.vocab_size is None):
            x = x.unsqueeze(0)
        if not x.dim() or len(x) != len(self):
            raise ValueError(f"x must have a row for each of {len(self)} streams; got {tuple(x.shape)}.")
        rows = due.to(reader.device)
        reader.update(state, rows, reader.inputs(x[rows], len(due), f"x of the rows {due.tolist()}"))
        self._updated[due] = self._step[due] + 1
        waits = on_cpu([reader.steps_to_skip(d, 0) for d in state.increment[rows].float().tolist()])
        self._next[due] = next_reads(self._step[due] + 1, waits)

    def skip(self, steps: int) -> None:
        """Skip the next `steps` steps of every row, which were not measured.

        Raises:
            ValueError: the model wants to read one of them; `steps` is negative or not a whole number.
        """
        steps = as_count(steps, "skip's number of steps")
        waits = self.steps_to_skip
        for row in (waits < steps).nonzero().flatten().tolist()[:1] if steps >= 0 else range(len(self))[:1]:
            raise ValueError(f"Row {row}: {must_read(steps, int(waits[row]), int(self._step[row]))}")
        self._step += steps

    @lasting()
    def join(
        self,
        rows: int = 1,
        state: SkipRNNState | None = None,
        *,
        gate_shift: Shift | None = None,
        update_rate: Shift | None = None,
    ) -> range:
        """Add `rows` new sequences, from `state` or the initial one; return their row numbers.

        `gate_shift` or `update_rate`, a number or [rows] numbers, is their operating point. The default is that of the
        other streams, if these have one in common.

        Raises:
            ValueError: the state has another shape or is damaged; or each of the other streams was given a shift of its
                own, and the new ones were given none.
        """
        first, count = len(self), as_count(rows, "rows")
        shift = self._shift_with(count, fixed_shifts(self._reader.model, count, gate_shift, update_rate))
        new = StreamBatch(self._reader, self._reader.start(state, count))
        if shift is not self._reader.shift:
            self._reader = self._reader.shifted(shift)
        for name in ("_step", "_updated", "_next"):
            setattr(self, name, torch.cat((getattr(self, name), getattr(new, name))))
        old, started = self._state, new._state
        self._state = SkipRNNState(
            torch.cat((old.h, started.h), 1),
            None if old.c is None or started.c is None else torch.cat((old.c, started.c), 1),
            torch.cat((old.increment, started.increment)),
            torch.cat((old.steps_since_update, started.steps_since_update)),
        )
        return range(first, first + count)

    def _shift_with(self, rows: int, new: Tensor | None) -> Tensor | None:
        """Return the shifts of all streams after `rows` more have joined. `new`: [rows], or None: none was given."""
        old, config = self._reader.shift, self._reader.base.config
        if new is None:
            if old is not None and old.dim() and rows:
                raise ValueError(
                    "Each stream has a gate shift of its own: give gate_shift= or update_rate= for the rows that join."
                )
            return old
        old = new.new_tensor(config.gate_shift) if old is None else old
        return torch.cat((old if old.dim() else old.expand(len(self)), new))

    @lasting()
    def leave(self, rows: Sequence[int] | Tensor) -> None:
        """Remove the sequences in `rows`; those after them move up. Read their logits or state before.

        Raises:
            IndexError: there is no such row.
            ValueError: rows holds something else than whole numbers, or is one number.
        """
        if not isinstance(rows, Iterable) or (isinstance(rows, Tensor) and not rows.dim()):
            raise ValueError(f"leave takes the row numbers of the sequences as a list; got {rows!r}.")
        gone = {as_count(row, "a row of leave") for row in rows}
        if not gone <= set(range(len(self))):
            raise IndexError(f"rows must be in [0, {len(self)}); got {sorted(gone)}.")
        stay = on_cpu([row for row in range(len(self)) if row not in gone])
        self._step, self._updated, self._next = self._step[stay], self._updated[stay], self._next[stay]
        self._state = self._state.reorder(stay.to(self._reader.device))
        shift = self._reader.shift
        if gone and shift is not None and shift.dim():
            self._reader = self._reader.shifted(shift[stay.to(shift.device)])

    @property
    def step(self) -> Tensor:
        """The index of each row's next step, [batch_size]; it is 0 when the row joins."""
        return self._step.clone()

    @property
    def steps_to_skip(self) -> Tensor:
        """The number of steps that each row will skip next, [batch_size]; NEVER as in `Stream`."""
        return torch.where(self._next == NEVER, NEVER, self._next - self._step)

    @property
    def logits(self) -> Tensor:
        """The logits [batch_size, num_labels] after the steps so far."""
        return self._reader.logits(self._state.h[-1])

    @property
    def state(self) -> SkipRNNState:
        """A copy of the state: for `model(..., state=)`, `pull` or another stream."""
        steps_since_update = (self._step - self._updated).to(self._state.increment)
        return self._state.map(Tensor.clone)._replace(steps_since_update=steps_since_update)

    def state_dict(self) -> dict[str, Tensor]:
        """Return all streams as tensors that safetensors can save.

        The generator of a random gate is not included, nor are shifts of the gate: make the new streams with the same.
        """
        return pack(self.state, self._step.clone(), self.steps_to_skip)

    @lasting()
    def load_state_dict(self, saved: Mapping[str, Tensor]) -> None:
        """Continue exactly where streams of the same model were saved. The number of streams becomes the saved one.

        Raises:
            ValueError: names, shapes or values cannot be from such streams, or each of these streams was given a shift
                of its own, and there are not as many saved ones. These streams are not changed.
        """
        state, step, waits = unpack(saved, self._reader)
        shift = self._reader.shift
        if shift is not None and shift.dim() and len(shift) != len(step):
            raise ValueError(
                f"There are {len(step)} saved streams, but gate shifts of {len(shift)}. Make the streams with a shift "
                "for each saved one, or one number for all."
            )
        self._restore(state, step, waits)


def next_reads(steps: Tensor, waits: Tensor) -> Tensor:
    """Return the index of the next step that each row reads, [N] int64; waits: number of steps that it skips first."""
    return torch.where(waits == NEVER, NEVER, steps + waits).long()


def out_of_order(step: int, expected: int, wait: int) -> str:
    """Return the error message for pushing a step that is not the next one."""
    if step < expected:
        return f"step {step} came again or late; the next one is {expected}. Push every step once, in order."
    lost = step - expected
    remedy = f"call skip({lost}) first" if lost <= wait else f"and the model wants to read step {expected + wait}"
    return f"step {step} was pushed, but the next one is {expected}: {lost} are missing; {remedy}."


def must_read(steps: int, wait: int, step: int) -> str:
    """Return the error message for skipping a step that the model reads."""
    if steps < 0:
        return f"skip takes a number of steps, 0 or more; got {steps}."
    return f"skip({steps}) would pass over step {step + wait}, which the model reads. Skip at most {wait} and push it."
