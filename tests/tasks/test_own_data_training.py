"""scripts/train.py trains on data of one's own, and the checkpoint prepares rows as training did."""

import json

import pytest
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from row_files import QUICK, RNG, series, write
from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoTokenizer

from hf_skiprnn.commands import evaluate, train


def test_a_run_infers_all_and_the_checkpoint_repeats_the_standardisation(tmp_path):
    folder, run = write(tmp_path / "d", series(60)), tmp_path / "run"
    results = train.main(["--dataset_name", folder, "--output_dir", str(run), "--balance_classes", "true", *QUICK])
    assert results["task"] == "own_data"
    assert {"accuracy", "balanced_accuracy", "updates"} <= set(results["metrics"]["test"])
    extractor = AutoFeatureExtractor.from_pretrained(run)
    assert extractor.mean[1] == pytest.approx(50, abs=0.5)
    found = evaluate.main([str(run), "--figure_rows", "2"])
    assert found["metrics"]["accuracy"] == results["metrics"]["test"]["accuracy"]
    assert (run / "steps-read-test.png").is_file()


@pytest.mark.parametrize(
    ("column", "cell", "auto"),
    [
        ("words", "a good film {}".format, AutoTokenizer),
        ("image", lambda row: PILImage.new("L", (3, 2), row), AutoImageProcessor),
        ("wave", lambda row: [1.0] * 4 + [row], AutoFeatureExtractor),
    ],
    ids=["words", "image", "wave"],
)
def test_streams_of_every_kind_train(monkeypatch, tmp_path, column, cell, auto):
    features = Features(
        {
            column: {"words": Value("string"), "image": Image(), "wave": List(Value("float32"))}[column],
            "label": Value("string"),
        }
    )
    cells = [cell(row) for row in range(60)]
    Dataset.from_dict({column: cells, "label": ["a", "b"] * 30}, features=features).to_parquet(
        tmp_path / "train.parquet"
    )
    run = tmp_path / "run"
    # Newer versions of datasets wait 5 s if a stream is not read to its end.
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)
    embeddings = ["--input_size", "4"] if column == "words" else []
    options = ["--dataset_name", str(tmp_path), "--streaming", "true", *embeddings]
    train.main([*options, "--output_dir", str(run), *QUICK])
    assert auto.from_pretrained(run) is not None
    assert json.loads((run / "results.json").read_text())["metrics"]["test"]["updates"] > 0


def test_very_long_sequences_train(tmp_path):
    rows = [{"x": RNG.normal(size=5_000).round(2).tolist(), "label": i % 2} for i in range(8)]
    folder = tmp_path / "d"
    for split in ("train", "validation", "test"):
        write(folder, rows[:4], split)
    results = train.main(
        ["--dataset_name", str(folder), "--output_dir", str(tmp_path / "run"), *QUICK, "--max_steps", "1"]
    )
    assert results["metrics"]["test"]["updates"] > 100
