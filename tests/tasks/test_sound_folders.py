"""Folders of sound files are read without torchcodec: by the names of their folders, by metadata, and as a stream."""

import sys

import pytest
from sound_files import tone, wav

from hf_skiprnn.commands import evaluate, train
from hf_skiprnn.tasks import OwnData

QUICK = ["--hidden_size", "8", "--max_steps", "2", "--per_device_train_batch_size", "4", "--use_cpu"]
QUICK += ["--disable_tqdm", "true", "--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end"]
QUICK += ["false"]


@pytest.fixture
def sounds(tmp_path):
    """A folder of 40 WAV files, of 6 to 8 frames: sounds/low/0.wav, ..., sounds/high/19.wav."""
    assert "torchcodec" not in sys.modules, "these tests show what works without it"
    for kind, frequency in (("low", 300), ("high", 1200)):
        folder = tmp_path / "sounds" / kind
        folder.mkdir(parents=True)
        for i in range(20):
            (folder / f"{i}.wav").write_bytes(wav(tone(frequency, 0.08 + 0.01 * (i % 3)))["bytes"])
    return tmp_path / "sounds"


@pytest.mark.parametrize("streaming", [False, True])
def test_folders_are_classes(sounds, streaming):
    task = OwnData(dataset_name=str(sounds), streaming=streaming, eval_rows=4)
    splits = task.load(0)
    assert task.model_defaults()["label2id"] == {"high": 0, "low": 1}
    rows = [*splits.train.take(40), *splits.validation, *splits.test]
    batch = task.collate(rows)
    assert sorted(batch["labels"].tolist()) == sorted(row["label"] for row in rows)
    for row, label, mask in zip(rows, batch["labels"].tolist(), batch["attention_mask"], strict=True):
        assert ("high", "low")[label] in row["audio"]["path"]
        name = int(row["audio"]["path"].rpartition("/")[2].removesuffix(".wav"))
        assert int(mask.sum()) == 6 + name % 3  # frames of 25 ms every 10 ms


def test_a_training_on_a_folder_of_sounds_is_repeated_by_evaluate(sounds, tmp_path):
    run = tmp_path / "run"
    trained = train.main(["--dataset_name", str(sounds), "--output_dir", str(run), *QUICK])
    found = evaluate.main([str(run), "--figure_rows", "2"])
    assert found["metrics"]["accuracy"] == trained["metrics"]["test"]["accuracy"]


def test_a_metadata_file_names_labels(sounds):
    lines = ["file_name,mood", *(f"low/{i}.wav,{'good' if i % 2 else 'bad'}" for i in range(20))]
    (sounds / "metadata.csv").write_text("\n".join(lines))
    task = OwnData(dataset_name=str(sounds), input_column="audio", label_column="mood")
    assert sum(map(len, task.load(0))) == 20
    assert set(task.model_defaults()["label2id"]) == {"good", "bad"}


def test_a_file_that_is_no_sound_is_named(sounds):
    (sounds / "low" / "3.wav").write_text("no sound")
    task = OwnData(dataset_name=str(sounds))
    with pytest.raises(ValueError, match=r"train row \d+, column 'audio' \(.*low/3\.wav\) is no sound file"):
        [task.collate([row]) for part in task.load(0) for row in part]


def test_without_soundfile_one_line_says_what_to_install(sounds, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "soundfile", None)  # as if it were not installed
    with pytest.raises(SystemExit, match=r'^hf-skiprnn: .*pip install "hf_skiprnn\[audio\]"[^\n]*$'):
        train.main(["--dataset_name", str(sounds), "--output_dir", str(tmp_path / "run"), *QUICK])
