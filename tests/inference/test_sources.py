"""Sources for pull: they read only the wanted steps, so that an encoder runs only on the frames that are read."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Array2D, Dataset, Features
from skipping_models import build
from torch import nn

from hf_skiprnn import SkipRNNForSequenceClassification
from hf_skiprnn.inference import videos as videos_module
from hf_skiprnn.inference.sources import ArraySource, ArrowSource, DatasetSource, IteratorSource, VideoSource
from hf_skiprnn.inference.videos import classify_pulled
from hf_skiprnn.model.pull_skip_rnn import EndOfSequence

LENGTHS = [30, 1, 17]


@pytest.fixture
def model() -> SkipRNNForSequenceClassification:
    return build()


def whole(model: SkipRNNForSequenceClassification, rows: list[np.ndarray]):
    """Return the output of a forward pass over all steps."""
    padded = nn.utils.rnn.pad_sequence([torch.as_tensor(row) for row in rows], batch_first=True)
    mask = torch.arange(padded.shape[1]) < torch.tensor([len(row) for row in rows]).unsqueeze(1)
    with torch.no_grad():
        return model(**{model.main_input_name: padded}, attention_mask=mask, output_update_gates=True)


def assert_same(got, want) -> None:
    assert torch.equal(got.update_gates, want.update_gates)
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-5, atol=1e-6)


@pytest.fixture
def rows() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.normal(size=(steps, 2)).astype(np.float32) for steps in LENGTHS]


def test_memmaps(tmp_path: Path, model, rows: list[np.ndarray]) -> None:
    maps = []
    for index, row in enumerate(rows):
        np.save(tmp_path / f"{index}.npy", row)
        maps.append(np.load(tmp_path / f"{index}.npy", mmap_mode="r"))
    source = ArraySource(maps)
    assert source.lengths == LENGTHS
    assert_same(model.pull(source, source.lengths), whole(model, rows))
    assert_same(model.pull(ArraySource(rows[0][None]), 30), whole(model, rows[:1]))


def test_iterators_end_where_they_end(model, rows: list[np.ndarray]) -> None:
    source = IteratorSource(rows)
    out = model.pull(source, batch_size=3)
    assert_same(out, whole(model, rows))
    assert source.taken == LENGTHS
    with pytest.raises(ValueError, match="step 3 of row 0 has passed"):
        source([(0, 3)])


def test_an_iterator_is_not_taken_further_than_needed(model) -> None:
    taken = 0

    def endless() -> Iterator[np.ndarray]:
        nonlocal taken
        while True:
            taken += 1
            yield np.ones(2, np.float32)

    out = model.pull(IteratorSource([endless()]), 100)
    assert taken == int(out.update_gates[0].nonzero().max()) + 1


@pytest.mark.parametrize("inner", [pa.list_(pa.float32()), pa.list_(pa.float32(), 2)], ids=str)
def test_arrow_columns(model, rows: list[np.ndarray], inner: pa.DataType) -> None:
    array = pa.array([row.tolist() for row in rows], type=pa.list_(inner))
    for column in (array, pa.chunked_array([array[:1], array[1:]])):
        source = ArrowSource(column)
        assert source.lengths == LENGTHS
        assert_same(model.pull(source, source.lengths), whole(model, rows))


def test_arrow_columns_of_numbers_and_of_tokens() -> None:
    rng = np.random.default_rng(0)
    samples = [rng.normal(size=(steps, 1)).astype(np.float32) for steps in LENGTHS]
    numbers = build(input_size=1)
    column = pa.array([row[:, 0].tolist() for row in samples], type=pa.list_(pa.float32()))
    assert_same(numbers.pull(ArrowSource(column), LENGTHS), whole(numbers, samples))
    ids = [rng.integers(0, 11, size=steps) for steps in LENGTHS]
    text = build(vocab_size=11)
    source = ArrowSource(pa.array([row.tolist() for row in ids]), is_text=True)
    assert_same(text.pull(source, source.lengths), whole(text, ids))


def test_rows_of_datasets(tmp_path: Path, model, rows: list[np.ndarray]) -> None:
    dataset = Dataset.from_dict({"series": [row.tolist() for row in rows], "label": [0, 1, 2]})
    dataset.save_to_disk(tmp_path / "saved")
    for stored, order in (
        (dataset, [0, 1, 2]),
        (Dataset.load_from_disk(str(tmp_path / "saved")).select([2, 0]), [2, 0]),
    ):
        source = DatasetSource(stored, "series")
        assert source.lengths == [LENGTHS[row] for row in order]
        assert_same(model.pull(source, source.lengths), whole(model, [rows[row] for row in order]))
    with pytest.raises(ValueError, match="has no column 'audio'; it has"):
        DatasetSource(dataset, "audio")


def test_matrices_of_a_dataset_are_rows_of_steps(rows: list[np.ndarray]) -> None:
    """As the tasks of this package store features: Array2D."""
    features = Features({"steps": Array2D((None, 2), "float32")})
    source = DatasetSource(Dataset.from_dict({"steps": [row.tolist() for row in rows]}, features=features), "steps")
    assert source.lengths == LENGTHS
    for row, step in ((0, 0), (2, 3), (1, LENGTHS[1] - 1)):
        assert np.allclose(source([(row, step)]), rows[row][step])


def write_video(path: Path, frames: int, codec: str, cuts: tuple[int, ...] = (), **options: str) -> Path:
    """Write a video of a moving gradient with a key frame every 12 frames, and near each cut."""
    av = pytest.importorskip("av", reason="needs the video extra: pip install 'hf_skiprnn[video]'")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 64, 48, "yuv420p", 12
        for index in range(frames):
            picture = np.add.outer(np.arange(48), np.arange(64))[..., None] + np.array([3, 5, 7]) * index
            noise = np.random.default_rng(sum(cut <= index for cut in cuts)).integers(0, 200, (48, 64, 3))
            picture = picture + noise if cuts else picture
            frame = av.VideoFrame.from_ndarray((picture % 256).astype(np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def every_frame(path: Path) -> list[np.ndarray]:
    import av

    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [("a.avi", "mpeg4", {}), ("b.mp4", "mpeg4", {"bf": "2"}), ("c.mkv", "mpeg4", {}), ("d.avi", "mpeg4", {"bf": "2"})],
)
def test_frames_are_those_of_a_full_decoding(tmp_path: Path, name: str, codec: str, options: dict) -> None:
    path = write_video(tmp_path / name, 60, codec, **options)
    frames = every_frame(path)
    source = VideoSource([path, path])
    assert source.lengths == [60, 60]
    for wanted in ([(0, 0), (1, 59)], [(0, 1)], [(0, 40), (1, 13)], [(0, 12)], [(0, 12), (1, 5)]):
        for (_, index), frame in zip(wanted, source(wanted), strict=True):
            assert np.array_equal(frame, frames[index]), index
    source.close()


@pytest.mark.parametrize("name", ["a.avi", "b.mp4", "c.mkv"])
def test_every_frame_near_cuts_is_found_after_a_jump(tmp_path: Path, name: str) -> None:
    """A key frame soon after another one: AVI files are indexed by the order of decoding, not of showing."""
    path = write_video(tmp_path / name, 60, "mpeg4", (20, 22, 40, 42), bf="2")
    frames = every_frame(path)
    for index in range(60):
        source = VideoSource([path])
        source([(0, 0)])
        (frame,) = source([(0, index)])
        assert np.array_equal(frame, frames[index]), index
        source.close()


def test_frames_that_nobody_needs_are_not_decoded(tmp_path: Path) -> None:
    source = VideoSource([write_video(tmp_path / "a.avi", 60, "mpeg4")], max_frames=50)
    assert source.lengths == [50]
    source([(0, 0)])
    source([(0, 26)])  # two frames after the key frame 24
    source([(0, 28)])
    assert (source.read, source.decoded) == (3, 1 + 3 + 2)
    source.close()


def test_steps_may_be_further_apart_than_frames(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.avi", 60, "mpeg4")  # 25 frames a second
    frames = every_frame(path)
    for rate, count, shown in ((5.0, 12, 5), (25.0, 60, 1), (50.0, 120, 0.5), (10.0, 24, 2.5)):
        source = VideoSource([path], frame_rate=rate)
        assert source.lengths == [count]
        for step in (0, 3, count - 1):
            assert np.array_equal(source([(0, step)])[0], frames[int(step * shown)])
        source.close()


def test_a_video_ends_where_its_frames_end(model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A damaged file can have more packets, which are counted, than frames."""
    monkeypatch.setattr(videos_module, "FRAMES_AT_ONCE", 8)
    rows, lengths = [torch.randn(21, 2), torch.randn(5, 2)], [30, 5]

    def videos(positions: list[tuple[int, int]]) -> list[torch.Tensor]:
        if ended := {row for row, step in positions if step >= len(rows[row])}:
            raise EndOfSequence({row: len(rows[row]) for row in ended})
        return [rows[row][step] for row, step in positions]

    out = videos_module._classify_everything(model, videos, lengths, torch.stack)
    assert lengths == [21, 5]
    want = whole(model, [row.numpy() for row in rows])
    assert torch.equal(out.update_gates, want.update_gates)
    torch.testing.assert_close(out.logits, want.logits)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    source = VideoSource([write_video(tmp_path / "a.avi", 60, "mpeg4")])
    import av

    def damaged() -> Iterator[None]:
        raise av.InvalidDataError(1, "Invalid data found when processing input")
        yield

    source._file(0).frames = damaged()
    with pytest.raises(ValueError, match=r"a\.avi could not be decoded after frame 0: .*Repair the file"):
        source([(0, 0)])
    source.close()


