"""What pull and push inference share: the time to the next update, inputs checked and embedded, rows updated."""

from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .cells_skip_rnn import CELLS, GateWeights, LayerWeights, state_dtype, steps_to_skip
from .event_forward_skip_rnn import update
from .inputs_skip_rnn import check_state
from .outputs_skip_rnn import SkipRNNState

Weights = TypeVar("Weights", LayerWeights, GateWeights)


class Reader:
    """What pull and push share: inputs checked and embedded, rows updated, the time to the next update."""

    def __init__(self, model: Any, generator: torch.Generator | None, check_inputs: bool) -> None:
        self.base = model.base_model
        self.head = None if self.base is model else model.classifier
        self.generator, self.check_inputs = generator, check_inputs
        weight = self.base.layers[0].weight_hh
        self.device, self.dtype, self.state_dtype = weight.device, weight.dtype, state_dtype(weight)
        self.cell = CELLS[self.base.cell]
        self.layers = [detached(layer.weights()) for layer in self.base.layers]
        gate = self.base.gate_weights()
        self.gate = None if gate is None else detached(gate)

    def start(self, state: SkipRNNState | None, batch: int) -> SkipRNNState:
        """`state` or the initial one, in memory of its own, without history."""
        state = self.base.initial_state(batch) if state is None else check_state(self.base, state, batch)
        h, c, increment, steps = state.detach()
        return SkipRNNState(h.clone(), None if c is None else c.clone(), increment.clone(), steps.clone())

    def steps_to_skip(self, increment: float, steps: float) -> int:
        """Steps until the next update, for every kind of gate."""
        if self.gate is not None:
            return steps_to_skip(increment, steps)
        if self.base.gate == "always" or increment == 1:  # a fresh row reads its first step
            return 0
        if self.base.gate == "strided":
            return (-int(steps) - 1) % self.base.stride
        skipped = 0
        while torch.rand((), generator=self.generator).item() < self.base.skip_probability:
            skipped += 1
        return skipped

    def inputs(self, x: Any, rows: int, where: str) -> Tensor:
        """[rows, I] from numbers or token ids.

        Raises:
            ValueError: another shape or type, an unknown token, or, with check_inputs, a value that is not finite.
        """
        x = as_tensor(x, self.device, where)
        if self.base.config.vocab_size is not None:
            return self._embed(x, rows, where)
        wanted = (rows, self.base.config.input_size)
        if rows == 1 and x.dim() < 2 and x.numel() == wanted[1]:
            x = x.reshape(wanted)
        if x.shape != wanted:
            raise ValueError(f"{where} must be [rows, input_size] = {wanted}; got {tuple(x.shape)}.")
        if not x.is_floating_point():
            raise ValueError(f"{where} must be floating point; got {x.dtype}. Scale it as in training.")
        if self.check_inputs and not bool(x.isfinite().all()):
            row, column = (~x.isfinite()).nonzero()[0].tolist()
            raise ValueError(
                f"{where} holds {x[row, column].item()} in row {row}, column {column}. Clean the data, or let it "
                "through with check_inputs=False: then a NaN updates and shows in the logits."
            )
        return x.to(self.dtype)

    def _embed(self, ids: Tensor, rows: int, where: str) -> Tensor:
        ids = ids.reshape(1) if rows == 1 and ids.numel() == 1 else ids
        if ids.shape != (rows,) or ids.is_floating_point() or ids.dtype == torch.bool:
            raise ValueError(f"{where} must be token ids, integers [{rows}]; got {ids.dtype} {tuple(ids.shape)}.")
        vocab = self.base.config.vocab_size
        if bool(((ids < 0) | (ids >= vocab)).any()):
            raise ValueError(f"{where} must be in [0, vocab_size = {vocab}); got {ids.tolist()}.")
        return F.embedding(ids, self.base.embeddings.weight.detach())

    def update(self, x: Tensor, h: list[Tensor], c: list[Tensor]) -> Tensor:
        """One update of some rows: replaces h, c (a layer [N, H]); their increments [N], 0 where nothing is learned."""
        increment = update(x, h, c, self.layers, self.gate, self.cell)
        return h[0].new_zeros(len(x)) if increment is None else increment

    def logits(self, h: Tensor) -> Tensor:
        """[N, num_labels] of the top layer's h [N, H], by whatever stands for the classifier; no dropout before it."""
        if self.head is None:
            raise AttributeError("SkipRNNModel has no classifier, so no logits. Read the state's h.")
        with torch.no_grad():
            return self.head(h.to(self.dtype))


def detached(weights: Weights) -> Weights:
    """The same memory without gradients, so that no graph is ever built."""
    return weights._replace(**{name: w.detach() for name, w in weights._asdict().items() if w is not None})


def as_tensor(x: Any, device: torch.device, where: str) -> Tensor:
    """A tensor, array, number, or list of such, as a tensor without history."""
    if isinstance(x, Tensor):
        return x.detach().to(device)
    try:
        if isinstance(x, (list, tuple)) and x and isinstance(x[0], Tensor):
            return torch.stack([part.detach() for part in x]).to(device)
        array = np.asarray(x)
        return torch.tensor(array, device=device) if array.ndim else torch.as_tensor(x, device=device)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{where} must be an array of numbers; got {type(x).__name__} ({error}).") from error
