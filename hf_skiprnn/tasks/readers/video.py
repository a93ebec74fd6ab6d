"""Turn videos into feature vectors: decode frames at a fixed rate with PyAV, and encode each with an image model."""

import hashlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, ResNetConfig, ResNetModel
from transformers.utils import logging

logger = logging.get_logger(__name__)

RANDOM = "random"  # name that stands for an image model with random weights
RANDOM_SIZE = 112  # pixels, height and width of its input
FRAMES_AT_ONCE = 32


def decode_frames(path: Path, frame_rate: float, limit: int) -> Iterator[np.ndarray]:
    """Yield the pictures shown at 0, 1 / frame_rate, 2 / frame_rate ... seconds, uint8 [H, W, 3], at most `limit`.

    Raises:
        ValueError: the file is not a video, or ends before its first frame.
    """
    import av

    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError(f"{path} holds no video.")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            duration = float(1 / (stream.average_rate or frame_rate))
            frames = container.decode(stream)
            if (
                "avi" in container.format.name
            ):  # at a constant rate, count frames: the time stamps of packed B-frames are out of order
                timed = ((i * duration, frame) for i, frame in enumerate(frames))
            else:
                timed = ((frame.time, frame) for frame in frames)
            shown = _at_rate(timed, frame_rate, duration)
            found = 0
            for frame in islice(shown, limit):
                found += 1
                yield frame.to_ndarray(format="rgb24")
    except av.FFmpegError as error:
        raise ValueError(f"{path} could not be decoded: {error}") from error
    if not found:
        raise ValueError(f"{path} holds no frame.")


def _at_rate(frames: Iterable[tuple[float, Any]], frame_rate: float, duration: float) -> Iterator[Any]:
    """Yield the frame shown at each multiple of 1 / frame_rate; the last frame is shown for `duration` seconds."""
    tick, last, start, now = 0, None, 0.0, 0.0
    slack = 1e-3 / frame_rate  # time stamps are rounded
    for now, frame in frames:
        start = now if last is None else start
        while last is not None and tick / frame_rate < now - start - slack:
            yield last
            tick += 1
        last = frame
    while last is not None and tick / frame_rate < now - start + duration - slack:
        yield last
        tick += 1


class FrameFeatures:
    """An image model that turns frames into feature vectors.

    Args:
        name: Hub id or folder of a model with a pooled output that AutoModel and AutoImageProcessor can load; or
            "random", a small ResNet with fixed random weights, for a dry run.

    Raises:
        OSError: the model cannot be loaded; the message says what to do.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        if name == RANDOM:
            logger.warning(
                "RANDOM FEATURES: frames go through a CNN with random weights. Everything runs, but its accuracy "
                "says nothing about the method. Choose an image model with --feature_model."
            )
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                sizes = ResNetConfig(
                    embedding_size=32, hidden_sizes=[32, 64, 128, 256], depths=[1, 1, 1, 1], layer_type="basic"
                )
                self.model = ResNetModel(sizes).eval()
            self.processor = None
            return
        try:
            self.processor = AutoImageProcessor.from_pretrained(name)
            self.model = AutoModel.from_pretrained(name).eval()
        except OSError as error:
            raise OSError(
                f"The image model {name!r} cannot be loaded ({str(error).splitlines()[0]}). Choose another Hub id or a "
                'local folder with --feature_model, or "random" for random features, to see that everything runs.'
            ) from error

    def fingerprint(self) -> str:
        """Return a hash of the weights."""
        digest = hashlib.sha256()
        for key, value in self.model.state_dict().items():
            digest.update(key.encode() + value.contiguous().numpy().tobytes())
        return digest.hexdigest()

    @torch.no_grad()
    def __call__(self, frames: Iterable[np.ndarray]) -> np.ndarray:
        """Encode T frames uint8 [H, W, 3] into [T, features] float32."""
        parts = []
        frames = iter(frames)
        while several := list(islice(frames, FRAMES_AT_ONCE)):
            out = self.model(pixel_values=self._pixels(several))
            pooled = out.pooler_output if getattr(out, "pooler_output", None) is not None else out[0]
            if pooled.ndim == 4:  # [N, features, 1, 1], or a map to be averaged
                pooled = pooled.mean(dim=(2, 3))
            if pooled.ndim != 2:
                raise ValueError(f"{self.name} must give one vector per picture; got {tuple(pooled.shape)}.")
            parts.append(pooled.float().numpy())
        return np.concatenate(parts)

    def _pixels(self, frames: list[np.ndarray]) -> torch.Tensor:
        if self.processor is not None:
            return self.processor(images=[Image.fromarray(frame) for frame in frames], return_tensors="pt")[
                "pixel_values"
            ]
        size = (RANDOM_SIZE, RANDOM_SIZE)
        small = np.stack([np.asarray(Image.fromarray(frame).resize(size)) for frame in frames])
        return torch.from_numpy(small).permute(0, 3, 1, 2).float() / 127.5 - 1
