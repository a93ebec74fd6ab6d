"""Export Skip RNNs as torch.export programs and ONNX graphs whose loop runs over updates, not over steps.

There are two graphs. `UpdateLoop` takes whole sequences. Its loop runs once for each update of the row that has the
most updates, and reads only the inputs of updates. `OneUpdate` is for streaming: it computes one update of some rows
and the number of steps that they then skip. The program that runs the graph counts these steps.

torch.export.export(model, ...) is another way, for PyTorch alone: there the native engine is one operator of the
program. A process that loads such a program first registers the operator: `import hf_skiprnn.kernels.cpu.operators`.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._higher_order_ops.while_loop import while_loop

from hf_skiprnn.model.cells_skip_rnn import CELLS, LARGEST_COUNT, NEVER, steps_to_update
from hf_skiprnn.model.event_forward_skip_rnn import update
from hf_skiprnn.model.layers_skip_rnn import layer_weights

OPSET = 20


class Exported(nn.Module):
    """The base class of both graphs: it holds a classifier of sequences or frames, and computes updates of its rows.

    Args:
        model: the classifier.
        shift_input: give the graph one more input, gate_shift: a number for each row, which is added to the gate's
            bias instead of `config.gate_shift`. Without it the graph keeps the config's shift.

    Raises:
        ValueError: the model has no classifier, is not float32, or its gate is random; or `shift_input` for a gate that
            is not learned.
    """

    def __init__(self, model: Any, shift_input: bool = False) -> None:
        super().__init__()
        base = model.base_model
        if base is model:
            raise ValueError(
                f"Export takes SkipRNNForSequenceClassification or SkipRNNForFrameClassification; got "
                f"{type(model).__name__}, which has no classifier."
            )
        if base.gate == "random":
            raise ValueError("gate='random' draws random numbers, which the graph cannot repeat; export another gate.")
        if shift_input and base.gate != "learned":
            raise ValueError(f"Only a learned gate has a shift; this model has gate={base.gate!r}.")
        if (dtype := model.classifier.weight.dtype) != torch.float32:
            raise ValueError(
                f"Export takes float32 weights, because gates are computed in float32; got {dtype}. Use model.float()."
            )
        self.model, self.base = model.eval(), base
        self.cell, self.shift_input = CELLS[base.cell], shift_input

    def update(self, x: Tensor, states: Sequence[Tensor], shift: Tensor | None) -> tuple[list[Tensor], Tensor]:
        """Return the states of N rows after one update, and the number of steps until the next update.

        Args:
            x: numbers [N, I] or token ids [N].
            states: h of each layer, bottom first, then c of each layer; each [N, H].
            shift: [N], each row's shift of the gate; None: the config's.

        The second result is [N, 1] int64, at least 1. It exceeds LARGEST_COUNT if the gate never opens again.
        """
        layers = [layer_weights(layer) for layer in self.base.current_layers()]
        h, c = list(states[: len(layers)]), list(states[len(layers) :])
        if self.base.config.vocab_size is not None:
            x = self.base.embeddings(x)
        increment = update(x, h, c, layers, self.base.gate_weights(shift), self.cell)
        if increment is None:
            stride = self.base.stride if self.base.gate == "strided" else 1
            return h + c, torch.full_like(h[0][:, :1], stride, dtype=torch.long)
        limit = torch.full_like(increment, LARGEST_COUNT, dtype=torch.long)
        return h + c, steps_to_update(increment, torch.zeros_like(increment), limit).unsqueeze(1)

    def start(self, rows: int) -> list[Tensor]:
        """Return the states before the first step, in the form that `update` takes."""
        state = self.base.initial_state(rows)
        return [*state.h.unbind(), *(() if state.c is None else state.c.unbind())]

    def logits(self, states: Sequence[Tensor]) -> Tensor:
        """Return logits [N, num_labels] from the top layer's h."""
        return self.model.classifier(states[len(self.base.layers) - 1])


