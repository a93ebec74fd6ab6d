"""SkipRNNImageProcessor: rescaling only, from every kind of image; saved and loaded (elsewhere: test_remote_code)."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from hf_skiprnn.model.image_processing_skip_rnn import SkipRNNImageProcessor

GRAY = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
COLOR = np.random.default_rng(1).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def pixels(image, **kwargs):
    return SkipRNNImageProcessor(**kwargs)(image, return_tensors="pt")["pixel_values"]


def test_all_256_levels_equal_division_by_255():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    out = pixels(Image.fromarray(levels))
    assert out.shape == (1, 1, 16, 16)
    assert out.dtype == torch.float32
    assert torch.equal(out[0, 0], torch.from_numpy(levels) / 255)


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(GRAY),
        Image.fromarray(GRAY).convert("RGB"),
        Image.fromarray(GRAY).convert("RGBA"),
        GRAY,
        GRAY[None],
        GRAY[..., None],
        torch.from_numpy(GRAY),
        torch.from_numpy(GRAY)[None],
        GRAY.astype(np.float32) / 255,
        GRAY / 255,
        torch.from_numpy(GRAY)[None] / 255,
        np.repeat(GRAY[..., None], 3, axis=2),
    ],
    ids=[
        *("pil-gray", "pil-rgb", "pil-rgba", "uint8", "uint8-chw", "uint8-hwc", "torch", "torch-chw"),
        *("float32", "float64", "torch-float", "uint8-rgb"),
    ],
)
def test_a_gray_picture_gives_the_same_pixels_however_it_comes(image):
    assert torch.equal(pixels(image), torch.from_numpy(GRAY)[None, None] / 255)


def test_color_keeps_its_channels_or_turns_gray_as_pil_does():
    assert torch.equal(
        pixels(Image.fromarray(COLOR), num_channels=3)[0], torch.from_numpy(COLOR).permute(2, 0, 1) / 255
    )
    gray = np.array(Image.fromarray(COLOR).convert("L"))
    for image in (Image.fromarray(COLOR), COLOR, COLOR.transpose(2, 0, 1)):
        assert torch.equal(pixels(image)[0, 0], torch.from_numpy(gray) / 255)
    assert torch.equal(pixels(GRAY, num_channels=3)[0], (torch.from_numpy(GRAY) / 255).expand(3, 8, 8))


def test_batches_lists_and_formats():
    batch = np.stack([GRAY, GRAY[::-1], GRAY.T])[:, None]  # [3, 1, 8, 8]
    processor = SkipRNNImageProcessor()
    as_batch = processor(batch, return_tensors="np")["pixel_values"]
    as_list = processor([Image.fromarray(image[0]) for image in batch], return_tensors="np")["pixel_values"]
    assert as_batch.shape == (3, 1, 8, 8)
    assert np.array_equal(as_batch, as_list)
    ambiguous = np.zeros((3, 5, 3), np.uint8)
    ambiguous[..., 0] = 255
    last = processor(ambiguous, num_channels=3, input_data_format="channels_last", return_tensors="np")["pixel_values"]
    assert last.shape == (1, 3, 3, 5)
    assert last[0, 0].min() == 1
    assert last[0, 1:].max() == 0
    ragged = processor([GRAY, GRAY[:4]])["pixel_values"]
    assert [image.shape for image in ragged] == [(1, 8, 8), (1, 4, 8)]


@pytest.mark.parametrize(
    ("image", "kwargs", "message"),
    [
        (GRAY, {"size": {"height": 28, "width": 28}}, r"28 x 28 pixels; got 8 x 8"),
        (GRAY.astype(np.float32), {}, r"must lie in \[0, 1\]; got .* Divide by 255"),
        (np.full((8, 8), np.nan), {}, r"must lie in \[0, 1\]; got nan"),
        (GRAY.astype(np.int64), {}, "uint8 in 0..255 or floats .*; got int64"),
        (COLOR / 255, {}, r"Expected 1 channel\(s\); got an array \(3, 8, 8\) of float64"),
        (Image.fromarray(GRAY.astype(np.int32)), {}, "8 bits per channel; got PIL mode 'I'"),
        (np.zeros((2, 2, 2, 2, 2), np.uint8), {}, r"An image is \[H, W\].*; got \(2, 2, 2, 2, 2\)"),
        ([GRAY, GRAY[:4]], {}, r"must have one size; got \[\(1, 4, 8\), \(1, 8, 8\)\]"),
    ],
)
def test_errors_say_what_came_and_what_was_expected(image, kwargs, message):
    with pytest.raises(ValueError, match=message):
        pixels(image, **kwargs)


def test_options_are_checked():
    with pytest.raises(ValueError, match=r"num_channels must be 1 .* got 2"):
        SkipRNNImageProcessor(num_channels=2)
    with pytest.raises(ValueError, match=r"size must be .* got {'shortest_edge': 8}"):
        SkipRNNImageProcessor(size={"shortest_edge": 8})
    with pytest.raises(ValueError, match="takes no do_resize"):
        SkipRNNImageProcessor()(GRAY, do_resize=True)


def test_save_and_load(tmp_path):
    SkipRNNImageProcessor(num_channels=3, size={"height": 8, "width": 8}).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["auto_map"] == {"AutoImageProcessor": "image_processing_skip_rnn.SkipRNNImageProcessor"}
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(loaded) is SkipRNNImageProcessor
    assert (loaded.num_channels, loaded.size) == (3, {"height": 8, "width": 8})
    assert AutoImageProcessor.from_pretrained(tmp_path, num_channels=1).num_channels == 1
