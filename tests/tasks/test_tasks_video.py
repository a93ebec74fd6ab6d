"""The tasks ucf101 and charades: decoding, cached features, annotations, the localisation metric, trainings."""

import json
import shutil
from itertools import pairwise

import av
import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from transformers import AutoModelForTokenClassification, EvalPrediction, ResNetConfig, ResNetModel, ViTImageProcessor

from hf_skiprnn import SkipRNNConfig, SkipRNNForFrameClassification
from hf_skiprnn.commands import evaluate, train
from hf_skiprnn.tasks import UCF101, Charades
from hf_skiprnn.tasks.charades import actions_at, localisation_map, read_annotations, read_features
from hf_skiprnn.tasks.readers import arrow_cache
from hf_skiprnn.tasks.readers.video import FrameFeatures, decode_frames

QUICK = ["--hidden_size", "8", "--num_hidden_layers", "1", "--disable_tqdm", "true", "--use_cpu"]
QUICK += ["--eval_strategy", "no"]
QUICK += ["--save_strategy", "no", "--load_best_model_at_end", "false"]


def write_video(path, levels, rate):
    """Write a clip of gray frames with the given levels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 48, "yuv420p", 4_000_000
        for level in levels:
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), level, np.uint8), format="rgb24")
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def levels_of(frames):
    return [round(float(frame.mean()) / 10) for frame in frames]


@pytest.mark.parametrize(
    ("rate", "expected"),
    [
        (25, [1, 2, 3, 4, 5, 6]),
        (50, [1, 3, 5]),  # every second frame
        (10, [1, 1, 1, 2, 2, 3, 3, 3, 4, 4, 5, 5, 5, 6, 6]),  # 0.6 s
    ],
)
def test_frames_at_25_per_second(tmp_path, rate, expected):
    write_video(tmp_path / "v.avi", [10, 20, 30, 40, 50, 60], rate)
    frames = list(decode_frames(tmp_path / "v.avi", 25.0, 250))
    assert levels_of(frames) == expected
    assert frames[0].shape == (48, 64, 3)
    assert frames[0].dtype == np.uint8
    assert levels_of(decode_frames(tmp_path / "v.avi", 25.0, 2)) == expected[:2]


def test_what_is_no_video_is_named(tmp_path):
    (tmp_path / "v.avi").write_bytes(b"no video at all" * 50)
    with pytest.raises(ValueError, match=r"v\.avi could not be decoded"):
        list(decode_frames(tmp_path / "v.avi", 25.0, 250))


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A folder in UCF-101's layout, with two classes that differ in brightness and three groups."""
    root = tmp_path_factory.mktemp("ucf")
    lists, index = root / "ucfTrainTestlist", ["1 Dark", "2 Light", "3 Absent"]
    lists.mkdir()
    names = {"train": [], "test": []}
    for label, (name, level) in enumerate([("Dark", 40), ("Light", 200)], start=1):
        for group in range(1, 9):
            clip = f"{name}/v_{name}_g{group:02}_c01.avi"
            write_video(root / "UCF-101" / clip, [level + group] * (3 + group), 25)
            names["test" if group < 3 else "train"].append(clip if group < 3 else f"{clip} {label}")
    names["train"].append("Absent/v_Absent_g09_c01.avi 3")
    (lists / "classInd.txt").write_text("\n".join(index) + "\n")
    for which, clip_names in names.items():
        (lists / f"{which}list01.txt").write_text("\n".join(clip_names) + "\n")
    return root


@pytest.fixture(scope="module")
def image_model(tmp_path_factory):
    """The folder of a small image model that AutoModel can load."""
    folder = tmp_path_factory.mktemp("resnet")
    sizes = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic")
    ResNetModel(sizes).eval().save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