class UpdateLoop(Exported):
    """A graph for whole sequences: from inputs and an attention mask to logits, num_updates and update_gates."""

    def forward(
        self, inputs: Tensor, attention_mask: Tensor, gate_shift: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits, num_updates [B] and update_gates [B, T] of 0 and 1, all float32.

        The logits are [B, num_labels]; for a frame classifier [B, T, num_labels].

        Args:
            inputs: [B, T, input_size] float32, or token ids [B, T] int64.
            attention_mask: [B, T] int64, 1 at real steps.
            gate_shift: [B] float32; only with `shift_input`.
        """
        batch, steps = inputs.shape[:2]
        real = attention_mask != 0
        lengths = real.sum(1, keepdim=True)
        # Sort positions: real steps first, then masked ones, each in order. All keys differ, so the order is unique.
        place = torch.arange(steps, device=inputs.device)
        order = torch.topk(torch.where(real, steps - place, -place), steps, dim=1).indices
        # Add a column, which rows read after their end; what they compute from it is dropped.
        flat_order = (
            torch.cat((order, order[:, :1]), 1) + torch.arange(batch, device=inputs.device).unsqueeze(1) * steps
        )
        flat, one = inputs.flatten(0, 1), torch.ones_like(lengths, dtype=torch.uint8)

        def condition(at: Tensor, gates: Tensor, *carried: Tensor) -> Tensor:
            return (at < lengths).any()

        def body(at: Tensor, gates: Tensor, *carried: Tensor) -> tuple[Tensor, ...]:
            states, kept_logits = carried[:parts], carried[parts:]
            x = flat.index_select(0, flat_order.gather(1, at).squeeze(1))
            new, wait = self.update(x, states, gate_shift)
            alive = at < lengths
            kept = [torch.where(alive, part, old) for part, old in zip(new, states, strict=True)]
            later = (at + wait).minimum(lengths)
            return later, gates.scatter(1, at, one), *kept, *self.keep_logits(kept_logits, kept)

        gates = torch.zeros(batch, steps + 1, dtype=torch.uint8, device=inputs.device)  # in the order of `order`
        start = [part.clone() for part in self.start(batch)]  # while_loop refuses inputs that share memory
        parts = len(start)
        carried = (torch.zeros_like(lengths), gates, *start, *self.start_logits(start, steps))
        _, gates, *out = while_loop(condition, body, carried)
        opened = torch.zeros_like(gates[:, :steps]).scatter(1, order, gates[:, :steps]).to(inputs.device)
        opened = (opened * real).to(start[0].dtype)
        return self.logits_of(out[:parts], out[parts:], opened), opened.sum(1), opened

    # A frame classifier's logits change at updates only. The loop stores them after every round; round r is the r-th
    # update of every row that has not ended. Step t then takes the logits of round r = its row's updates up to t.

    def start_logits(self, start: Sequence[Tensor], steps: int) -> list[Tensor]:
        """Return the round number, [1], and a buffer of all rounds' logits, [1 + steps, B, C]; [] without frames."""
        if not self.model.per_frame:
            return []
        first = self.logits(start).unsqueeze(0)
        rounds = torch.zeros(1, dtype=torch.long, device=first.device)
        return [rounds, torch.cat((first, first.new_zeros(steps, *first.shape[1:])))]

    def keep_logits(self, kept: Sequence[Tensor], states: Sequence[Tensor]) -> list[Tensor]:
        """Return `kept` with the logits of one more round."""
        if not self.model.per_frame:
            return []
        rounds, logits = kept[0] + 1, self.logits(states).unsqueeze(0)
        return [rounds, kept[1].scatter(0, rounds.view(1, 1, 1).expand_as(logits), logits)]

    def logits_of(self, states: Sequence[Tensor], kept: Sequence[Tensor], opened: Tensor) -> Tensor:
        """Return logits [B, C] of the last states; for frames, [B, T, C] picked from `kept` by the gates [B, T]."""
        if not self.model.per_frame:
            return self.logits(states)
        updates = opened.long().cumsum(1).unsqueeze(2)
        return kept[1].transpose(0, 1).gather(1, updates.expand(-1, -1, kept[1].shape[2]))


class OneUpdate(Exported):
    """A graph of one update of N rows. The caller runs it at steps that are read, and counts the steps to skip."""

    def forward(
        self, x: Tensor, fresh: Tensor, h: Tensor, c: Tensor | None = None, gate_shift: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Return logits [N, num_labels], steps_to_skip [N] int64, h, and for an LSTM c.

        Args:
            x: [N, input_size] float32, or token ids [N] int64.
            fresh: [N] bool, true for rows at their first step; their h and c are ignored.
            h: [L, N, H] float32.
            c: [L, N, H] float32; None for a GRU.
            gate_shift: [N] float32; only with `shift_input`.
        """
        given = [*h.unbind(), *(() if c is None else c.unbind())]
        start = self.start(x.shape[0])
        states = [torch.where(fresh.unsqueeze(1), first, old) for first, old in zip(start, given, strict=True)]
        states, steps = self.update(x, states, gate_shift)
        wait = torch.where(steps > LARGEST_COUNT, NEVER, steps - 1).squeeze(1)
        layers = len(self.base.layers)
        stacked = [torch.stack(part) for part in (states[:layers], states[layers:]) if part]
        return self.logits(states), wait, *stacked


def program(graph: Exported) -> torch.export.ExportedProgram:
    """Return the torch.export program of a graph; batch size and length are dynamic."""
    config, dynamic = graph.base.config, torch.export.Dim.DYNAMIC
    text = config.vocab_size is not None
    arguments: list[Tensor | None]
    shapes: list[dict[int, Any] | None]
    if isinstance(graph, UpdateLoop):
        inputs = torch.zeros(2, 3, dtype=torch.long) if text else torch.zeros(2, 3, config.input_size)
        arguments = [inputs, torch.ones(2, 3, dtype=torch.long)]
        shapes = [{0: dynamic, 1: dynamic}, {0: dynamic, 1: dynamic}]
    else:
        x = torch.zeros(2, dtype=torch.long) if text else torch.zeros(2, config.input_size)
        state = torch.zeros(config.num_hidden_layers, 2, config.hidden_size)
        arguments = [x, torch.ones(2, dtype=torch.bool), state, None]
        shapes = [{0: dynamic}, {0: dynamic}, {1: dynamic}, None]
        if graph.cell.has_cell_state:
            arguments[3], shapes[3] = state.clone(), {1: dynamic}
    if graph.shift_input:
        arguments.append(torch.zeros(2))
        shapes.append({0: dynamic})
    with torch.no_grad():
        return torch.export.export(graph, tuple(arguments), dynamic_shapes=tuple(shapes))


def names(graph: Exported) -> tuple[list[str], list[str]]:
    """Return the names of a graph's inputs and outputs, in order."""
    main = graph.base.main_input_name
    shift = ["gate_shift"] if graph.shift_input else []
    if isinstance(graph, UpdateLoop):
        return [main, "attention_mask", *shift], ["logits", "num_updates", "update_gates"]
    state = ["h", "c"] if graph.cell.has_cell_state else ["h"]
    inputs = [main, "fresh", *state, *shift]
    return inputs, ["logits", "steps_to_skip", *(f"next_{name}" for name in state)]


def save_onnx(graph: Exported, path: str | Path) -> torch.export.ExportedProgram:
    """Write a graph as ONNX and return its torch.export program. Needs the `export` extra.

    UpdateLoop has the inputs input_values or input_ids, and attention_mask; and the outputs logits, num_updates and
    update_gates. OneUpdate has the inputs input_values or input_ids, fresh, h and c; and the outputs logits,
    steps_to_skip, next_h and next_c. A GRU has no c. With `shift_input` both have the input gate_shift.
    """
    inputs, outputs = names(graph)
    source = program(graph)
    exported = torch.onnx.export(
        source, input_names=inputs, output_names=outputs, opset_version=OPSET, dynamo=True, verbose=False
    )
    assert exported is not None
    exported.optimize()
    exported.save(path)
    return source


def quantize(path: str | Path, to: str | Path) -> None:
    """Quantize an ONNX graph to int8: weights now, activations at run time. The update gate stays float32.

    Rounded weights change the states, which can change gates near the threshold. Measure the accuracy afterwards. Needs
    the `export` extra.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    gates = [node.name for node in _nodes(onnx.load(path).graph) if any("update_gate" in name for name in node.input)]
    gates += [f"{name}_MatMul" for name in gates]  # the quantizer splits a Gemm, and names its product so
    options = {"EnableSubgraph": True}  # quantize the body of the loop too
    quantize_dynamic(Path(path), Path(to), weight_type=QuantType.QInt8, nodes_to_exclude=gates, extra_options=options)


def _nodes(graph: Any) -> Iterator[Any]:
    """Yield the nodes of an ONNX graph and of the graphs inside it."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g)


class Agreement(NamedTuple):
    """The differences between the results of an ONNX graph and its model."""

    rows: int
    rows_with_other_gates: int
    logits_difference: float  # largest absolute difference in rows whose gates are equal
    updates: float  # mean per row, of the ONNX graph


def session(path: str | Path) -> Any:
    """Return an onnxruntime session with one thread on the CPU. Needs the `export` extra."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors only: otherwise it logs a line for every folded constant
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def compare(graph: UpdateLoop, path: str | Path, inputs: Tensor, attention_mask: Tensor) -> Agreement:
    """Run the graph at `path` in onnxruntime and compare it with its model; inputs as for UpdateLoop.forward."""
    name = graph.base.main_input_name
    given = {name: inputs, "attention_mask": attention_mask}
    if graph.shift_input:  # a different shift for each row, around the config's
        given["gate_shift"] = graph.base.config.gate_shift + torch.linspace(-1, 1, len(inputs))
    feed = {name: value.numpy() for name, value in given.items()}
    logits, updates, gates = map(torch.from_numpy, session(path).run(None, feed))
    with torch.no_grad():
        want = graph.model(**given, output_update_gates=True)
    same = (gates == want.update_gates).all(1)
    difference = (logits - want.logits)[same].abs()
    worst = float(difference.max()) if difference.numel() else float("nan")
    return Agreement(len(inputs), int((~same).sum()), worst, float(updates.mean()))
