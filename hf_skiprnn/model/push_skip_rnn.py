"""Push inference: steps come one by one, and after each update the model says how many it will not look at.

    stream = model.stream()
    while sensor.is_on():
        stream.push(sensor.read())              # False: skipped, at the price of a comparison
        sensor.sleep(stream.steps_to_skip)      # so many steps nobody needs to take
        stream.skip(stream.steps_to_skip)

The number is known at once (N_skip of section 3.1): the increment D is held between updates, so the gate opens at the
first k with float32(k * D) >= 0.5. `Stream` is one sequence; `StreamBatch` is many that advance together.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .cells_skip_rnn import NEVER
from .outputs_skip_rnn import SkipRNNState
from .reader_skip_rnn import Reader, as_tensor
from .row_update_skip_rnn import row_update


def stream(
    model: Any,
    batch_size: int | None = None,
    *,
    state: SkipRNNState | None = None,
    generator: torch.Generator | None = None,
    check_inputs: bool = True,
) -> "Stream | StreamBatch":
    """Take steps as they come. No gradients, no dropout; the weights are the model's own, read where they are.

    Args:
        model: a Skip RNN with or without a head. Make a new stream after moving or training it.
        batch_size: None for one sequence (`Stream`: push takes [input_size] and returns a bool); a number for so many
            that advance together (`StreamBatch`: push takes [batch_size, input_size] and returns [batch_size] bool).
        state: SkipRNNState to continue from, of one row or of batch_size rows; default: the initial state.
        generator: draws the gates of gate="random".
        check_inputs: refuse a step that is read and not finite. Otherwise a NaN updates and shows in the logits.

    Raises:
        ValueError: batch_size below 0, or a state that does not fit.
    """
    reader = Reader(model, generator, check_inputs)
    if batch_size is None:
        return Stream(reader, state)
    if batch_size < 0:
        raise ValueError(f"batch_size must not be negative; got {batch_size}.")
    return StreamBatch(reader, reader.start(state, batch_size))


class Stream:
    """One sequence, a step at a time; made by `model.stream()`."""

    def __init__(self, reader: Reader, state: SkipRNNState | None) -> None:
        self._reader = reader
        self._row = row_update(reader.layers, reader.gate, reader.cell)
        self._width = (reader.base.config.input_size,)
        self._is_text = reader.base.config.vocab_size is not None
        self._step = self._updated = self._next = 0  # next step; step after the last update; next step to read
        start = reader.start(state, 1)
        self._increment = start.increment
        self._load(start, 0)

    def push(self, x: Any, step: int | None = None) -> bool:
        """Take the next step; whether the model read it.

        Args:
            x: [input_size] floating point, or a token id. Not looked at if the step is skipped: None will do.
            step: its index, from 0: a guard against lost, doubled or swapped steps.

        Raises:
            ValueError: `step` is not the next one; x is read and of a wrong width or type, or not finite. The stream
                then is as before.
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
        """`steps` steps passed that nobody took.

        Raises:
            ValueError: the model wants to read one of them.
        """
        if not 0 <= steps <= self.steps_to_skip:
            raise ValueError(must_read(steps, self.steps_to_skip, self._step))
        self._step += steps

    @property
    def step(self) -> int:
        """Index of the next step, from 0: so many have passed."""
        return self._step

    @property
    def steps_to_skip(self) -> int:
        """So many of the next steps will not be read. `cells_skip_rnn.NEVER`: all of them."""
        return NEVER if self._next == NEVER else self._next - self._step

    @property
    def logits(self) -> Tensor:
        """[num_labels] after the steps so far."""
        return self._reader.logits(self._row.h[-1])[0]

    @property
    def state(self) -> SkipRNNState:
        """A copy of the state, a batch of one row: for `model(..., state=)`, `pull` or another stream."""
        since = self._increment.new_tensor([self._step - self._updated])
        c = torch.stack(self._row.c) if self._row.c else None
        return SkipRNNState(torch.stack(self._row.h), c, self._increment.clone(), since)

    def state_dict(self) -> dict[str, Tensor]:
        """All that the stream is, as tensors that safetensors can save; a random gate's coming draws excepted."""
        return pack(self.state, torch.tensor([self._step]), torch.tensor([self.steps_to_skip]))

    def load_state_dict(self, saved: Mapping[str, Tensor]) -> None:
        """Go on exactly where another stream of the same model was saved.

        Raises:
            ValueError: names or shapes that are not those of such a stream.
        """
        state, step, wait = unpack(saved, self._reader)
        if len(step) != 1:
            raise ValueError(
                f"A Stream is one sequence; {len(step)} were saved. Load them into model.stream(batch_size)."
            )
        self._load(state, int(step), int(wait))

    def _read(self, x: Any) -> None:
        quick = (
            type(x) is Tensor
            and x.shape == self._width
            and x.dtype == self._reader.dtype
            and x.device == self._reader.device
            and not (x.requires_grad or self._is_text)
            # One number tells that all are finite; where it does not, the reader looks closely.
            and (not self._reader.check_inputs or math.isfinite(x.sum().item()))
        )
        row = x.unsqueeze(0) if quick else self._reader.inputs(x, 1, f"Step {self._step}")
        increment = self._row.update(row)
        self._increment = torch.zeros_like(self._increment) if increment is None else increment
        self._step += 1
        self._updated = self._step
        self._plan(self._reader.steps_to_skip(self._increment.float().item(), 0))

    def _load(self, state: SkipRNNState, step: int, wait: int | None = None) -> None:
        self._row.load(state.h, state.c)
        self._increment = state.increment
        since = int(state.steps_since_update)
        self._step, self._updated = step, step - since
        self._plan(self._reader.steps_to_skip(state.increment.float().item(), since) if wait is None else wait)

    def _plan(self, wait: int) -> None:
        self._next = NEVER if wait == NEVER else self._step + wait