def test_features_are_the_pooled_output_of_any_image_model(clips, image_model):
    features = FrameFeatures(image_model)
    frames = [np.full((48, 64, 3), level, np.uint8) for level in range(0, 240, 6)]  # more than one batch
    assert len(frames) == 40
    pixels = features.processor(images=frames, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = features.model(pixels).last_hidden_state.mean(dim=(2, 3))
    assert features(iter(frames)) == pytest.approx(expected.numpy(), abs=1e-5)


def test_splits_hold_whole_groups_out_and_leave_absent_clips_out(clips, tmp_path, caplog):
    task = UCF101(dataset_name=str(clips), feature_model="random", cache_folder=str(tmp_path))
    splits = task.load(0)
    assert "12 of 13 clips of the train list" in caplog.text
    assert "RANDOM FEATURES" in caplog.text
    assert tuple(map(len, splits)) == (10, 2, 4)
    groups = [{str(clip)[-11:-8] for clip in part["clip"]} for part in splits]
    assert not groups[0] & groups[1]
    assert groups[2] == {"g01", "g02"}
    row = splits.test[0]
    assert row["steps"].shape == (4, 256)
    assert [int(label) for label in splits.test["label"]] == [0, 0, 1, 1]
    batch = task.collate([splits.test[i] for i in range(4)])
    assert batch["input_values"].shape == (4, 5, 256)
    assert batch["attention_mask"].sum(dim=1).tolist() == [4, 5, 4, 5]
    assert task.model_defaults()["label2id"] == {"Dark": 0, "Light": 1, "Absent": 2}


def test_features_are_kept_resumed_and_made_anew_when_anything_changes(clips, tmp_path, monkeypatch):
    monkeypatch.setattr(arrow_cache, "ROWS_PER_FILE", 4)
    made = []
    whole = FrameFeatures.__call__

    def counting(self, frames):
        made.append(1)
        if len(made) == stop_at:
            raise KeyboardInterrupt
        return whole(self, frames)

    monkeypatch.setattr(FrameFeatures, "__call__", counting)

    def load(**options):
        made.clear()
        task = UCF101(dataset_name=str(clips), feature_model="random", cache_folder=str(tmp_path), **options)
        return task.load(0), len(made) - 1  # one call only finds out the width

    stop_at = 8  # in the second file
    with pytest.raises(KeyboardInterrupt):
        load()
    assert [path.name for path in tmp_path.glob("*/*")] == ["rows-000000.arrow"]
    stop_at = 0
    splits, calls = load()
    assert calls == 12
    again, calls = load()
    assert calls == 0
    assert np.array_equal(again.test[3]["steps"], splits.test[3]["steps"])
    assert load(frames=3)[1] == 16
    assert load(split_seed=1)[1] == 0
    assert len(list(tmp_path.glob("*"))) == 2


def test_ucf101_trains_and_evaluates(clips, image_model, tmp_path):
    options = ["--task", "ucf101", "--dataset_name", str(clips), "--feature_model", image_model]
    options += ["--cache_folder", str(tmp_path / "cache"), "--num_train_epochs", "15", "--learning_rate", "0.03"]
    results = train.main([*options, "--output_dir", str(tmp_path / "run"), *QUICK])
    assert results["metrics"]["test"]["accuracy"] == 1.0
    found = evaluate.main([str(tmp_path / "run"), "--figure_rows", "2"])
    assert found["metrics"]["accuracy"] == 1.0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dataset_name": ""}, ValueError, "must be a folder in UCF-101's layout"),
        ({"feature_model": "absent/model"}, OSError, "'absent/model' cannot be loaded .* random"),
        ({"list_number": 2}, ValueError, r"There is no .*trainlist02\.txt"),
    ],
)
def test_ucf101_says_what_it_lacks(clips, options, error, message):
    with pytest.raises(error, match=message):
        UCF101(**({"dataset_name": str(clips)} | options)).load(0)
    with pytest.raises(ValueError, match="frames and frame_rate must be above 0"):
        UCF101(frames=0)


