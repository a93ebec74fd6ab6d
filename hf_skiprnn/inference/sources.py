"""Sources of steps for `model.pull`: arrays and memmaps, iterators, Arrow columns, `datasets`, video files.

A source is called with [(row, position), ...] and reads only those steps. If an encoder is called on its result, the
encoder runs only on the steps that the model reads:

    videos = VideoSource(paths)
    out = model.pull(lambda positions: encode(videos(positions)), videos.lengths)
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hf_skiprnn.model.pull_skip_rnn import EndOfSequence, Position

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset


SLACK = 1e-3  # in steps: tolerance for frame rates, which files store rounded


class ArraySource:
    """A source of arrays: rows [T, I] (token ids: [T]) in a list, or one array [B, T, I]; np.memmap too.

    Only the wanted steps are read from the disk.
    """

    def __init__(self, rows: Sequence[Any] | npt.NDArray[Any]) -> None:
        self.rows = rows

    @property
    def lengths(self) -> list[int]:
        """Steps of each row."""
        return [len(row) for row in self.rows]

    def __call__(self, positions: list[Position]) -> npt.NDArray[Any]:
        return np.stack([as_array(self.rows[row][step]) for row, step in positions])


def as_array(step: Any) -> npt.NDArray[Any]:
    """Return a step as an array; a tensor may be of bfloat16, which numpy lacks, or have a gradient."""
    if isinstance(step, Tensor):
        step = step.detach().cpu()
        return (step.float() if step.dtype == torch.bfloat16 else step).numpy()
    return np.asarray(step)


class IteratorSource:
    """A source of rows that yield one step after another and have an unknown length, such as generators or sensors.

    Steps that the model skips are taken from the iterator and dropped. A position can be read once.
    """

    def __init__(self, rows: Iterable[Iterable[Any]]) -> None:
        self.rows: list[Iterator[Any]] = [iter(row) for row in rows]
        self.taken = [0] * len(self.rows)  # number of steps taken from each row
        self._waiting: dict[Position, Any] = {}  # taken but not yet returned, because another row ended

    def __call__(self, positions: list[Position]) -> list[Any]:
        ended = {row: self.taken[row] for row, step in positions if not self._take(row, step)}
        if ended:
            raise EndOfSequence(ended)
        return [as_array(self._waiting.pop(position)) for position in positions]

    def _take(self, row: int, step: int) -> bool:
        """Take the row's steps up to `step`, and keep that one in `_waiting`; return False if the row has ended."""
        if (row, step) in self._waiting:
            return True
        if step < self.taken[row]:
            raise ValueError(
                f"step {step} of row {row} has passed: an iterator only goes forward; its next is {self.taken[row]}."
            )
        for x in self.rows[row]:
            self.taken[row] += 1
            if self.taken[row] > step:
                self._waiting[row, step] = x
                return True
        return False


class ArrowSource:
    """A source of an Arrow column whose cells are lists of numbers or token ids, or lists of vectors.

    Only the wanted steps are converted, so only their parts of a memory-mapped file are read. With is_text=False a
    number becomes a vector of one element.
    """

    def __init__(self, column: "pa.ChunkedArray | pa.Array", is_text: bool = False) -> None:
        import pyarrow as pa

        if isinstance(column.type, pa.BaseExtensionType):  # Array2D of datasets
            chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
            column = pa.chunked_array([chunk.storage for chunk in chunks], column.type.storage_type)
        self.column, self.is_text = column, is_text

    @property
    def lengths(self) -> list[int]:
        """Steps of each row."""
        import pyarrow.compute as pc

        lengths = pc.list_value_length(self.column).to_pylist()
        if None in lengths:
            raise ValueError(f"Row {lengths.index(None)} of the column is empty (None). Fill it, or leave it out.")
        return lengths

    def __call__(self, positions: list[Position]) -> npt.NDArray[Any]:
        steps = np.array([self.column[row].values[step].as_py() for row, step in positions])
        return steps if self.is_text else steps.astype(np.float32).reshape(len(positions), -1)


class DatasetSource:
    """A source of a column of a `datasets.Dataset`, as ArrowSource; works on disk and after select, filter, shuffle."""

    def __init__(self, dataset: "Dataset", column: str, is_text: bool = False) -> None:
        if column not in dataset.column_names:
            raise ValueError(f"The dataset has no column {column!r}; it has {dataset.column_names}.")
        self.rows = dataset.select_columns([column]).with_format("arrow")
        self.column, self.is_text = column, is_text

    @property
    def lengths(self) -> list[int]:
        """Steps of each row."""
        return [length for row in range(len(self.rows)) for length in self._row(row).lengths]

    def _row(self, row: int) -> ArrowSource:
        return ArrowSource(self.rows[row][self.column], self.is_text)

    def __call__(self, positions: list[Position]) -> npt.NDArray[Any]:
        return np.concatenate([self._row(row)([(0, step)]) for row, step in positions])


