"""Sounds and series of numbers as sequences: samples, log-mel frames or channels, standardised as in training.

Travels with a checkpoint: imports nothing of this package, and needs no sound library; it takes arrays, not files.
"""

from collections.abc import Iterable
from typing import Any, Self

import numpy as np
import torch
from transformers import BatchFeature, SequenceFeatureExtractor
from transformers.audio_utils import mel_filter_bank, optimal_fft_length, spectrogram, window_function
from transformers.utils import logging

logger = logging.get_logger(__name__)

FEATURES = ("values", "log_mel")
MEL_FLOOR = 1e-6  # of a mel band's power, so that silence has a logarithm


class SkipRNNFeatureExtractor(SequenceFeatureExtractor):
    """Sequences to `input_values` [B, T, feature_size] float32 and `attention_mask` [B, T] int32.

    feature_size: numbers per step: channels of a series (1 for the samples of a sound), or mel bands.
    sampling_rate: samples per second; None for a series that is no sound.
    features: "values" (what came is what the model reads) or "log_mel" (logarithm of the power in mel bands, in frames
    of `frame_length` samples every `hop_length` samples, the first at sample 0; a shorter sound is filled up with zeros
    to one frame).
    mean, std: [feature_size] each; set, every step becomes (x - mean) / std. `fit` measures them.

    Raises:
        ValueError: an option out of its range.
    """

    model_input_names = ["input_values", "attention_mask"]  # noqa: RUF012 - transformers' own form

    def __init__(
        self,
        feature_size: int = 1,
        sampling_rate: int | None = None,
        features: str = "values",
        frame_length: int = 200,
        hop_length: int = 80,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        padding_value: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(feature_size, sampling_rate, padding_value, **kwargs)  # type: ignore[arg-type]
        self.features, self.frame_length, self.hop_length = features, frame_length, hop_length
        self.mean, self.std = mean, std
        if features not in FEATURES:
            raise ValueError(f"features must be one of {', '.join(FEATURES)}; got {features!r}.")
        if feature_size < 1 or frame_length < 2 or hop_length < 1:
            raise ValueError(
                "feature_size and hop_length must be at least 1 and frame_length at least 2; got "
                f"{feature_size}, {hop_length} and {frame_length}."
            )
        if (mean is None) != (std is None) or (mean is not None and {len(mean), len(std or ())} != {feature_size}):
            raise ValueError(
                f"mean and std go together and hold feature_size = {feature_size} numbers; got {mean}, {std}."
            )
        if std is not None and not min(std) > 0:
            raise ValueError(f"std must be above 0; got {std}.")
        if features == "log_mel":
            if sampling_rate is None:
                raise ValueError('features="log_mel" needs sampling_rate, in samples per second.')
            # transformers leaves attributes of these two names out of the saved file.
            self.window = window_function(frame_length, "hann")
            self.mel_filters = mel_filter_bank(
                1 + optimal_fft_length(frame_length) // 2,
                feature_size,
                min_frequency=0.0,
                max_frequency=sampling_rate / 2,
                sampling_rate=sampling_rate,
                mel_scale="htk",
            )

    def __call__(
        self,
        raw: Any,
        sampling_rate: int | None = None,
        padding: bool | str = True,
        max_length: int | None = None,
        truncation: bool = False,
        pad_to_multiple_of: int | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
    ) -> BatchFeature:
        """One sequence (an array or tensor, or a list of numbers) or a list of several.

        A sequence is [T] or, with features="values", [T, feature_size]. sampling_rate: of what is given; another one
        than the extractor's is refused. The other arguments are SequenceFeatureExtractor.pad's.

        Raises:
            ValueError: a sequence of another shape, empty, or with a value that is not finite; the message names it.
        """
        self._check_rate(sampling_rate)
        sequences = [self.extract(x, f"sequence {i}") for i, x in enumerate(_as_list(raw))]
        return self.pad(
            BatchFeature({"input_values": sequences}),
            padding=padding,
            max_length=max_length,
            truncation=truncation,
            pad_to_multiple_of=pad_to_multiple_of,
            return_attention_mask=return_attention_mask,
            return_tensors=return_tensors,
        )

    def extract(self, raw: Any, name: str = "the sequence") -> np.ndarray:
        """One sequence [T] or [T, feature_size] -> its steps [T', feature_size] float32; `name` is for errors."""
        steps = self._steps(raw, name)
        if self.mean is not None:
            steps = (steps - np.asarray(self.mean)) / np.asarray(self.std)
        return steps.astype(np.float32)

    def fit(self, sequences: Iterable[Any]) -> Self:
        """Measure `mean` and `std` per channel over all steps of these (training) sequences; returns self.

        A channel that never changes is only centred: its std is taken as 1.
        """
        count, mean, spread = 0, np.zeros(self.feature_size), np.zeros(self.feature_size)
        for index, sequence in enumerate(sequences):
            steps = self._steps(sequence, f"sequence {index}")
            # Merging (count, mean, sum of squared deviations) loses no digits, as sums of squares would.
            delta, total = steps.mean(axis=0) - mean, count + len(steps)
            spread += ((steps - steps.mean(axis=0)) ** 2).sum(axis=0) + delta**2 * (count * len(steps) / total)
            mean, count = mean + delta * (len(steps) / total), total
        if not count:
            raise ValueError("fit needs at least one sequence; got none.")
        std = np.sqrt(spread / count)
        tiny = std <= 1e-9 * np.maximum(np.abs(mean), 1e-30)  # rounding of a constant channel
        self.mean, self.std = mean.tolist(), np.where(tiny, 1.0, std).tolist()
        return self

    def _steps(self, raw: Any, name: str) -> np.ndarray:
        """[T, feature_size] float64, checked, not standardised."""
        values = _as_array(raw, name)
        shape = values.shape
        wanted = "[T]" if self.features == "log_mel" else f"[T, {self.feature_size}]"
        if values.ndim == 1 and (self.features == "log_mel" or self.feature_size == 1):
            values = values[:, None]
        channels = 1 if self.features == "log_mel" else self.feature_size
        if values.ndim != 2 or values.shape[1] != channels or (self.features == "log_mel" and len(shape) != 1):
            raise ValueError(f"{name} must be {wanted}; got {shape}.")
        if not len(values):
            raise ValueError(f"{name} is empty; it needs at least one step. Leave such rows out.")
        if not np.isfinite(values).all():
            step, channel = np.argwhere(~np.isfinite(values))[0]
            raise ValueError(
                f"{name} holds {values[step, channel]} at step {step}, channel {channel}. "
                "Fill the gap or leave the row out."
            )
        return values if self.features == "values" else self._log_mel(values[:, 0])

    def _log_mel(self, samples: np.ndarray) -> np.ndarray:
        """[samples] -> [frames, mel bands]."""
        short = max(self.frame_length - len(samples), 0)
        return spectrogram(
            np.pad(samples, (0, short)),
            self.window,
            frame_length=self.frame_length,
            hop_length=self.hop_length,
            fft_length=optimal_fft_length(self.frame_length),
            power=2.0,
            center=False,  # a frame needs no sample before the sound, so that a stream gives the same frames
            mel_filters=self.mel_filters,
            mel_floor=MEL_FLOOR,
            log_mel="log",
            dtype=np.dtype(np.float64),
        ).T

    def _check_rate(self, sampling_rate: int | None) -> None:
        if self.sampling_rate is None:
            return
        if sampling_rate is None:
            logger.warning_once(
                f"Pass sampling_rate: this extractor reads {self.sampling_rate} samples per second, and a sound of "
                "another rate is misread silently."
            )
        elif sampling_rate != self.sampling_rate:
            raise ValueError(
                f"This extractor reads {self.sampling_rate} samples per second; got {sampling_rate}. "
                "Resample the sound first."
            )

    def _pad(self, processed_features: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """SequenceFeatureExtractor's takes [T] where feature_size is 1; here a sequence is always [T, feature_size]."""
        if self.feature_size == 1:
            processed_features["input_values"] = processed_features["input_values"].reshape(-1)
        padded = super()._pad(processed_features, *args, **kwargs)
        padded["input_values"] = padded["input_values"].reshape(-1, self.feature_size)
        return padded


def _as_list(raw: Any) -> list[Any]:
    """One sequence or several -> several."""
    if isinstance(raw, (np.ndarray, torch.Tensor)):
        return list(raw) if raw.ndim == 3 else [raw]
    raw = list(raw)
    is_one = bool(raw) and all(isinstance(x, (int, float, np.number)) for x in raw)
    return [raw] if is_one else raw


def _as_array(raw: Any, name: str) -> np.ndarray:
    """float64 of a sequence."""
    if isinstance(raw, torch.Tensor):
        raw = raw.detach().cpu().numpy()
    try:
        return np.asarray(raw, np.float64)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name} must hold numbers, as many at every step: {error}") from error