class StreamBatch:
    """Many sequences that advance together, each with its own gate; made by `model.stream(batch_size)`.

    Rows join at the end; where one leaves, those behind it move up, as in a list.
    """

    def __init__(self, reader: Reader, state: SkipRNNState) -> None:
        self._reader = reader
        self._state = state
        # On the CPU, so that a push that reads nothing does not wait for a GPU.
        self._step = torch.zeros(len(state.increment), dtype=torch.long)
        self._updated = -state.steps_since_update.long().cpu()  # the step after the last update
        self._next = next_reads(self._step, self._waits(state))

    def _waits(self, state: SkipRNNState) -> list[int]:
        pairs = zip(state.increment.float().tolist(), state.steps_since_update.tolist(), strict=True)
        return [self._reader.steps_to_skip(*pair) for pair in pairs]

    def __len__(self) -> int:
        return len(self._step)

    def push(self, x: Any, step: Sequence[int] | Tensor | None = None) -> Tensor:
        """Take every row's next step; which rows read theirs: [batch_size] bool, on the CPU.

        Args:
            x: [batch_size, input_size] floating point, or token ids [batch_size]. Only rows whose steps_to_skip is 0
                are looked at; where there is none, None will do.
            step: [batch_size], the index of each row's step, from 0: a guard against lost, doubled or swapped steps.

        Raises:
            ValueError: as Stream.push. The streams then are as before.
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
        x = reader.inputs(x[rows], len(due), f"x of the rows {due.tolist()}")
        h, c = list(state.h[:, rows]), [] if state.c is None else list(state.c[:, rows])
        increment = reader.update(x, h, c)
        state.h[:, rows] = torch.stack(h)
        if state.c is not None:
            state.c[:, rows] = torch.stack(c)
        state.increment[rows] = increment
        self._updated[due] = self._step[due] + 1
        waits = [reader.steps_to_skip(d, 0) for d in increment.float().tolist()]
        self._next[due] = next_reads(self._step[due] + 1, waits)

    def skip(self, steps: int) -> None:
        """`steps` steps of every row passed that nobody took.

        Raises:
            ValueError: some row's model wants to read one of them.
        """
        waits = self.steps_to_skip
        for row in (waits < steps).nonzero().flatten().tolist()[:1] if steps >= 0 else range(len(self))[:1]:
            raise ValueError(f"Row {row}: {must_read(steps, int(waits[row]), int(self._step[row]))}")
        self._step += steps

    def join(self, rows: int = 1, state: SkipRNNState | None = None) -> range:
        """`rows` new sequences, from `state` or the initial one; their row numbers.

        Raises:
            ValueError: a state of another shape.
        """
        first, new = len(self), StreamBatch(self._reader, self._reader.start(state, rows))
        self._step, self._updated, self._next = (
            torch.cat((getattr(self, name), getattr(new, name))) for name in ("_step", "_updated", "_next")
        )
        old = self._state
        c = None if old.c is None or new._state.c is None else torch.cat((old.c, new._state.c), 1)
        increment = torch.cat((old.increment, new._state.increment))
        self._state = SkipRNNState(torch.cat((old.h, new._state.h), 1), c, increment, torch.zeros_like(increment))
        return range(first, first + rows)

    def leave(self, rows: Sequence[int]) -> None:
        """The sequences in `rows` end; those behind them move up. Take their logits or state before.

        Raises:
            IndexError: there is no such row.
        """
        gone = set(rows)
        if not gone <= set(range(len(self))):
            raise IndexError(f"rows must be in [0, {len(self)}); got {sorted(gone)}.")
        stay = torch.tensor([row for row in range(len(self)) if row not in gone], dtype=torch.long)
        self._step, self._updated, self._next = self._step[stay], self._updated[stay], self._next[stay]
        self._state = self._state.reorder(stay.to(self._reader.device))

    @property
    def step(self) -> Tensor:
        """[batch_size], index of each row's next step, from 0 where it joined."""
        return self._step.clone()

    @property
    def steps_to_skip(self) -> Tensor:
        """[batch_size]: so many of a row's next steps will not be read. `cells_skip_rnn.NEVER`: all of them."""
        return torch.where(self._next == NEVER, NEVER, self._next - self._step)

    @property
    def logits(self) -> Tensor:
        """[batch_size, num_labels] after the steps so far."""
        return self._reader.logits(self._state.h[-1])

    @property
    def state(self) -> SkipRNNState:
        """A copy of the state: for `model(..., state=)`, `pull` or another stream."""
        h, c, increment, _ = self._state
        since = (self._step - self._updated).to(increment)
        return SkipRNNState(h.clone(), None if c is None else c.clone(), increment.clone(), since)

    def state_dict(self) -> dict[str, Tensor]:
        """All that the streams are, as tensors that safetensors can save; a random gate's coming draws excepted."""
        return pack(self.state, self._step.clone(), self.steps_to_skip)

    def load_state_dict(self, saved: Mapping[str, Tensor]) -> None:
        """Go on exactly where streams of the same model were saved; their number is the saved one's.

        Raises:
            ValueError: names or shapes that are not those of such streams.
        """
        state, step, wait = unpack(saved, self._reader)
        self._state, self._step = state, step.clone()
        self._updated = step - state.steps_since_update.long().cpu()
        self._next = next_reads(step, wait.tolist())


