"""Transforms of torch.func and forward-mode derivatives: right on the dense scan, refused by name on the engine."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from scan_cases import NEEDS_NATIVE
from small_models import classifier
from torch import Tensor
from torch.autograd import forward_ad

from hf_skiprnn import SkipRNNForSequenceClassification
from hf_skiprnn.kernels import choose_engine
from hf_skiprnn.model.dense_scan_skip_rnn import DENSE

X, LABELS = torch.randn(3, 20, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2])
MASK = (torch.arange(20) < torch.tensor([[20], [13], [1]])).long()


def model_on(backend: str, **fields: object) -> SkipRNNForSequenceClassification:
    model = classifier(**fields).eval()
    model.set_scan_backend(backend)
    return model


@pytest.mark.parametrize("backend", ["dense", "auto"])
@pytest.mark.parametrize("vocab_size", [None, 9])
def test_gradients_per_sample(backend: str, vocab_size: int | None) -> None:
    """torch.func.vmap of torch.func.grad, as in differentially private training, against one row at a time."""
    model = model_on(backend, **({"vocab_size": vocab_size} if vocab_size else {}))
    name = model.base_model.main_input_name
    inputs = torch.randint(0, 9, (3, 20)) if vocab_size else X
    parameters = {key: value.detach() for key, value in model.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor, label: Tensor, mask: Tensor) -> Tensor:
        given = {name: x.unsqueeze(0), "labels": label.unsqueeze(0), "attention_mask": mask.unsqueeze(0)}
        return torch.func.functional_call(model, weights, (), given).loss

    got = torch.func.vmap(torch.func.grad(loss), (None, 0, 0, 0))(parameters, inputs, LABELS, MASK)
    model.set_scan_backend("events")
    for row in range(3):
        model.zero_grad()
        part = slice(row, row + 1)
        model(**{name: inputs[part]}, labels=LABELS[part], attention_mask=MASK[part]).loss.backward()
        for key, parameter in model.named_parameters():
            torch.testing.assert_close(got[key][row], parameter.grad)


def batched_gradient(model: Any) -> None:
    logits = model(X).logits
    each = torch.eye(logits.numel()).view(-1, *logits.shape)
    torch.autograd.grad(logits, next(model.parameters()), each, is_grads_batched=True)


def dual_numbers(model: Any) -> None:
    with forward_ad.dual_level():
        model(forward_ad.make_dual(X, X))


def dual_numbers_without_grad(model: Any) -> None:
    with torch.no_grad():
        dual_numbers(model)


@NEEDS_NATIVE
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch itself
@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (lambda model: torch.func.vmap(lambda x: model(x.unsqueeze(0)).logits)(X), "'dense' backend"),
        (lambda model: torch.func.grad(lambda x: model(x).logits.sum())(X), "'dense' backend"),
        (lambda model: torch.func.jacrev(lambda x: model(x).logits)(X), "'dense' backend"),
        (batched_gradient, "'dense' backend"),
        (lambda model: torch.func.jvp(lambda x: model(x).logits, (X,), (X,)), "no forward-mode derivative"),
        (dual_numbers, "no forward-mode derivative"),
        (dual_numbers_without_grad, "no forward-mode derivative"),
    ],
    ids=["vmap", "grad", "jacrev", "batched", "jvp", "dual", "dual without grad"],
)
def test_the_engine_names_the_way(transform: Callable[[Any], Any], message: str) -> None:
    with pytest.raises((RuntimeError, ValueError), match=message):
        transform(model_on("cpu"))


@pytest.mark.parametrize("backend", ["auto", "dense"])
@pytest.mark.parametrize(
    "transform",
    [
        lambda model: torch.func.jvp(lambda x: model(x).logits, (X,), (X,)),
        lambda model: torch.func.hessian(lambda x: model(x).logits.sum())(X),
        dual_numbers,
    ],
    ids=["jvp", "hessian", "dual"],
)
def test_no_backend_has_a_forward_mode_derivative(backend: str, transform: Callable[[Any], Any]) -> None:
    model = model_on(backend)
    with pytest.raises(RuntimeError, match=r"no forward-mode derivative .* on any backend\. Use reverse mode"):
        transform(model)


def test_auto_takes_the_dense_scan_under_a_transform() -> None:
    chosen = []
    torch.func.vmap(lambda x: (chosen.append(choose_engine("auto", x, 100)), x)[1])(X)
    assert chosen == [DENSE]
