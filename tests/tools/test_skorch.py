"""skorch: a scikit-learn estimator around a module that holds a Skip RNN."""

import numpy as np
import pytest
import torch
from small_models import classifier

skorch = pytest.importorskip("skorch", reason="skorch is not installed: pip install skorch, or make tools")


class Logits(torch.nn.Module):
    """skorch's criterion takes logits; the budget is added to the parameters' gradients by the network below."""

    def __init__(self) -> None:
        super().__init__()
        self.model = classifier(num_labels=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x).logits


def test_a_classifier_fits_and_scores() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(64) % 2
    x = (rng.normal(size=(64, 10, 2)) * 0.1 + labels[:, None, None]).astype(np.float32)
    network = skorch.NeuralNetClassifier(
        Logits, criterion=torch.nn.CrossEntropyLoss, lr=0.05, max_epochs=8, optimizer=torch.optim.Adam, verbose=0
    )
    network.fit(x, labels.astype(np.int64))
    assert network.score(x, labels) > 0.9
    assert network.predict_proba(x).shape == (64, 2)