def next_reads(steps: Tensor, waits: Iterable[int]) -> Tensor:
    """The next step that each row reads, [N], from its step [N] and the steps that it skips."""
    pairs = zip(steps.tolist(), waits, strict=True)
    return torch.tensor([NEVER if wait == NEVER else step + wait for step, wait in pairs], dtype=torch.long)


def pack(state: SkipRNNState, step: Tensor, wait: Tensor) -> dict[str, Tensor]:
    """A stream's tensors by name."""
    named = state._asdict() | {"step": step, "steps_to_skip": wait}
    return {name: part.contiguous() for name, part in named.items() if part is not None}


def unpack(saved: Mapping[str, Tensor], reader: Reader) -> tuple[SkipRNNState, Tensor, Tensor]:
    """The inverse of `pack`, checked."""
    wanted = {"h", "increment", "steps_since_update", "step", "steps_to_skip"}
    wanted |= {"c"} if reader.cell.has_cell_state else set()
    if set(saved) != wanted:
        raise ValueError(f"A saved stream must hold {sorted(wanted)}; got {sorted(saved)}.")
    rows = len(saved["increment"])
    for name in ("step", "steps_to_skip"):
        if saved[name].shape != (rows,):
            raise ValueError(f"A saved stream of {rows} rows needs {name} [{rows}]; got {tuple(saved[name].shape)}.")
    moved = {name: part.to(reader.device) for name, part in saved.items()}
    state = SkipRNNState(moved["h"], moved.get("c"), moved["increment"], moved["steps_since_update"])
    return reader.start(state, rows), saved["step"].cpu(), saved["steps_to_skip"].cpu()


def out_of_order(step: int, expected: int, wait: int) -> str:
    """What to say to a push of another step than the next one."""
    if step < expected:
        return f"step {step} came again or late; the next one is {expected}. Push every step once, in order."
    lost = step - expected
    remedy = f"call skip({lost}) first" if lost <= wait else f"and the model wants to read step {expected + wait}"
    return f"step {step} was pushed, but the next one is {expected}: {lost} are missing; {remedy}."


def must_read(steps: int, wait: int, step: int) -> str:
    """What to say to a skip over a step that the model reads."""
    if steps < 0:
        return f"skip takes a number of steps, 0 or more; got {steps}."
    return f"skip({steps}) would pass over step {step + wait}, which the model reads. Skip at most {wait} and push it."