def test_the_real_clips(shared_data, tmp_path):
    folder = shared_data("ucf101_clips")
    lists = sorted((folder / "UCF-101").glob("*/*.avi"))
    frames = list(decode_frames(lists[0], 25.0, 250))
    with av.open(str(lists[0])) as container:
        assert len(frames) == min(container.streams.video[0].frames, 250)  # they have 25 frames a second
    assert frames[0].shape == (240, 320, 3)
    changes = [np.abs(a.astype(int) - b).mean() for a, b in pairwise(frames[:20])]
    assert max(changes) > 0.5  # it moves


HEADER = "id,subject,scene,quality,relevance,verified,script,objects,descriptions,actions,length\n"


def csv_row(name, actions, length=10.0):
    return f'{name},S1,Kitchen,6,7,Yes,"A person, cooking.",pan,"He cooks.",{actions},{length}\n'


def write_features(root, name, steps):
    (root / name).mkdir(parents=True)
    for i, step in enumerate(steps):
        (root / name / f"{name}-{1 + 4 * i:06}.txt").write_text(" ".join(f"{x:.6f}" for x in step) + "\n")


@pytest.fixture
def charades(tmp_path):
    """A folder of videos of two seconds (12 frames): the first feature is high during c001, the second during c005."""
    rng = np.random.default_rng(0)
    root = tmp_path / "charades"
    root.mkdir()
    for which, count in (("train", 12), ("test", 4)):
        rows = HEADER
        for i in range(count):
            name, start = f"{which[1].upper()}{i:04}", float(rng.uniform(0, 1.2))
            steps = rng.normal(0, 0.1, (12, 6))
            times = np.arange(12) * 4 / 24
            steps[(times >= start) & (times <= start + 0.7), 0] += 2
            steps[times <= 0.5, 1] += 2
            write_features(root / "Charades_v1_features_rgb", name, steps)
            rows += csv_row(name, f"c001 {start:.2f} {start + 0.7:.2f};c005 0.00 0.50", 2.0)
        rows += csv_row("LOST", "")
        (root / f"Charades_v1_{which}.csv").write_text(rows)
    return root


def test_annotations_and_features_are_read(charades, tmp_path):
    videos = read_annotations(charades / "Charades_v1_train.csv")
    assert len(videos) == 13
    assert videos[-1] == ("LOST", ())
    assert videos[0].actions[1] == (5, 0.0, 0.5)
    steps, times = read_features(charades / "Charades_v1_features_rgb" / "R0000", 6)
    assert steps.shape == (12, 6)
    assert times == pytest.approx(np.arange(12) / 6)  # 6 per second
    active = actions_at(np.array([0.0, 0.5, 0.6]), ((3, 0.5, 0.6), (156, 0.0, 0.5)))
    assert active.shape == (3, 157)
    assert active[:, 3].tolist() == [0, 1, 1]
    assert active[:, 156].tolist() == [1, 1, 0]
    assert active.sum() == 4


def test_features_of_another_folder_are_not_those_of_the_cache(charades, tmp_path):
    """Folders of two kinds of features (of pictures, of flow) have the same names and numbers of files."""
    other = tmp_path / "flow"
    shutil.copytree(charades / "Charades_v1_features_rgb", other)
    for path in other.rglob("*.txt"):
        path.write_text("2.000000 " * 5 + "2.000000\n")
    options = {"dataset_name": str(charades), "feature_size": 6, "cache_folder": str(tmp_path / "cache")}
    assert Charades(**options).load(0).test[0]["steps"].max() != 2
    assert (Charades(**options, feature_folder=str(other)).load(0).test[0]["steps"] == 2).all()
    for path in other.rglob("*.txt"):  # of the same size
        path.write_text("3.000000 " * 5 + "3.000000\n")
    assert (Charades(**options, feature_folder=str(other)).load(0).test[0]["steps"] == 3).all()


