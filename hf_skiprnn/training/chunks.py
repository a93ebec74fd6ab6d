"""Truncated backpropagation through time: cut a long sequence into chunks, and carry the state from one to the next.

    state = None
    for chunk in chunks(batch, steps=500):
        out = model(**chunk, state=state)
        (out.budget_loss if out.loss is None else out.loss).backward()
        state = out.state.detach()
    optimizer.step()

The state holds the increment and the steps since the last update, so gates, updates and outputs are exactly those of
the whole sequence. `detach` stops gradients at the start of a chunk, so memory is needed for one chunk only.
With `gate_noise` each call would draw new shifts: draw them once, and pass them to every chunk as `gate_shift=`.
"""

from collections.abc import Iterator, Mapping

from torch import Tensor

TIME_AXIS = {"input_values": 1, "input_ids": 1, "attention_mask": 1, "forced_gates": 1}


def chunks(batch: Mapping[str, Tensor], steps: int) -> Iterator[dict[str, Tensor]]:
    """Cut a batch of model inputs into chunks along time.

    Pad sequences of different length on the left, so that every row ends in the last chunk. With budget_loss="cost" the
    budgets of the chunks add up to that of the whole sequence; with "l1" and "l2" the target applies to each chunk.
    With "rate", which a target share of steps sets, multiply the budget of each chunk by its share of the steps.

    Args:
        batch: input_values [B, T, I] or input_ids [B, T]; attention_mask and forced_gates [B, T]; labels. Labels of
            steps ([B, T] or [B, T, C], for SkipRNNForFrameClassification) are cut too. Labels of sequences are only in
            the last chunk.
        steps: number of steps of a chunk; the last one may have fewer.

    Yields:
        Model inputs of one chunk.

    Raises:
        ValueError: steps is below 1, the batch has no inputs, or their lengths differ.
    """
    if steps < 1:
        raise ValueError(f"A chunk needs at least one step; got steps={steps}.")
    timed = {name: value for name, value in batch.items() if name in TIME_AXIS}
    lengths = {name: value.shape[1] for name, value in timed.items()}
    if len(set(lengths.values())) != 1 or not {"input_values", "input_ids"} & set(timed):
        raise ValueError(
            f"A batch in chunks needs input_values [B, T, I] or input_ids [B, T], all of one length; got {lengths} "
            f"in a batch of {sorted(batch)}. Flatten pixel_values row by row."
        )
    total = next(iter(lengths.values()))
    labels = batch.get("labels")
    per_step = labels is not None and labels.dim() > 1 and labels.shape[1] == total
    if labels is not None and per_step:
        timed["labels"] = labels
    for start in range(0, total, steps):
        chunk = {name: value[:, start : start + steps] for name, value in timed.items()}
        if labels is not None and not per_step and start + steps >= total:
            chunk["labels"] = labels
        yield chunk
