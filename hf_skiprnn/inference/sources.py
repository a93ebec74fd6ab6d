"""Where pulled steps stand: arrays and memmaps, iterators, Arrow columns, rows of `datasets`, video files.

Each is a fetch for `model.pull`: called with [(row, position), ...] it touches those steps and no others. An encoder
joins by composition, and then runs on the steps that are read:

    videos = VideoSource(paths)
    out = model.pull(lambda positions: encode(videos(positions)), videos.lengths)
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from hf_skiprnn.model.pull_skip_rnn import EndOfSequence, Position

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset


SLACK = 1e-3  # of a step: rates are rounded


class ArraySource:
    """Rows that can be indexed: arrays or np.memmap [T, I] (token ids [T]), in a list or as one array [B, T, I].

    Only the steps that are asked for are read from the disk.
    """

    def __init__(self, rows: Sequence[Any] | npt.NDArray[Any]) -> None:
        self.rows = rows

    @property
    def lengths(self) -> list[int]:
        """Steps of each row."""
        return [len(row) for row in self.rows]

    def __call__(self, positions: list[Position]) -> npt.NDArray[Any]:
        return np.stack([np.asarray(self.rows[row][step]) for row, step in positions])


class IteratorSource:
    """Rows that come one step after another, such as generators or sensors; their length is not known.

    Steps that are not read are taken from the iterator and dropped: it can cheaply yield None for those that
    `model.stream` would not take. A position can be asked for once.
    """

    def __init__(self, rows: Iterable[Iterable[Any]]) -> None:
        self.rows: list[Iterator[Any]] = [iter(row) for row in rows]
        self.taken = [0] * len(self.rows)  # steps taken from each
        self._waiting: dict[Position, Any] = {}  # taken, but not answered, because another row ended

    def __call__(self, positions: list[Position]) -> list[Any]:
        ended = {row: self.taken[row] for row, step in positions if not self._take(row, step)}
        if ended:
            raise EndOfSequence(ended)
        return [np.asarray(self._waiting.pop(position)) for position in positions]

    def _take(self, row: int, step: int) -> bool:
        """Whether the row has this step; it then waits to be answered."""
        if (row, step) in self._waiting:
            return True
        if step < self.taken[row]:
            raise ValueError(
                f"step {step} of row {row} has passed: an iterator goes forward; the next is {self.taken[row]}."
            )
        for x in self.rows[row]:
            self.taken[row] += 1
            if self.taken[row] > step:
                self._waiting[row, step] = x
                return True
        return False


class ArrowSource:
    """An Arrow column, a list a row: numbers or token ids (list<number>), or vectors (list<list<number>>).

    Nothing is converted but the steps that are asked for, so a memory-mapped file is read in those places alone.
    A plain number becomes a vector of one where `is_text` is not set.
    """

    def __init__(self, column: "pa.ChunkedArray | pa.Array", is_text: bool = False) -> None:
        self.column, self.is_text = column, is_text

    @property
    def lengths(self) -> list[int]:
        """Steps of each row."""
        import pyarrow.compute as pc

        return [int(steps) for steps in pc.list_value_length(self.column).to_pylist()]

    def __call__(self, positions: list[Position]) -> npt.NDArray[Any]:
        steps = np.array([self.column[row].values[step].as_py() for row, step in positions])
        return steps if self.is_text else steps.astype(np.float32).reshape(len(positions), -1)


class DatasetSource:
    """Column `column` of a `datasets.Dataset`, as ArrowSource: also after select, filter or shuffle, and on disk."""

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
    """Frames of video files, uint8 [height, width, 3] RGB. Needs the `video` extra: PyAV.

    A frame that is not asked for is never converted; it is decoded only where a later one is predicted from it: reading
    jumps to the last key frame before the wanted one.

    Args:
        paths: video files, a row each.
        max_frames: steps of a row at most.
        frame_rate: steps per second: a step is the frame shown at its time, in a file of constant rate. Default: every
            frame is a step.

    Attributes:
        read: frames that were asked for.
        decoded: frames that had to be decoded for them.
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
        """Frames that were decoded so far."""
        return sum(file.decoded for file in self.files.values())

    @property
    def lengths(self) -> list[int]:
        """Frames of each file, at most max_frames; the files' headers and packets tell, nothing is decoded."""
        files = map(self._file, range(len(self.paths)))
        counts = [math.ceil(len(file.order) / self._frames_a_step(file) - SLACK) for file in files]
        return counts if self.max_frames is None else [min(count, self.max_frames) for count in counts]

    def __call__(self, positions: list[Position]) -> list[npt.NDArray[np.uint8]]:
        frames = [self._frame(self._file(row), step) for row, step in positions]
        missing = [row for (row, _), frame in zip(positions, frames, strict=True) if frame is None]
        if missing:  # the file breaks off
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
    """One file and how far it is decoded."""

    def __init__(self, path: str | Path) -> None:
        import av

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
        # Frames come out of the decoder in the order of their times. Where some have none, there are no jumps.
        self.can_jump = len(set(times)) == len(packets)
        self.order = sorted(times) if self.can_jump else list(range(len(packets)))
        self.keys = [0]
        if self.can_jump:
            self.keys = sorted(self.order.index(time) for time, is_key in zip(times, keys, strict=True) if is_key)
        self.decoded = 0
        self._last: tuple[int, npt.NDArray[np.uint8]] | None = None
        self._jump(0)

    def _jump(self, index: int) -> None:
        """Go on decoding at a key frame, or at the start."""
        self.container.seek(self.order[index] if index else 0, stream=self.stream, backward=True)
        self.frames = self.container.decode(self.stream)
        self.at = index  # the next frame
        self.landing = self.order[index] if index else -math.inf  # time of the frame that was jumped to

    def frame(self, index: int) -> npt.NDArray[np.uint8] | None:
        """Frame `index`; None behind the end."""
        if self._last is not None and self._last[0] == index:
            return self._last[1]
        key = max((key for key in self.keys if key <= index), default=0)
        if key > self.at or index < self.at:
            self._jump(key)
        for frame in self.frames:
            self.decoded += 1
            if frame.pts is not None and frame.pts < self.landing:
                continue  # shown before the key frame, and left over from the jump
            self.at += 1
            if self.at > index:
                picture = cast("npt.NDArray[np.uint8]", frame.to_ndarray(format="rgb24"))
                self._last = index, picture
                return picture
        return None