def test_average_precision_by_hand():
    """One class, scores 0.9 (yes), 0.8 (no), 0.7 (yes), 0.1 (no): precision 1 at the first yes, 2/3 at the second."""
    scores = np.array([0.9, 0.8, 0.7, 0.1]).reshape(1, 4, 1)
    labels = np.array([1.0, 0.0, 1.0, 0.0]).reshape(1, 4, 1)
    assert localisation_map(scores, labels, 4) == pytest.approx((1 + 2 / 3) / 2)
    # At two equally spaced frames, 0 and 2, both are yes.
    assert localisation_map(scores, labels, 2) == pytest.approx(1.0)
    # The second class is ranked in the wrong order (AP 1/2); the third never occurs and is left out.
    more = np.concatenate([scores, [[[0.9], [0.1], [0.2], [0.3]]], scores], axis=2)
    truth = np.concatenate([labels, [[[0.0], [0.0], [0.0], [1.0]]], 0 * labels], axis=2)
    assert localisation_map(more, truth, 4) == pytest.approx(((1 + 2 / 3) / 2 + 1 / 2) / 2)


def test_the_metric_reads_equally_spaced_frames_of_real_length():
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=(2, 50, 3)), (rng.random((2, 50, 3)) < 0.3).astype(float)
    labels[1, 30:] = -100  # padding, as in Trainer
    frames = [np.array([0, 2, 4, 6, 8]) * 5, np.array([0, 1, 2, 3, 4]) * 6]
    rows = [(scores[v, f], labels[v, f]) for v, f in enumerate(frames)]
    expected = np.mean(
        [average_precision_score(*(np.concatenate([r[k][:, c] for r in rows]) for k in (1, 0))) for c in range(3)]
    )
    assert localisation_map(scores, labels, 5) == pytest.approx(expected)
    found = Charades().compute_metrics(EvalPrediction(scores, labels))
    assert set(found) == {"map_25", "map_100"}
    assert np.isnan(localisation_map(scores, np.zeros_like(labels), 5))


def test_charades_trains_evaluates_and_reloads(charades, tmp_path, caplog, capsys):
    options = ["--task", "charades", "--dataset_name", str(charades), "--feature_size", "6", "--gate", "always"]
    options += ["--cache_folder", str(tmp_path / "cache"), "--num_train_epochs", "40", "--learning_rate", "0.03"]
    options += ["--classifier_dropout", "0", "--per_device_train_batch_size", "4"]
    results = train.main([*options, "--output_dir", str(tmp_path / "run"), *QUICK])
    assert "features of 12 of 13 videos" in caplog.text
    assert results["metrics"]["test"]["map_25"] > 0.9
    assert results["metrics"]["test"]["map_100"] > 0.9
    model = AutoModelForTokenClassification.from_pretrained(tmp_path / "run")
    assert type(model) is SkipRNNForFrameClassification
    found = evaluate.main([str(tmp_path / "run"), "--figure_rows", "2"])
    assert found["metrics"]["map_25"] == pytest.approx(results["metrics"]["test"]["map_25"])
    assert found["metrics"]["task_loss"] == pytest.approx(results["metrics"]["test"]["task_loss"], rel=1e-4)
    assert "map_100: " in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "run.json").read_text())["task"] == "charades"


def test_the_recipes_gate_skips_frames_and_stays_open(charades, tmp_path):
    options = ["--task", "charades", "--dataset_name", str(charades), "--feature_size", "6"]
    options += ["--cache_folder", str(tmp_path / "cache"), "--num_train_epochs", "160", "--learning_rate", "0.02"]
    options += ["--classifier_dropout", "0", "--per_device_train_batch_size", "4"]
    test = train.main([*options, "--output_dir", str(tmp_path / "run"), *QUICK])["metrics"]["test"]
    assert test["map_100"] > 0.8
    assert 0.25 < test["update_rate"] < 0.6


