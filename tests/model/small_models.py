"""Small classifiers for tests of the models."""

from hf_skiprnn import SkipRNNConfig, SkipRNNForSequenceClassification

# "auto" is the native engine where there is one.
BACKENDS = ["dense", "events", "auto"]
TINY = {"hidden_size": 6, "input_size": 2, "num_labels": 3, "update_bias": -1.0}
VARIANTS = [
    {},
    {"cell_type": "gru", "num_hidden_layers": 2},
    {"cell_type": "gru", "gru_reset": "after"},
    {"gate": "always"},
    {"gate": "strided", "stride": 3},
    {"gate": "random", "skip_probability": 0.4},
    {"learn_initial_state": False},
]


def classifier(**overrides) -> SkipRNNForSequenceClassification:
    return SkipRNNForSequenceClassification(SkipRNNConfig(**(TINY | overrides)))
