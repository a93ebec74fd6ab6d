"""The task imdb: tokenizer, word vectors, splits, cropping, picture and HTML page, and counting padding."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer, EvalPrediction

from hf_skiprnn import SkipRNNConfig, SkipRNNForSequenceClassification
from hf_skiprnn.commands import evaluate, train
from hf_skiprnn.tasks import IMDB, OwnData
from hf_skiprnn.tasks.readers.words import pad_tokens, set_vectors, tokenize, train_tokenizer
from scripts.paper import word_vectors

GOOD, BAD = "A great, great film.<br /><br />I don't regret it!", "dull and $5 too long <b>"


@pytest.fixture
def reviews(tmp_path):
    """A folder in the layout of stanfordnlp/imdb, which is sorted by label."""
    rows = {
        "text": [f"{BAD} {i}" for i in range(40)] + [f"{GOOD} {i}" for i in range(40)],
        "label": [0] * 40 + [1] * 40,
    }
    folder = tmp_path / "reviews"
    folder.mkdir()
    for split in ("train", "test"):
        Dataset.from_dict(rows).to_parquet(folder / f"{split}.parquet")
    return str(folder)


def test_words_of_a_review():
    tokenizer = train_tokenizer([GOOD] * 3 + [BAD], 100, 8)
    assert tokenizer.tokenize(GOOD) == ["a", "great", ",", "great", "film", ".", "i", "don't", "regret", "it", "!"]
    assert tokenizer("nothing of it is known")["input_ids"] == [1, 1, tokenizer.vocab["it"], 1, 1]
    batch = pad_tokens(tokenize(tokenizer, [GOOD, "a", "", "<br />"]), 0)
    assert batch["input_ids"].shape == (4, 8)  # cropped at the end
    assert batch["attention_mask"].sum(dim=1).tolist() == [8, 1, 1, 1]  # no words: one unknown word
    assert tokenizer.convert_ids_to_tokens(batch["input_ids"][0]) == tokenizer.tokenize(GOOD)[:8]
    assert batch["input_ids"][1].tolist() == [tokenizer.vocab["a"]] + [0] * 7
    assert set(batch) == {"input_ids", "attention_mask"}


def test_vocabulary_keeps_the_most_frequent_words():
    tokenizer = train_tokenizer(["b b b a a c"], 4, 10)
    assert tokenizer.get_vocab() == {"[PAD]": 0, "[UNK]": 1, "b": 2, "a": 3}


def test_splits_are_by_seed_and_stratified(reviews):
    task = IMDB(dataset_name=reviews)
    splits = task.load(0)
    assert tuple(map(len, splits)) == (68, 12, 80)
    assert sum(splits.validation["label"]) == 6
    assert not set(splits.train["text"]) & set(splits.validation["text"])
    assert IMDB(dataset_name=reviews).load(5).validation["text"] == splits.validation["text"]
    assert IMDB(dataset_name=reviews, split_seed=1).load(0).validation["text"] != splits.validation["text"]
    assert len(IMDB(dataset_name=reviews, train_rows=10).load(0).train) == 10
    batch, prepared = task.collate([splits.train[i] for i in range(5)]), task.prepared(splits.train)
    for _ in range(2):  # the second batch is from memory
        again = task.collate(prepared.__getitems__(list(range(5))))
        assert all(torch.equal(again[name], batch[name]) for name in batch)
    known = task.processor().get_vocab()
    assert "great" in known
    held_out = {text.split()[-1] for text in splits.validation["text"]}  # every review ends with a unique number
    only_held_out = held_out - {text.split()[-1] for text in splits.train["text"]}
    assert not only_held_out & set(known)  # the tokenizer has not seen them


def word2vec_file(path, binary):
    from gensim.models import KeyedVectors

    vectors = KeyedVectors(4)
    vectors.add_vectors(["great", "Dull", "absent"], np.arange(12, dtype=np.float32).reshape(3, 4))
    vectors.save_word2vec_format(str(path), binary=binary)
    return str(path)


@pytest.mark.parametrize(("name", "binary"), [("v.bin", True), ("v.txt", False)])
def test_vectors_of_known_words_and_uniform_ones_for_the_others(tmp_path, reviews, name, binary):
    path = word2vec_file(tmp_path / name, binary)
    task = IMDB(dataset_name=reviews, vectors=path, vocabulary=50)
    model = SkipRNNForSequenceClassification(
        SkipRNNConfig(**{**task.model_defaults(), "input_size": 4, "hidden_size": 3, "num_labels": 2})
    )
    before = model.get_input_embeddings().weight.detach().clone()
    task.initialise(model)
    after, vocab = model.get_input_embeddings().weight.detach(), task.processor().get_vocab()
    assert after[vocab["great"]].tolist() == [0, 1, 2, 3]
    assert after[vocab["dull"]].tolist() == [4, 5, 6, 7]  # the file holds only "Dull"
    others = [i for i in range(50) if i not in (vocab["great"], vocab["dull"])]
    assert torch.equal(after[others], before[others])
    assert after[0].abs().sum() == 0  # padding
    drawn = after[[i for i in others if i != 0]]
    assert drawn.abs().max() <= 0.25
    assert drawn.std() == pytest.approx(0.25 / np.sqrt(3), rel=0.15)


def test_own_texts_start_from_vectors(tmp_path):
    rows = [{"text": f"a {'great' if row % 2 else 'dull'} film", "label": row % 2} for row in range(40)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = OwnData(dataset_name=str(tmp_path), vectors=word2vec_file(tmp_path / "v.txt", binary=False))
    model = SkipRNNForSequenceClassification(
        SkipRNNConfig(**{**task.model_defaults(), "input_size": 4, "hidden_size": 3})
    )
    task.initialise(model)
    assert model.get_input_embeddings().weight[task.processor().get_vocab()["great"]].tolist() == [0, 1, 2, 3]
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps({"x": [1.0, 2.0], "label": r["label"]}) for r in rows))
    other = OwnData(dataset_name=str(tmp_path), vectors=task.vectors)
    with pytest.raises(ValueError, match="vectors are for texts; column x holds series of numbers"):
        other.initialise(model)


def test_vectors_are_learnt_from_the_training_reviews(tmp_path, reviews, capsys):
    path = tmp_path / "v.bin"
    assert word_vectors.main([str(path), "--dataset_name", reviews, "--size", "4", "--epochs", "1"]) == 0
    task = IMDB(dataset_name=reviews)
    known = len(task.processor()) - 2  # all but padding and unknown words
    assert f"{known} vectors of 4 numbers" in capsys.readouterr().out
    assert set_vectors(torch.zeros(len(task.processor()), 4), task.processor().get_vocab(), str(path)) > 20
    with pytest.raises(SystemExit):
        word_vectors.main([str(tmp_path / "v.txt"), "--dataset_name", reviews])


def test_vectors_that_do_not_fit_are_refused(tmp_path):
    path = word2vec_file(tmp_path / "v.txt", binary=False)
    with pytest.raises(ValueError, match=r"vectors of 4 numbers; the model's have 3. Set input_size=4"):
        set_vectors(torch.zeros(5, 3), {}, path)
    with pytest.raises(ValueError, match=r"no vectors file 'absent.bin'"):
        set_vectors(torch.zeros(5, 4), {}, "absent.bin")
    (tmp_path / "broken.bin").write_bytes(b"3 4\nword")
    with pytest.raises(ValueError, match=r"broken.bin could not be read as a word2vec binary"):
        set_vectors(torch.zeros(5, 4), {}, str(tmp_path / "broken.bin"))


def test_picture_and_page_mark_the_words_read(reviews, tmp_path):
    task = IMDB(dataset_name=reviews)
    batch = task.collate([{"text": GOOD, "label": 1}, {"text": BAD, "label": 0}])
    gates = np.zeros(batch["input_ids"].shape, dtype=bool)
    gates[0, [0, 4]] = gates[1, [0, 6]] = True
    logits = np.array([[0.0, 1.0], [0.0, 1.0]])
    page = task.page(batch, gates, logits)
    assert "<h2>pos: right; 2 of" in page
    assert "<h2>neg: read as pos; " in page
    assert page.count("<mark>") == 4
    assert "<mark>a</mark> great , great <mark>film</mark>" in page
    assert "<mark>&lt;</mark> b &gt;" in page  # markup in a review is escaped
    task.figure(batch, gates, logits).savefig(tmp_path / "words.png")
    assert (tmp_path / "words.png").stat().st_size > 5000


def test_trains_evaluates_and_reloads(reviews, tmp_path, capsys):
    folder = tmp_path / "run"
    options = ["--vocabulary", "60", "--input_size", "8", "--hidden_size", "8", "--num_train_epochs", "12"]
    options += ["--learning_rate", "0.02", "--disable_tqdm", "true", "--use_cpu", "--eval_strategy", "no"]
    options += ["--save_strategy", "no", "--load_best_model_at_end", "false", "--per_device_train_batch_size", "8"]
    results = train.main(["--task", "imdb", "--dataset_name", reviews, "--output_dir", str(folder), *options])
    assert results["metrics"]["test"]["accuracy"] == 1.0
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("Great film") == ["great", "film"]
    found = evaluate.main([str(folder), "--figure_rows", "2", "--count_padding", "--length", "30"])
    assert found["metrics"]["accuracy"] == 1.0
    assert found["metrics"]["updates_with_padding"] >= found["metrics"]["updates"]
    assert "updates with padding read" in capsys.readouterr().out
    assert "<mark>" in (folder / "steps-read-test.html").read_text()
    assert json.loads((folder / "evaluation-test.json").read_text())["metrics"] == found["metrics"]


def test_padding_read_is_every_step_where_the_gate_is_always_open(reviews):
    task = IMDB(dataset_name=reviews, vocabulary=50)
    config = SkipRNNConfig(**{**task.model_defaults(), "input_size": 4, "hidden_size": 3}, gate="always")
    model = SkipRNNForSequenceClassification(config)
    counts = evaluate.updates_with_padding(model, task, task.load(0).test, 32, 33)
    assert counts == {"updates_with_padding": 33.0, "updates_with_padding_std": 0.0}


def test_metrics_options_and_layout(tmp_path):
    logits, labels = np.eye(2)[[0, 1, 1]], np.array([0, 1, 0])
    assert IMDB().compute_metrics(EvalPrediction(logits, labels)) == {"accuracy": pytest.approx(2 / 3)}
    with pytest.raises(ValueError, match="length must be at least 1"):
        IMDB(length=0)
    Dataset.from_dict({"review": ["x"], "label": [0]}).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="must have splits train and test"):
        IMDB(dataset_name=str(tmp_path)).load(0)
    Dataset.from_dict({"review": ["x"], "label": [0]}).to_parquet(tmp_path / "test.parquet")
    with pytest.raises(ValueError, match=r"must have columns text and label.*got \['review', 'label'\]"):
        IMDB(dataset_name=str(tmp_path)).load(0)


def test_the_real_reviews(shared_data):
    task = IMDB(dataset_name=str(shared_data("imdb")), train_rows=2000)
    splits = task.load(0)
    assert tuple(map(len, splits)) == (2000, 3750, 25000)
    assert sum(splits.validation["label"]) == 1875
    batch = task.collate([splits.test[i] for i in (0, 24_999)])
    assert batch["labels"].tolist() == [0, 1]
    assert batch["input_ids"].shape[1] <= 200
    assert (batch["input_ids"] == 1).float().mean() < 0.2  # few unknown words