def test_charades_batches_are_padded(charades, tmp_path):
    root = charades / "Charades_v1_features_rgb"
    for path in sorted((root / "E0001").glob("*"))[6:]:
        path.unlink()
    task = Charades(dataset_name=str(charades), feature_size=6, cache_folder=str(tmp_path))
    rows = task.load(0)
    batch = task.collate([rows.test[0], rows.test[1]])
    assert batch["input_values"].shape == (2, 12, 6)
    assert batch["labels"].shape == (2, 12, 157)
    lengths = batch["attention_mask"].sum(dim=1)
    assert sorted(lengths.tolist()) == [6, 12]
    short = int(lengths.argmin())
    assert (batch["labels"][short, 6:] == -100).all()
    assert set(batch["labels"][short, :6].unique().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        ("c157 0.00 1.00", "row 0, column 'actions'.* got 'c157"),
        ("c001 0.00", "got 'c001 0.00'"),
        ("walk", "got 'walk'"),
    ],
)
def test_broken_annotations_are_named(tmp_path, actions, message):
    (tmp_path / "list.csv").write_text(HEADER + csv_row("A", actions))
    with pytest.raises(ValueError, match=message):
        read_annotations(tmp_path / "list.csv")


def test_charades_says_what_it_lacks(charades, tmp_path):
    with pytest.raises(ValueError, match=r"There is no .*Charades_v1_train\.csv"):
        Charades(dataset_name=str(tmp_path)).load(0)
    with pytest.raises(ValueError, match=r"must hold 4096 finite numbers \(--feature_size\); it holds 6"):
        Charades(dataset_name=str(charades), cache_folder=str(tmp_path / "c")).load(0)
    shutil.rmtree(charades / "Charades_v1_features_rgb")
    with pytest.raises(ValueError, match=r"holds no features of Charades_v1_train.csv"):
        Charades(dataset_name=str(charades)).load(0)
    (tmp_path / "list.csv").write_text("name,actions\nA,\n")
    with pytest.raises(ValueError, match="row 0 needs columns id and actions"):
        read_annotations(tmp_path / "list.csv")


def test_charades_starts_from_how_often_each_action_occurs(charades, tmp_path):
    task = Charades(dataset_name=str(charades), feature_size=6, cache_folder=str(tmp_path))
    config = SkipRNNConfig(**task.model_defaults(), hidden_size=4)
    model = SkipRNNForFrameClassification(config)
    task.initialise(model)
    train = task.load(0).train
    actions = np.concatenate([row["actions"] for row in train])
    share = model.classifier.bias.sigmoid().detach().numpy()
    assert share[1] == pytest.approx((actions[:, 1].sum() + 1) / (len(actions) + 2))
    assert 0 < share[100] < 0.01  # it never occurs


def test_charades_loss_is_summed_over_classes(charades, tmp_path):
    task = Charades(dataset_name=str(charades), feature_size=6, cache_folder=str(tmp_path))
    logits, labels = torch.randn(2, 5, 157), (torch.rand(2, 5, 157) < 0.1).float()
    labels[1, 3:] = -100
    frames = torch.cat([logits[0], logits[1, :3]]), torch.cat([labels[0], labels[1, :3]])
    want = torch.nn.functional.binary_cross_entropy_with_logits(*frames) * 157
    loss = task.loss()
    torch.testing.assert_close(loss({"logits": logits}, labels), want)
    items = (labels != -100).sum()  # over all micro-batches of a step, as in Trainer
    parts = [loss({"logits": logits[i : i + 1]}, labels[i : i + 1], items) for i in range(2)]
    torch.testing.assert_close(parts[0] + parts[1], want)


def test_charades_figure_says_what_was_recognised(charades, tmp_path):
    task = Charades(dataset_name=str(charades), feature_size=6, cache_folder=str(tmp_path))
    batch = task.collate([task.load(0).test[0]])
    logits = np.full((1, 12, 157), -9.0)
    logits[0, 3, [5, 7]] = 2.0
    titles = [axes.get_title(loc="left") for axes in task.figure(batch, np.ones((1, 12), bool), logits).axes]
    assert titles == ["c001, c005: read as c005, c007; 12 of 12 read"]