def test_a_file_that_is_no_video_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("av", reason="needs the video extra: pip install 'hf_skiprnn[video]'")
    (tmp_path / "x.avi").write_bytes(b"not a video")
    with pytest.raises(ValueError, match=r"x\.avi cannot be opened as a video"):
        VideoSource([tmp_path / "x.avi"])([(0, 0)])


class SmallCNN(nn.Module):
    """An encoder of frames with random weights that counts the frames; its accuracy has no meaning."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 16, 7, stride=4), nn.ReLU(), nn.Conv2d(16, features, 5, stride=4), nn.AdaptiveAvgPool2d(1)
        )
        self.encoded = 0

    @torch.no_grad()
    def encode(self, frames: list[np.ndarray]) -> torch.Tensor:
        self.encoded += len(frames)
        return self.layers(torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2) / 255).flatten(1)


def test_every_frame_of_real_clips(shared_data: Callable[[str], Path]) -> None:
    """The clips have B-frames with time stamps out of order (BabyCrawling) and several key frames (Punch)."""
    pytest.importorskip("av", reason="needs the video extra: pip install 'hf_skiprnn[video]'")
    for name in ("BabyCrawling", "Punch"):
        path = min((shared_data("ucf101_clips") / "UCF-101" / name).glob("*.avi"))
        frames, source = every_frame(path), VideoSource([path])
        assert source.lengths == [len(frames)]
        for step in [*range(len(frames)), 3, len(frames) - 1, 30]:
            assert np.array_equal(source([(0, step)])[0], frames[step]), (name, step)
        source.close()


def test_ucf101_encodes_only_the_frames_that_are_read(shared_data: Callable[[str], Path]) -> None:
    """The clips are real; the CNN and the Skip LSTM have random weights, so only counts and times have a meaning."""
    pytest.importorskip("av", reason="needs the video extra: pip install 'hf_skiprnn[video]'")
    folders = [shared_data("ucf101_clips") / "UCF-101" / name for name in ("Punch", "BabyCrawling")]
    paths = [path for folder in folders for path in sorted(folder.glob("*.avi"))[:2]]
    cnn, model = SmallCNN(32), build(input_size=32, hidden_size=16, update_bias=-2.5)
    saving = classify_pulled(model, paths, [0, 0, 1, 1], cnn.encode, frames=50, batch_size=3)
    assert (saving.clips, saving.clips_with_other_gates) == (4, 0)
    assert saving.right_pulled == saving.right_everything
    assert saving.frames_encoded < saving.frames / 2
    assert saving.frames_decoded < saving.frames  # the Punch clips have key frames to jump to
    assert cnn.encoded == saving.frames_encoded + saving.frames


def test_evaluate_pulls_ucf101(tmp_path: Path, shared_data: Callable[[str], Path]) -> None:
    """Run scripts/evaluate.py --pull on the real test clips, with random features and weights."""
    pytest.importorskip("av", reason="needs the video extra: pip install 'hf_skiprnn[video]'")
    folder = shared_data("ucf101_clips")
    from hf_skiprnn.commands import evaluate as script

    build(input_size=256, num_labels=101, update_bias=-2.5).save_pretrained(tmp_path / "checkpoint")
    options = ["--task", "ucf101", "--dataset_name", str(folder), "--feature_model", "random", "--frames", "40"]
    result = script.main([str(tmp_path / "checkpoint"), *options, "--pull"])
    assert result == json.loads((tmp_path / "checkpoint" / "evaluation-pull.json").read_text())
    assert result["clips"] == 9
    assert result["frames_encoded"] < result["frames"] / 2
    assert result["clips_with_other_gates"] == 0
    with pytest.raises(SystemExit, match="for task ucf101; got digits"):
        script.main([str(tmp_path / "checkpoint"), "--task", "digits", "--pull"])


def test_tensors_of_any_kind_are_steps() -> None:
    rows = torch.tensor([[[0.5, 2.0], [1.0, 3.0]]])
    for row in (rows.bfloat16(), rows.clone().requires_grad_(), rows.numpy(), rows.tolist()):
        assert ArraySource(row)([(0, 1)]).tolist() == [[1.0, 3.0]]


def test_an_empty_cell_is_named() -> None:
    with pytest.raises(ValueError, match=r"Row 1 of the column is empty \(None\)"):
        _ = ArrowSource(pa.array([[1.0, 2.0], None])).lengths
