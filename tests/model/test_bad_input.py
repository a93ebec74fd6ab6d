"""Bad inputs: the error says what came and what was expected."""

import math

import numpy as np
import pytest
import torch
from small_models import classifier

from hf_skiprnn.model.inputs_skip_rnn import logger


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of input_values, input_ids, pixel_values, inputs_embeds; got none"),
        ({"input_values": torch.rand(2, 3, 2), "pixel_values": torch.rand(2, 2, 3, 1)}, "and pixel_values"),
        ({"input_values": torch.rand(2, 3)}, r"input_values must be \[B, T, input_size\]; got \(2, 3\)"),
        ({"input_values": torch.rand(2, 3, 5)}, r"with 2 inputs a step; got \(2, 3, 5\)"),
        ({"pixel_values": torch.rand(2, 1, 3, 3)}, r"with 2 inputs a step; got \(2, 1, 3, 3\)"),
        ({"input_values": torch.ones(2, 3, 2, dtype=torch.long)}, "must be floating point; got torch.int64"),
        ({"input_ids": torch.ones(2, 3, dtype=torch.long)}, "takes input_values or pixel_values; got input_ids"),
        ({"input_values": torch.rand(0, 3, 2)}, r"at least one row; got \(0, 3, 2\)"),
        ({"attention_mask": torch.ones(2, 4)}, r"attention_mask must be \[B, T\] = \(2, 3\); got \(2, 4\)"),
        ({"attention_mask": torch.full((2, 3), 2)}, "attention_mask must hold 0 and 1; got values from 2 to 2"),
        ({"forced_gates": torch.ones(3, 2)}, r"forced_gates must be \[B, T\] = \(2, 3\); got \(3, 2\)"),
        ({"labels": torch.tensor([0, 3])}, r"labels must be in \[0, num_labels = 3\) or -100; got \[3\]"),
        ({"labels": torch.tensor([0, 1, 2])}, r"labels must be \[B\] = \(2,\); got \(3,\)"),
        ({"labels": torch.rand(2, 2)}, r"labels must be \[B, num_labels\] = \(2, 3\); got \(2, 2\)"),
        ({"labels": torch.full((2, 3), 2.0)}, r"several classes at once must be in \[0, 1\], or -100; got \[2.0\]"),
        ({"input_values": [[[0.5, 0.5]]]}, "input_values must be a tensor; got list. Convert it"),
        ({"input_values": np.zeros((2, 3, 2))}, "input_values must be a tensor; got ndarray"),
    ],
)  # fmt: skip
def test_bad_inputs_say_what_came_and_what_was_expected(arguments: dict, message: str) -> None:
    if arguments and not {"input_values", "input_ids", "pixel_values"} & arguments.keys():
        arguments = {"input_values": torch.rand(2, 3, 2)} | arguments
    with pytest.raises(ValueError, match=message):
        classifier()(**arguments)


def test_the_hint_to_flatten_a_mask_is_for_masks_of_images() -> None:
    with pytest.raises(ValueError, match=r"got \(2, 2, 3\). Flatten the image's mask"):
        classifier()(torch.rand(2, 6, 2), torch.ones(2, 2, 3))
    with pytest.raises(ValueError, match=r"\(2, 6\); got \(2, 5\).$"):
        classifier()(torch.rand(2, 6, 2), torch.ones(2, 5))


def test_padding_without_a_mask_is_read_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    model = classifier(vocab_size=7, pad_token_id=0).eval()
    ids = torch.tensor([[3, 4, 5], [3, 0, 0]])
    mask = (ids != 0).long()
    logger.warning_once.cache_clear()
    with caplog.at_level("WARNING"):
        model(input_ids=ids, attention_mask=mask)
        assert not caplog.records
        out = model(input_ids=ids)
    assert "begin or end with pad_token_id = 0, and there is no attention_mask" in caplog.text
    assert torch.equal(out.logits, model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits)


def test_bad_tokens_and_states() -> None:
    model = classifier(vocab_size=7)
    with pytest.raises(ValueError, match=r"input_ids must be in \[0, vocab_size = 7\); got values from -1 to 7"):
        model(input_ids=torch.tensor([[-1, 7]]))
    with pytest.raises(ValueError, match="input_ids must be integers"):
        model(input_ids=torch.rand(2, 3))
    with pytest.raises(ValueError, match=r"vocab_size=7, .* takes input_ids or inputs_embeds; got input_values"):
        model(torch.rand(2, 3, 2))
    state = classifier().base_model.initial_state(3)
    with pytest.raises(ValueError, match=r"state must have shapes .*\(1, 2, 6\).*got .*\(1, 3, 6\)"):
        classifier()(torch.rand(2, 3, 2), state=state)
    with pytest.raises(ValueError, match="state must have shapes"):
        classifier(cell_type="gru")(torch.rand(3, 3, 2), state=state)


def test_nan_inputs_raise_on_request_and_otherwise_show() -> None:
    model = classifier()
    x = torch.rand(2, 5, 2)
    x[1, 0, 1] = math.nan
    with pytest.raises(ValueError, match="holds nan at row 1, step 0, column 1"):
        model(x, check_inputs=True)
    out = model(x)
    assert out.logits[1].isnan().all()
    assert not out.logits[0].isnan().any()
    mask = torch.ones(2, 5)
    mask[1, 0] = 0
    assert model(x, mask, check_inputs=True).logits.isfinite().all()


def shrunk(tensor: torch.Tensor) -> torch.Tensor:
    """A copy whose storage ends before its shape does."""
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(tensor.untyped_storage().nbytes() - tensor.element_size())
    return tensor


def test_torch_would_read_beyond_a_storage_that_is_too_small() -> None:
    """Before any operator of torch reads it: it reads foreign memory, or crashes."""
    numbers, texts = classifier().eval(), classifier(vocab_size=7).eval()
    x, ids = torch.rand(2, 5, 2), torch.ones(2, 5, dtype=torch.long)
    calls = {
        "input_values": lambda: numbers(shrunk(x)),
        "pixel_values": lambda: numbers(pixel_values=shrunk(torch.rand(2, 2, 3, 3))),
        "input_ids": lambda: texts(shrunk(ids)),
        "attention_mask": lambda: numbers(x, shrunk(ids)),
        "Step 0": lambda: numbers.stream().push(shrunk(torch.rand(2))),
        "x": lambda: numbers.stream(2).push(shrunk(torch.rand(2, 2))),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=rf"^{name} of shape .* needs \d+ bytes; its storage holds \d+\."):
            call()
    last_row = torch.rand(3, 2)[2]
    assert numbers.stream().push(last_row)  # a view that ends with its storage
