"""Export a checkpoint to ONNX: `hf-skiprnn export`."""

import json
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoModelForTokenClassification

from hf_skiprnn.inference.export import OneUpdate, UpdateLoop, compare, quantize, save_onnx

from .option_parser import HelpFormatter, wrong_input_exits

DESCRIPTION = """Write a checkpoint as an ONNX graph that loops over updates, not steps; check it in onnxruntime.

    hf-skiprnn export runs/digits-skip-lstm digits.onnx
    hf-skiprnn export CHECKPOINT out.onnx --inputs rows.npy --gate_shift -0.5
    hf-skiprnn export CHECKPOINT step.onnx --one_update

Batch and time are dynamic. The graph takes input_values [B, T, input_size] (or input_ids [B, T]) and attention_mask
[B, T], and gives logits ([B, num_labels]; of a frame classifier [B, T, num_labels]), num_updates and update_gates.
--one_update writes the graph of a single update for streaming runtimes instead: input_values [B, input_size] (or
input_ids [B]), fresh [B], h, c -> logits, steps_to_skip, next_h, next_c. Needs: pip install "hf_skiprnn[export]".
"""
TOLERANCE = 1e-3  # largest difference of a float32 logit; a wrong graph differs by about the logit's own size


def parse(argv: list[str]) -> Namespace:
    """Return the options of the command line."""
    parser = ArgumentParser(
        prog="hf-skiprnn export", description=DESCRIPTION, formatter_class=HelpFormatter, allow_abbrev=False
    )
    parser.add_argument("checkpoint", help="folder, or Hub id of a repository")
    parser.add_argument("output", type=Path, help="the .onnx file to write")
    parser.add_argument("--one_update", action="store_true", help="the graph of one update, for streaming runtimes")
    parser.add_argument("--int8", action="store_true", help="int8 weights; the gate stays in float32")
    parser.add_argument(
        "--gate_shift",
        type=float,
        default=None,
        help="shift of the gate's bias instead of the checkpoint's own; below 0, fewer updates",
    )
    parser.add_argument(
        "--gate_shift_input",
        action="store_true",
        help="give the graph an input gate_shift [B]: each row's shift of the gate, instead of one shift for all",
    )
    parser.add_argument("--inputs", type=Path, help=".npy of real inputs to check on, [B, T, input_size] or ids [B, T]")
    parser.add_argument("--trust_remote_code", action="store_true", help="run the code of a checkpoint from the Hub")
    return parser.parse_args(argv)


def load(checkpoint: str, trust_remote_code: bool) -> Any:
    """Return the checkpoint's model, a classifier of sequences or of frames."""
    config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)
    of_frames = "SkipRNNForFrameClassification" in (config.architectures or ())
    kind: Any = AutoModelForTokenClassification if of_frames else AutoModelForSequenceClassification
    return kind.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)


def check_inputs(graph: UpdateLoop, path: Path | None) -> torch.Tensor:
    """Return the rows of a .npy file; without a file, random rows."""
    config = graph.base.config
    if path is not None:
        rows = torch.from_numpy(np.load(path))
        return rows.long() if config.vocab_size else rows.float()
    generator = torch.Generator().manual_seed(0)
    if config.vocab_size:
        return torch.randint(0, config.vocab_size, (8, 100), generator=generator)
    return torch.randn(8, 100, config.input_size, generator=generator)


def main(argv: list[str] | None = None) -> dict[str, object]:
    """Export a checkpoint, check the graph and print a report; exit with a message if graph and model differ."""
    options = parse(sys.argv[1:] if argv is None else argv)
    with wrong_input_exits():
        model = load(options.checkpoint, options.trust_remote_code)
    if options.gate_shift is not None:
        model.set_gate_shift(options.gate_shift)
    graph = (OneUpdate if options.one_update else UpdateLoop)(model, options.gate_shift_input)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    save_onnx(graph, options.output)
    if options.int8:
        quantize(options.output, options.output)
    report: dict[str, object] = {"file": str(options.output), "bytes": options.output.stat().st_size}
    if isinstance(graph, UpdateLoop):
        report |= checked(graph, options, report)
    print(json.dumps(report, indent=2))
    return report


def checked(graph: UpdateLoop, options: Namespace, report: dict[str, object]) -> dict[str, object]:
    """Compare the file with the model on rows of different lengths; exit with a message if they differ."""
    inputs = check_inputs(graph, options.inputs)
    lengths = torch.linspace(inputs.shape[1], 1, len(inputs)).long()
    mask = (torch.arange(inputs.shape[1]) < lengths.unsqueeze(1)).long()
    agreement = compare(graph, options.output, inputs, mask)
    if not options.int8 and (agreement.rows_with_other_gates or not agreement.logits_difference < TOLERANCE):
        raise SystemExit(
            f"{options.output} does not do what the model does: {json.dumps(report | agreement._asdict())}. A gate "
            "within float32 rounding of 0.5 can cause this by chance: check on other --inputs."
        )
    return agreement._asdict()
