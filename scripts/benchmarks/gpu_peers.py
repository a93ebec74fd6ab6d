"""The runs that gpu.py times: our engine, cuDNN, and Skip RNNs in plain PyTorch, with and without CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hf_skiprnn.model.cells_skip_rnn import CELLS, steps_to_update
from hf_skiprnn.model.event_forward_skip_rnn import update
from hf_skiprnn.model.layers_skip_rnn import layer_weights
from scripts.benchmarks.peers import masked_loop, masked_loop_compiled, native, native_packed, ours, skip_layer
from scripts.benchmarks.workload import Run, Workload


def graphed(run: Run | None) -> Run | None:
    """Return the run as a CUDA graph, which leaves out the time that Python takes to launch kernels."""
    if run is None:
        return None
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    replay: Run = graph.replay
    return replay


def ours_on_gpu(workload: Workload) -> Run:
    """Return a run of our layer in the Triton engine."""
    return ours(workload, backend="triton")


def events(workload: Workload) -> Run:
    """Return a run of our layer in plain PyTorch: the event scan."""
    return ours(workload, backend="events")


def event_rounds(workload: Workload) -> Run | None:
    """Return a run of the event scan with a number of rounds known in advance: all rows have the same interval.

    A round reads one input of each row, updates all rows and computes the next update from the gate. In training the
    backward pass leaves out the gate's gradient at skipped steps, so it does less work than the exact one.
    """
    shape = workload.shape
    if workload.gates is not None or shape.sequence:
        return None
    layer = skip_layer(workload)
    rounds = workload.updates() // shape.batch
    rows = torch.arange(shape.batch, device=workload.device) * shape.steps

    def forward(x: Tensor) -> Tensor:
        weights, gate = [layer_weights(part) for part in layer.current_layers()], layer.gate_weights()
        state = layer.initial_state(shape.batch)
        h, c = list(state.h.unbind()), [] if state.c is None else list(state.c.unbind())
        flat, at = x.flatten(0, 1), torch.zeros_like(rows)
        increment = state.increment
        for _ in range(rounds):
            new = update(flat.index_select(0, rows + at), h, c, weights, gate, CELLS[layer.cell])
            increment = increment if new is None else new
            ahead = steps_to_update(increment, torch.zeros_like(increment), shape.steps - 1 - at)
            at = (at + ahead).clamp(max=shape.steps - 1)
        return h[-1] if workload.mode == "inference" else h[-1].sum() + increment.sum()

    return workload.run(forward, list(layer.parameters()))


PEERS: dict[str, Callable[[Workload], Run | None]] = {
    "native": native,
    "ours": ours_on_gpu,
    "native_graphed": lambda workload: graphed(native(workload)),
    "ours_graphed": lambda workload: graphed(ours_on_gpu(workload)),
    "native_packed": native_packed,
    "events": events,
    "events_graphed": lambda workload: graphed(event_rounds(workload)),
    "masked_loop": masked_loop,
    "masked_loop_graphed": lambda workload: graphed(masked_loop(workload)),
    "masked_loop_compiled": masked_loop_compiled,
}
