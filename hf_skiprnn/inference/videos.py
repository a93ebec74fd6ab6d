"""Classify video files, encoding only the frames that the model reads, and measure the saving."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from hf_skiprnn.model.pull_skip_rnn import EndOfSequence

from .sources import VideoSource

Encode = Callable[[list[np.ndarray]], Any]  # n frames uint8 [height, width, 3] -> [n, input_size]
FRAMES_AT_ONCE = 32  # frames per encoder call when every frame is encoded


class Saving(NamedTuple):
    """Sums over clips that were classified twice: by pulling, and from all frames."""

    clips: int
    frames: int
    frames_encoded: int  # by pulling
    frames_decoded: int  # by pulling
    seconds_pulled: float
    seconds_everything: float
    right_pulled: int  # correctly classified clips
    right_everything: int
    clips_with_other_gates: int  # not always 0: an encoder rounds differently in batches of another size


def classify_pulled(
    model: Any,
    paths: Sequence[Path],
    labels: Sequence[int],
    encode: Encode,
    frames: int,
    frame_rate: float | None = None,
    batch_size: int = 8,
) -> Saving:
    """Classify every clip twice: by `model.pull` on its file, and from all its frames. Return the sums.

    Args:
        model: SkipRNNForSequenceClassification.
        paths: video files.
        labels: class of each clip.
        encode: the image model; called once in each round of pulling.
        frames: largest number of frames of a clip, from its start.
        frame_rate: steps per second; default: each file's own frames.
        batch_size: number of clips at a time.
    """
    parts = [
        _classify_batch(
            model, VideoSource(paths[i : i + batch_size], frames, frame_rate), labels[i : i + batch_size], encode
        )
        for i in range(0, len(paths), batch_size)
    ]
    return Saving(*map(sum, zip(*parts, strict=True)))


def _classify_batch(model: Any, videos: VideoSource, labels: Sequence[int], encode: Encode) -> Saving:
    start = time.perf_counter()
    lengths = videos.lengths
    pulled = model.pull(lambda positions: encode(videos(positions)), lengths)
    between = time.perf_counter()
    encoded, decoded = videos.read, videos.decoded
    videos.close()
    whole = _classify_everything(model, videos, lengths, encode)
    end = time.perf_counter()
    videos.close()
    wanted = torch.tensor(labels)
    found, found_everything = (int((out.logits.argmax(1).cpu() == wanted).sum()) for out in (pulled, whole))
    steps = whole.update_gates.shape[1]  # fewer than those of `pulled` if the longest file is damaged
    other = int((pulled.update_gates[:, :steps] != whole.update_gates).any(1).sum())
    frames, times = sum(lengths), (between - start, end - between)
    return Saving(len(labels), frames, encoded, decoded, *times, found, found_everything, other)


def _classify_everything(model: Any, videos: VideoSource, lengths: list[int], encode: Encode) -> Any:
    """Return the model's output for the features of all frames, as a padded batch.

    A file can hold fewer frames than packets: then its length in `lengths` is corrected.
    """
    rows = []
    for row in range(len(lengths)):
        pieces: list[Any] = []
        while (start := len(pieces) * FRAMES_AT_ONCE) < lengths[row]:
            try:
                pieces.append(videos([(row, t) for t in range(start, min(start + FRAMES_AT_ONCE, lengths[row]))]))
            except EndOfSequence as end:  # read the last piece again, as far as there are frames
                lengths[row] = end.lengths[row]
        rows.append(torch.cat([torch.as_tensor(encode(piece)) for piece in pieces]))
    x = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)
    mask = torch.arange(x.shape[1], device=x.device) < torch.tensor(lengths, device=x.device).unsqueeze(1)
    with torch.no_grad():
        return model.eval()(input_values=x, attention_mask=mask, output_update_gates=True)
