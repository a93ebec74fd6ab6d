"""The tasks fsdd and keyword: sound files, steps, splits, standardisation, and a training on generated sounds."""

import numpy as np
import pytest
import soundfile
import torch
from datasets import Audio, Dataset
from sound_files import RATE, as_parquet, tone, wav
from transformers import AutoFeatureExtractor

from hf_skiprnn.commands import evaluate, train
from hf_skiprnn.tasks import FSDD, Keyword
from hf_skiprnn.tasks import fsdd as page
from hf_skiprnn.tasks.keyword import coloured, in_noise, pauses, quietest
from hf_skiprnn.tasks.readers.sounds import read_sound


def test_sound_files_are_read_mixed_and_resampled(tmp_path):
    samples, rate = read_sound(wav(tone(440)), "row 0")
    assert (samples.dtype, rate) == (np.float32, RATE)
    assert np.array_equal(samples, tone(440))
    stereo = np.stack([tone(440), np.zeros(800, np.float32)], axis=1)
    assert read_sound(wav(stereo), "row 0")[0] == pytest.approx(tone(440) / 2)
    slower, rate = read_sound(wav(tone(440, rate=16000), 16000), "row 0", RATE)
    assert rate == RATE
    assert slower[50:-50] == pytest.approx(tone(440)[50:-50], abs=0.02)
    soundfile.write(tmp_path / "a.wav", tone(440), RATE, subtype="FLOAT")
    assert np.array_equal(read_sound({"bytes": None, "path": str(tmp_path / "a.wav")}, "row 0")[0], tone(440))


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        (None, "row 3 holds no sound"),
        ({"bytes": None, "path": "absent.wav"}, "row 3 holds no sound: neither bytes nor a file at 'absent.wav'"),
        ({"bytes": b"RIFF????", "path": None}, "row 3 is no sound file"),
        (wav(np.zeros(0, np.float32)), "row 3 is an empty sound"),
    ],
)
def test_bad_sounds_are_named(audio, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        read_sound(audio, "row 3")


def write_tones(folder, speakers_of):
    """Write a folder in FSDD's layout in which the ten digits are ten tones."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for split, rows in (("train", 100), ("test", 20)):
        labels = [i % 10 for i in range(rows)]
        sounds = [wav(tone(300 + 350 * d, rng.uniform(0.08, 0.16)) * rng.uniform(0.2, 1)) for d in labels]
        speakers = [speakers_of[i // 10 % len(speakers_of)] for i in range(rows)]
        as_parquet({"audio": sounds, "label": labels, "speaker": speakers}, folder / f"{split}.parquet")
    return str(folder)


@pytest.fixture
def tones(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "HELD_OUT_ROWS", 20)
    return write_tones(tmp_path / "tones", ("anna", "ben"))


@pytest.mark.parametrize(("features", "channels"), [("log_mel", 32), ("values", 1)])
def test_steps_are_standardised_over_the_training_split(tones, features, channels):
    task = FSDD(dataset_name=tones, features=features)
    splits = task.load(0)
    assert tuple(map(len, splits)) == (80, 20, 20)
    assert np.bincount(splits.validation["label"]).tolist() == [2] * 10
    batch = task.collate([splits.train[i] for i in range(80)])
    assert batch["input_values"].shape[2] == channels == task.model_defaults()["input_size"]
    again = task.collate(task.prepared(splits.train).__getitems__(list(range(80))))
    assert all(torch.equal(again[name], batch[name]) for name in batch)
    steps = batch["input_values"][batch["attention_mask"] != 0]
    assert steps.mean(dim=0).abs().max() < 1e-4
    assert steps.std(dim=0, correction=0).numpy() == pytest.approx(np.ones(channels), abs=1e-4)
    # The saved processor gives the same result as the task.
    data = Dataset.from_parquet(f"{tones}/test.parquet").cast_column("audio", Audio(decode=False))
    sounds = [read_sound(row["audio"], "row")[0] for row in data.select(range(3))]
    again = task.processor()(sounds, sampling_rate=RATE, return_tensors="pt")
    expected = task.collate([splits.test[i] for i in range(3)])
    # The task stored its steps in float32 before it standardised them.
    assert again["input_values"].numpy() == pytest.approx(expected["input_values"].numpy(), abs=1e-5)
    assert torch.equal(again["attention_mask"], expected["attention_mask"])


def test_a_speaker_is_held_out(tones):
    known, held_out = FSDD(dataset_name=tones).load(0), FSDD(dataset_name=tones, held_out_speaker="ben").load(0)
    assert tuple(map(len, held_out)) == (30, 20, 60)  # of the 100 and 20: anna's 50, ben's 50 and 10
    data = {split: Dataset.from_parquet(f"{tones}/{split}.parquet") for split in ("train", "test")}
    ben = [i for i, speaker in enumerate(data["train"]["speaker"]) if speaker == "ben"]
    assert held_out.test["label"][:50].tolist() == [data["train"]["label"][i] for i in ben]
    theirs = [steps.tobytes() for steps in held_out.test["steps"]]
    others = {steps.tobytes() for split in (held_out.train, held_out.validation) for steps in split["steps"]}
    assert len(others) == 50
    assert others.isdisjoint(theirs)
    assert others | set(theirs[:50]) == {
        steps.tobytes() for split in (known.train, known.validation) for steps in split["steps"]
    }


def test_a_speaker_that_is_not_there_is_refused(tones):
    with pytest.raises(ValueError, match="held_out_speaker must be one of anna, ben; got 'carl'"):
        FSDD(dataset_name=tones, held_out_speaker="carl").load(0)
    for split in ("train", "test"):
        data = Dataset.from_parquet(path := f"{tones}/{split}.parquet").cast_column("audio", Audio(decode=False))
        as_parquet({"audio": list(data["audio"]), "label": list(data["label"])}, path)
    with pytest.raises(ValueError, match="must have a column speaker to hold one out; got audio, label"):
        FSDD(dataset_name=tones, held_out_speaker="ben").load(0)


def test_trains_evaluates_and_reloads(tones, tmp_path):
    folder = tmp_path / "run"
    options = ["--hidden_size", "16", "--num_train_epochs", "12", "--learning_rate", "0.02", "--use_cpu"]
    options += ["--disable_tqdm", "true", "--eval_strategy", "no", "--save_strategy", "no"]
    options += ["--load_best_model_at_end", "false", "--per_device_train_batch_size", "20"]
    results = train.main(["--task", "fsdd", "--dataset_name", tones, "--output_dir", str(folder), *options])
    assert results["metrics"]["test"]["accuracy"] >= 0.9
    assert AutoFeatureExtractor.from_pretrained(folder).mean == pytest.approx(FSDD(tones).processor().mean)
    found = evaluate.main([str(folder), "--figure_rows", "2"])
    assert found["metrics"]["accuracy"] == results["metrics"]["test"]["accuracy"]
    assert (folder / "steps-read-test.png").stat().st_size > 5000


def test_a_broken_sound_is_named_by_row_and_column(tones):
    data_file = f"{tones}/test.parquet"
    data = Dataset.from_parquet(data_file).cast_column("audio", Audio(decode=False))
    rows = data.to_list()
    rows[7]["audio"] = {"bytes": b"no sound", "path": None}
    as_parquet({"audio": [row["audio"] for row in rows], "label": [row["label"] for row in rows]}, data_file)
    with pytest.raises(ValueError, match="row 7, column 'audio' is no sound file"):
        FSDD(dataset_name=tones).load(0).test  # noqa: B018 - made when asked for


def test_the_real_recordings(shared_data):
    task = FSDD(dataset_name=str(shared_data("fsdd")))
    splits = task.load(0)
    assert tuple(map(len, splits)) == (2400, 300, 300)
    batch = task.collate([splits.test[i] for i in (0, 299)])
    assert batch["labels"].tolist() == splits.test["label"][[0, 299]].tolist()
    assert batch["input_values"].isfinite().all()


def test_noise_is_made_of_pauses_and_colours():
    rng = np.random.default_rng(0)
    sound = np.concatenate([tone(500), 0.01 * tone(3000), np.zeros(400, np.float32)])
    pause = quietest(sound)
    assert np.mean(pause**2) == pytest.approx(1)
    spectrum = np.abs(np.fft.rfft(pause))
    assert spectrum.argmax() == pytest.approx(320 * 3000 / RATE, abs=1)  # not the loud tone, not the digital silence
    for noise in (pauses(pause[None], 5000, rng), coloured(5000, rng)):
        assert noise.shape == (5000,)
        assert np.mean(noise**2) == pytest.approx(1)


def test_a_keyword_stands_somewhere_in_the_noise_and_louder():
    bank, starts = np.random.default_rng(1).standard_normal((4, 320)), []
    for seed in range(25):
        with_sound = in_noise(tone(1000, 0.2), bank, np.random.default_rng(seed))
        without = in_noise(None, bank, np.random.default_rng(seed))
        assert with_sound.shape == without.shape == (24_000,)
        (inside,) = np.nonzero(with_sound != without)
        assert inside[-1] - inside[0] < 1600
        starts.append(inside[0])
        ratio = np.mean((with_sound - without)[inside] ** 2) / np.mean(without.astype(float) ** 2)
        assert 4 < 10 * np.log10(ratio) < 26.5
    assert min(starts) < 5000
    assert max(starts) > 17_000
    long = in_noise(np.ones(30_000, np.float32), bank, np.random.default_rng(0))
    assert long.shape == (24_000,)


def test_keywords_of_held_out_speakers(tmp_path):
    folder = write_tones(tmp_path / "tones", ("anna", "ben", "carl"))
    options = {"dataset_name": folder, "validation_speaker": "ben", "cache_folder": str(tmp_path / "cache")}
    splits = Keyword(test_speaker="carl", **options).load(0)
    counts = [np.bincount(part["label"], minlength=11).tolist() for part in splits]
    Keyword(test_speaker="carl", **options).processor().save_pretrained(tmp_path / "processor")
    task = Keyword(test_speaker="carl", **(options | {"cache_folder": str(tmp_path / "again")}))
    # anna speaks 40 training and 10 test recordings, ben 30 and 10, carl 30; one row in eleven is noise alone.
    assert counts == [[10] * 11, [4] * 11, [3] * 11]
    task.use_processor(str(tmp_path / "processor"))
    batch = task.collate([task.load(5).test[i] for i in range(33)])
    assert len(list((tmp_path / "again").iterdir())) == 1  # an evaluation does not make the training rows
    assert batch["input_values"].shape == (33, 298, 32)
    assert torch.equal(batch["input_values"], task.collate([splits.test[i] for i in range(33)])["input_values"])
    assert task.model_defaults()["id2label"][10] == "none"
    assert len(Keyword(test_speaker="carl", copies=1, **options).load(0).train) == 55
    with pytest.raises(ValueError, match=r"must be two of anna, ben, carl, .* got 'ben' and 'theo'"):
        Keyword(**options).load(0)
    with pytest.raises(ValueError, match="copies must be at least 1; got 0"):
        Keyword(copies=0)
