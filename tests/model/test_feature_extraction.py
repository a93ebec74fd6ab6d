"""The feature extractor: what it computes, what it stores, and what it says of data that it cannot take."""

import json
import re

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoFeatureExtractor

from hf_skiprnn import SkipRNNConfig, SkipRNNFeatureExtractor, SkipRNNForSequenceClassification

RNG = np.random.default_rng(0)


def test_series_are_padded_and_masked():
    out = SkipRNNFeatureExtractor(feature_size=2)([np.ones((3, 2)), 2 * np.ones((1, 2))], return_tensors="pt")
    assert out["input_values"].dtype == torch.float32
    assert out["input_values"].tolist() == [[[1, 1], [1, 1], [1, 1]], [[2, 2], [0, 0], [0, 0]]]
    assert out["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


@pytest.mark.parametrize("channels", [1, 3])
def test_joined_steps_are_padded_ones(channels: int) -> None:
    extractor = SkipRNNFeatureExtractor(channels)
    steps = [np.random.default_rng(0).random((length, channels), np.float32) for length in (4, 1, 6)]
    joined, padded = extractor.join(steps), extractor.pad({"input_values": list(steps)}, return_tensors="pt")
    assert joined.keys() == padded.keys()
    for name, part in padded.items():
        assert joined[name].dtype == part.dtype
        assert torch.equal(joined[name], part)
        assert torch.equal(extractor(steps, return_tensors="pt")[name], part)


@pytest.mark.parametrize("side", ["left", "right"])
def test_one_channel_has_an_axis_of_its_own(side):
    extractor = SkipRNNFeatureExtractor(padding_side=side)
    out = extractor([[1.0, 2.0, 3.0], np.array([[4.0]])], return_tensors="np")
    row = [0.0, 0.0, 4.0] if side == "left" else [4.0, 0.0, 0.0]
    assert out["input_values"].tolist() == [[[1.0], [2.0], [3.0]], [[x] for x in row]]
    assert out["attention_mask"][1].tolist() == [float(x > 0) for x in row]


@pytest.mark.parametrize("raw", [[0.5, 1.0], np.array([0.5, 1.0]), torch.tensor([[0.5], [1.0]]), (0.5, 1)])
def test_one_sequence_is_a_batch_of_one(raw):
    assert SkipRNNFeatureExtractor()(raw, return_tensors="pt")["input_values"].tolist() == [[[0.5], [1.0]]]


def test_nested_lists_of_several_channels_are_one_sequence():
    extractor = SkipRNNFeatureExtractor(feature_size=2)
    for raw in ([[1.0, 2.0], [3, 4]], ((1, 2), (3, 4)), np.array([[1, 2], [3, 4]])):
        assert extractor(raw, return_tensors="np")["input_values"].tolist() == [[[1, 2], [3, 4]]]
    batch = extractor([[[1, 2]], [[3, 4], [5, 6]]], return_tensors="np")
    assert batch["input_values"].tolist() == [[[1, 2], [0, 0]], [[3, 4], [5, 6]]]
    one_channel = SkipRNNFeatureExtractor()([[1.0], [2.0]], return_tensors="np")  # rows that have one step by chance
    assert one_channel["input_values"].tolist() == [[[1]], [[2]]]


@pytest.mark.parametrize("lengths", [(3, 5, 1), (4, 4, 4)])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("padding", [False, True])
def test_datasets_store_what_a_map_returns(lengths, channels, padding):
    rows = [RNG.normal(size=(n, channels)).astype(np.float32) for n in lengths]
    extractor = SkipRNNFeatureExtractor(feature_size=channels).fit(rows)
    raw = [row[:, 0].tolist() if channels == 1 else row.tolist() for row in rows]
    mapped = Dataset.from_dict({"series": raw}).map(
        lambda batch: extractor(batch["series"], padding=padding), batched=True
    )
    for row, stored in zip(rows, mapped, strict=True):
        real = np.array(stored["attention_mask"], bool)
        assert np.array(stored["input_values"], np.float32)[real] == pytest.approx(extractor.extract(row))
        assert len(real) == (max(lengths) if padding else len(row))
    again = extractor.pad({"input_values": mapped["input_values"][:]}, return_tensors="pt")["input_values"]
    assert again.shape == (3, max(lengths), channels)


PCM = np.array([-(2**15), -(2**14), 0, 2**14, 2**15 - 1], np.int16)


@pytest.mark.parametrize(
    "sound",
    [
        PCM,
        torch.from_numpy(PCM),
        list(PCM),
        PCM.astype(np.int32) * 2**16,
        (PCM // 256 + 128).astype(np.uint8),
        PCM / 2**15,
    ],
    ids=["int16", "tensor", "list of int16", "int32", "uint8", "float"],
)
@pytest.mark.parametrize("features", ["values", "log_mel"])
def test_integer_sounds_are_scaled_by_their_range(sound, features):
    options = {"sampling_rate": 8000, "features": features, "frame_length": 4, "hop_length": 1}
    extractor = SkipRNNFeatureExtractor(**options)
    assert extractor.extract(sound) == pytest.approx(extractor.extract(PCM / 2**15), abs=0.05)
    assert np.abs(SkipRNNFeatureExtractor(sampling_rate=8000).fit([PCM]).std)[0] == pytest.approx(0.7, abs=0.1)


@pytest.mark.parametrize("sound", [PCM.astype(np.int64), PCM.tolist(), PCM.astype(np.uint16), PCM > 0], ids=str)
def test_integers_of_unknown_range_are_no_sound(sound):
    with pytest.raises(ValueError, match=r"whose range as sound is unknown\. Pass PCM as uint8, int16, int32, or"):
        SkipRNNFeatureExtractor(sampling_rate=8000)([sound], sampling_rate=8000)
    assert SkipRNNFeatureExtractor()([sound], return_tensors="np")["input_values"][0, 2, 0] == 0  # counts are no sound


def test_length_options():
    extractor = SkipRNNFeatureExtractor()
    out = extractor([[1.0] * 5, [2.0] * 2], max_length=4, truncation=True, padding="max_length", return_tensors="np")
    assert out["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert extractor([[1.0] * 5], pad_to_multiple_of=8, return_tensors="np")["input_values"].shape == (1, 8, 1)


def with_amplitudes(*factors):
    """Sequences of two channels; the second one is constant."""
    rows = [factor * RNG.normal((5, 0), (1, 0), (20 + i, 2)) for i, factor in enumerate(factors)]
    return rows * 5


def test_sequences_of_amplitudes_far_apart_are_normalised_each_by_itself(tmp_path, caplog):
    rows = with_amplitudes(1e-3, 1, 50)
    extractor = SkipRNNFeatureExtractor(feature_size=2).fit(rows)
    assert re.search(r"33 % of the sequences vary less .* set normalize_sequences to False", caplog.text)
    assert (extractor.normalize_sequences, extractor.mean, extractor.std) == (True, None, None)
    extractor.save_pretrained(tmp_path)
    for one in (extractor, SkipRNNFeatureExtractor.from_pretrained(tmp_path)):
        for row in rows[:3]:
            expected = np.stack([(row[:, 0] - row[:, 0].mean()) / row[:, 0].std(), np.zeros(len(row))], axis=1)
            assert one.extract(row) == pytest.approx(expected, abs=1e-5)
        batch = one(rows[:3], return_tensors="np")
        assert batch["input_values"][0, :20] == pytest.approx(one.extract(rows[0]))


@pytest.mark.parametrize(
    ("factors", "chosen", "expected"),
    [
        ((1, 1, 30), None, False),  # walking and sitting: the amplitude tells one from the other
        ((1, 1, 1), None, False),
        ((0, 1, 1e-12), None, True),  # a constant sequence has no amplitude
        ((1e-3, 1, 50), False, False),
        ((1, 1, 1), True, True),
        ((1e-4, *[1] * 9), None, False),  # a tenth of the rows are of a machine that is off
        ((1e-3, *[0] * 9, 50), None, False),  # a channel that rarely varies
    ],
)
def test_sequences_of_like_amplitudes_share_a_scale(factors, chosen, expected):
    rows = with_amplitudes(*factors)
    extractor = SkipRNNFeatureExtractor(feature_size=2, normalize_sequences=chosen).fit(rows)
    assert extractor.normalize_sequences is expected
    assert (extractor.mean is None) is expected
    assert np.isfinite(extractor.extract(rows[0])).all()
    assert np.isfinite(extractor.extract(np.ones((1, 2)))).all()  # one step: no deviation


@pytest.mark.parametrize(
    "cell", [1e12 + np.arange(50.0), np.float32(0.1) + 1e-8 * RNG.normal(size=50), np.full(9, 3.0)]
)
def test_what_only_rounding_varies_becomes_zero(cell):
    extractor = SkipRNNFeatureExtractor(normalize_sequences=True)
    assert not extractor.extract(cell).any()
    assert extractor.extract(1e-40 * np.arange(3.0))[:, 0] == pytest.approx([-1.2247449, 0, 1.2247449])


def test_standardisation_is_of_the_training_steps_and_is_saved(tmp_path):
    rows = [RNG.normal((3, 1e6, 0), (2, 5, 1), (n, 3)) for n in (4, 17, 1, 300)]
    for row in rows:
        row[:, 2] = 7.0  # a channel that never changes
    extractor = SkipRNNFeatureExtractor(feature_size=3).fit(rows)
    joined = np.concatenate(rows)
    assert extractor.mean == pytest.approx(joined.mean(axis=0).tolist(), rel=1e-12)
    assert extractor.std == pytest.approx([*joined.std(axis=0)[:2], 1.0], rel=1e-9)
    expected = (rows[1] - joined.mean(axis=0)) / [*joined.std(axis=0)[:2], 1.0]
    assert extractor.extract(rows[1]) == pytest.approx(expected, abs=1e-5)
    extractor.save_pretrained(tmp_path)
    again = SkipRNNFeatureExtractor.from_pretrained(tmp_path)
    assert np.array_equal(
        again(rows, return_tensors="np")["input_values"], extractor(rows, return_tensors="np")["input_values"]
    )


def test_log_mel_finds_the_band_of_a_tone(tmp_path):
    extractor = SkipRNNFeatureExtractor(feature_size=32, sampling_rate=8000, features="log_mel")
    times = np.arange(4000) / 8000
    bands = []
    for frequency in (300, 1000, 3000):
        steps = extractor.extract(np.sin(2 * np.pi * frequency * times))
        assert steps.shape == (1 + (4000 - 200) // 80, 32)  # whole frames only
        bands.append(set(steps.argmax(axis=1).tolist()))
        centre = extractor.mel_filters.argmax(axis=0)[next(iter(bands[-1]))] * 8000 / 256
        assert abs(centre - frequency) < 150
    assert all(len(band) == 1 for band in bands)
    assert extractor.extract(np.zeros(10)) == pytest.approx(np.full((1, 32), np.log(1e-6)), rel=1e-6)
    extractor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert not {"window", "mel_filters"} & set(saved)
    again = SkipRNNFeatureExtractor.from_pretrained(tmp_path)
    sound = RNG.normal(size=999)
    assert np.array_equal(again.extract(sound), extractor.extract(sound))


def test_frames_do_not_depend_on_what_comes_later():
    extractor = SkipRNNFeatureExtractor(feature_size=16, sampling_rate=8000, features="log_mel")
    sound = RNG.normal(size=2000)
    early = extractor.extract(sound[:1000])
    assert extractor.extract(sound)[: len(early)] == pytest.approx(early, abs=1e-6)


def test_auto_class_loads_it_beside_a_model(tmp_path):
    extractor = SkipRNNFeatureExtractor(feature_size=2, mean=[1.0, 2.0], std=[1.0, 4.0])
    SkipRNNForSequenceClassification(SkipRNNConfig(input_size=2, hidden_size=4, num_labels=2)).save_pretrained(tmp_path)
    extractor.save_pretrained(tmp_path)
    loaded = AutoFeatureExtractor.from_pretrained(tmp_path)
    assert type(loaded) is SkipRNNFeatureExtractor
    assert loaded.to_dict() == extractor.to_dict()
    assert (tmp_path / "feature_extraction_skip_rnn.py").is_file()  # the code travels
    assert loaded.extract([[1.0, 6.0]]).tolist() == [[0.0, 1.0]]


def test_another_sampling_rate_is_refused():
    extractor = SkipRNNFeatureExtractor(sampling_rate=8000)
    with pytest.raises(ValueError, match=r"reads 8000 samples per second; got 16000. Resample"):
        extractor([0.1], sampling_rate=16000)


@pytest.mark.parametrize(
    ("options", "raw", "message"),
    [
        ({"feature_size": 2}, [np.ones((3, 2)), np.ones((3, 4))], r"sequence 1 must be \[T, 2\]; got \(3, 4\)"),
        ({"feature_size": 2}, np.ones(3), r"sequence 0 must be \[T, 2\]; got \(3,\)"),
        ({}, [np.ones(3), np.ones(0)], "sequence 1 is empty"),
        ({}, np.array([0.0, np.nan, 1.0]), "sequence 0 holds nan at step 1, channel 0"),
        ({"feature_size": 2}, [[[1.0, 2.0], [3.0, np.inf]]], "sequence 0 holds inf at step 1, channel 1"),
        ({}, np.array([0.0, -1e39]), r"sequence 0 holds -1e\+39 at step 1, channel 0: no finite float32"),
        ({"feature_size": 2}, [[[1.0, 2.0], [3.0]]], "sequence 0 must hold numbers, as many at every step"),
        ({}, [["a", "b"]], "sequence 0 must hold numbers"),
        (
            {"feature_size": 8, "features": "log_mel", "sampling_rate": 8000},
            np.ones((9, 2)),
            r"sequence 0 must be \[T\]; got \(9, 2\)",
        ),
    ],
)
def test_bad_sequences_are_named(options, raw, message):
    with pytest.raises(ValueError, match=message):
        SkipRNNFeatureExtractor(**options)(raw)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": "mfcc"}, "features must be one of values, log_mel; got 'mfcc'"),
        ({"features": "log_mel"}, "needs sampling_rate"),
        ({"feature_size": 0}, "at least 1"),
        ({"mean": [0.0]}, "mean and std go together"),
        ({"mean": [0.0, 1.0], "std": [1.0, 1.0]}, "hold feature_size = 1 numbers"),
        ({"mean": [0.0], "std": [0.0]}, "std must be above 0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SkipRNNFeatureExtractor(**options)


def test_fit_needs_sequences():
    with pytest.raises(ValueError, match="at least one sequence"):
        SkipRNNFeatureExtractor().fit([])


def test_samples_of_every_origin() -> None:
    """Files of other byte orders, arrays of Python's numbers, and bfloat16, which NumPy lacks."""
    extractor = SkipRNNFeatureExtractor(sampling_rate=8000)
    samples = np.array([100, -20000], np.int16)
    wanted = samples[:, None] / 2**15
    for same in (samples.astype(">i2"), torch.from_numpy(samples)):
        np.testing.assert_allclose(extractor(same, sampling_rate=8000)["input_values"][0], wanted)
    half = torch.tensor([0.5, -1.0], dtype=torch.bfloat16)
    np.testing.assert_allclose(extractor(half, sampling_rate=8000)["input_values"][0], [[0.5], [-1.0]])
    with pytest.raises(ValueError, match="holds int64, whose range as sound is unknown"):
        extractor(samples.astype(object), sampling_rate=8000)
    with pytest.raises(ValueError, match=r"must hold numbers.*complex128 is not a type of real numbers"):
        extractor(np.array([1j, 2.0]), sampling_rate=8000)