class VideoSource:
    """A source of the frames of video files, uint8 [height, width, 3] RGB. Needs the `video` extra: PyAV.

    To read a frame it jumps to the last key frame before it, and decodes from there. No other frames are decoded, and
    only wanted frames are converted to RGB.

    Args:
        paths: video files, one for each row.
        max_frames: largest number of steps of a row.
        frame_rate: steps per second; a step is the frame shown at its time. The files must have a constant frame rate.
            Default: every frame is a step.

    Attributes:
        read: number of frames that were returned.
        decoded: number of frames that were decoded to get them.
    """

    def __init__(
        self, paths: Sequence[str | Path], max_frames: int | None = None, frame_rate: float | None = None
    ) -> None:
        self.paths, self.max_frames, self.frame_rate = list(paths), max_frames, frame_rate
        self.files: dict[int, _Video] = {}
        self.read = 0

    def _file(self, row: int) -> "_Video":
        if row not in self.files:
            self.files[row] = _Video(self.paths[row])
        return self.files[row]

    @property
    def decoded(self) -> int:
        """Number of frames that were decoded so far."""
        return sum(file.decoded for file in self.files.values())

    @property
    def lengths(self) -> list[int]:
        """Steps of each file, at most max_frames; counted from the files' packets, without decoding."""
        files = map(self._file, range(len(self.paths)))
        counts = [math.ceil(len(file.order) / self._frames_a_step(file) - SLACK) for file in files]
        return counts if self.max_frames is None else [min(count, self.max_frames) for count in counts]

    def __call__(self, positions: list[Position]) -> list[npt.NDArray[np.uint8]]:
        frames = [self._frame(self._file(row), step) for row, step in positions]
        missing = [row for (row, _), frame in zip(positions, frames, strict=True) if frame is None]
        if missing:  # the file is truncated
            files = {row: self._file(row) for row in missing}
            raise EndOfSequence({row: math.ceil(f.at / self._frames_a_step(f) - SLACK) for row, f in files.items()})
        self.read += len(frames)
        return [frame for frame in frames if frame is not None]

    def _frames_a_step(self, file: "_Video") -> float:
        rate = file.stream.average_rate
        return float(rate) / self.frame_rate if self.frame_rate and rate else 1.0

    def _frame(self, file: "_Video", step: int) -> npt.NDArray[np.uint8] | None:
        return file.frame(math.floor(step * self._frames_a_step(file) + SLACK))

    def close(self) -> None:
        """Close the files."""
        for file in self.files.values():
            file.container.close()
        self.files.clear()


class _Video:
    """One video file, and the position up to which it is decoded."""

    def __init__(self, path: str | Path) -> None:
        import av

        self.path = path
        try:
            self.container = av.open(str(path))
        except (OSError, av.FFmpegError) as error:
            raise ValueError(f"{path} cannot be opened as a video: {error}") from error
        if not self.container.streams.video:
            raise ValueError(f"{path} holds no video stream.")
        self.stream = self.container.streams.video[0]
        packets = [packet for packet in self.container.demux(self.stream) if packet.size]
        keys = [packet.is_keyframe for packet in packets]
        times = [packet.pts for packet in packets if packet.pts is not None]
        # Where to seek for a frame: the time of decoding, by which some formats (AVI) are indexed.
        self.seeks = {p.pts: p.pts if p.dts is None else p.dts for p in packets if p.pts is not None}
        # The decoder returns frames in order of their times. If they have no times, the file is decoded from its start.
        self.can_jump = len(set(times)) == len(packets)
        self.order = sorted(times) if self.can_jump else list(range(len(packets)))
        self.keys = [0]
        if self.can_jump:
            places = {time: index for index, time in enumerate(self.order)}
            self.keys = sorted(places[time] for time, is_key in zip(times, keys, strict=True) if is_key)
        self.decoded = 0
        self._last: tuple[int, npt.NDArray[np.uint8]] | None = None
        self._jump(0)

    def _jump(self, index: int) -> None:
        """Continue decoding at the key frame `index`, or at the start."""
        self.container.seek(self.seeks[self.order[index]] if index else 0, stream=self.stream, backward=True)
        self.frames = self.container.decode(self.stream)
        self.at = index  # the next frame
        self.landing = self.order[index] if index else -math.inf  # time of the frame at `index`

    def frame(self, index: int) -> npt.NDArray[np.uint8] | None:
        """Return frame `index` as uint8 [height, width, 3]; None after the end.

        Raises:
            ValueError: the file is damaged there.
        """
        import av

        if self._last is not None and self._last[0] == index:
            return self._last[1]
        try:
            return self._decode(index)
        except av.FFmpegError as error:
            raise ValueError(
                f"{self.path} could not be decoded after frame {self.at}: {error}. Repair the file, or leave it out."
            ) from error

    def _decode(self, index: int) -> npt.NDArray[np.uint8] | None:
        key = max((key for key in self.keys if key <= index), default=0)
        if key > self.at or index < self.at:
            self._jump(key)
        for frame in self.frames:
            self.decoded += 1
            if frame.pts is not None and frame.pts < self.landing:
                continue  # shown before the key frame: decoded, but not wanted
            self.at += 1
            if self.at > index:
                picture = cast("npt.NDArray[np.uint8]", frame.to_ndarray(format="rgb24"))
                self._last = index, picture
                return picture
        return None
