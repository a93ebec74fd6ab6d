"""captum: attributions of inputs and of embeddings are those of the model as it is called."""

import pytest
import torch
from small_models import classifier

attr = pytest.importorskip("captum.attr", reason="captum is not installed: pip install captum, or make tools")

IDS = torch.arange(24).reshape(2, 12) % 7
X = torch.linspace(-2, 2, 2 * 20 * 2).reshape(2, 20, 2).sin()


def test_integrated_gradients_of_inputs_add_up() -> None:
    model = classifier(gate="always").eval()
    gradients = attr.IntegratedGradients(lambda x: model(x).logits)
    values, delta = gradients.attribute(X, target=1, n_steps=100, return_convergence_delta=True)
    assert values.shape == X.shape
    assert delta.abs().max() < 1e-2


@pytest.mark.parametrize("training", [False, True])
def test_integrated_gradients_of_embeddings_use_its_hook(training: bool) -> None:
    """The hook on the embeddings puts interpolated vectors in the place of what they return."""
    model = classifier(vocab_size=7, gate="always").train(training)
    gradients = attr.LayerIntegratedGradients(lambda ids: model(ids).logits, model.base_model.embeddings)
    values, delta = gradients.attribute(
        IDS, baselines=torch.zeros_like(IDS), target=0, n_steps=100, return_convergence_delta=True
    )
    assert values.shape == (2, 12, 2)
    assert values.abs().sum() > 0
    assert delta.abs().max() < 1e-2


@pytest.mark.filterwarnings("ignore:In order to make embedding layers more interpretable:UserWarning")
def test_interpretable_embeddings() -> None:
    model = classifier(vocab_size=7).eval()
    want = model(IDS).logits
    layer = attr.configure_interpretable_embedding_layer(model, "skip_rnn.embeddings")
    embeds = layer.indices_to_embeddings(IDS)
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, want)
    attr.remove_interpretable_embedding_layer(model, layer)
    torch.testing.assert_close(model(IDS).logits, want)


def test_occlusion_runs_without_gradients() -> None:
    model = classifier(vocab_size=7).eval()
    with torch.no_grad():
        values = attr.FeatureAblation(lambda ids: model(ids).logits).attribute(IDS, baselines=0, target=1)
    assert values.shape == IDS.shape
