"""Models that skip steps, their inputs, and the forward pass with which pull and push inference must agree."""

from collections.abc import Callable

import torch

from hf_skiprnn import SkipRNNConfig, SkipRNNForSequenceClassification
from hf_skiprnn.model.pull_skip_rnn import Position

STEPS = 40
VARIANTS = [
    {},
    {"num_hidden_layers": 3},
    {"cell_type": "gru", "num_hidden_layers": 2},
    {"cell_type": "gru", "gru_reset": "after"},
    {"gate": "always"},
    {"gate": "strided", "stride": 3},
    {"vocab_size": 9},
]


def build(kind: type = SkipRNNForSequenceClassification, **overrides):
    """Return a model in evaluation mode that skips about two of three steps, at irregular intervals."""
    settings = {"hidden_size": 7, "input_size": 2, "num_labels": 3, "update_bias": -1.5} | overrides
    model = kind(SkipRNNConfig(**settings)).eval()
    if settings.get("gate", "learned") == "learned":
        with torch.no_grad():
            model.base_model.update_gate.weight.mul_(3)
    return model


def draw(model, *shape: int) -> torch.Tensor:
    vocab = model.config.vocab_size
    return torch.randint(0, vocab, shape) if vocab else torch.randn(*shape, model.config.input_size)


def forward(model, x: torch.Tensor, **options):
    with torch.no_grad():
        return model(**{model.main_input_name: x}, output_update_gates=True, **options)


def answering(x: torch.Tensor, log: list[Position] | None = None) -> Callable[[list[Position]], torch.Tensor]:
    def fetch(positions: list[Position]) -> torch.Tensor:
        if log is not None:
            log.extend(positions)
        return torch.stack([x[row, step] for row, step in positions])

    return fetch


def assert_same_output(got, want) -> None:
    assert torch.equal(got.update_gates, want.update_gates)
    assert got.keys() == want.keys()
    for name, value in want.items():
        parts = zip(got[name], value, strict=True) if name == "state" else [(got[name], value)]
        for mine, theirs in parts:
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
