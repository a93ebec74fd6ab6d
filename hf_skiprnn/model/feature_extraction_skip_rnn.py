"""The feature extractor: turns sounds and series of numbers into standardised samples, log-mel frames or channels.

This file is saved with a checkpoint, so it imports nothing from this package. It takes arrays, not sound files.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Self

import numpy as np
import torch
from transformers import BatchFeature, SequenceFeatureExtractor
from transformers.audio_utils import mel_filter_bank, optimal_fft_length, spectrogram, window_function
from transformers.utils import logging

logger = logging.get_logger(__name__)

FEATURES = ("values", "log_mel")
NUMBERS = (int, float, np.number)
# dtype of PCM samples -> (value of silence, largest magnitude). 8-bit PCM is unsigned.
PCM = {
    np.dtype(np.uint8): (128, 128),
    np.dtype(np.int16): (0, 2**15),
    np.dtype(np.int32): (0, 2**31),
}
MEL_FLOOR = 1e-6  # smallest power of a mel band, so that the logarithm of silence is finite
CONSTANT = 1e-9  # a channel is constant if its standard deviation is less than this share of its mean
ROUNDED = 1e-6  # likewise in one sequence, as a share of its largest value: what float32 numbers round is less
# `fit` normalises each sequence by itself if FADED of the sequences vary less than FADES times as much as all together.
# Series of walking and of sitting differ by a factor of 30 to 80, and there the amplitude tells one from the other.
FADES, FADED = 1e-3, 0.25


class SkipRNNFeatureExtractor(SequenceFeatureExtractor):
    """Turns sequences into `input_values` [B, T, feature_size] float32 and `attention_mask` [B, T] int32.

    Args:
        feature_size: numbers per step: channels of a series (1 for the samples of a sound), or mel bands.
        sampling_rate: samples per second of a sound; None for a series that is not a sound. If set, integer samples
            (PCM) are scaled to [-1, 1] by the range of their type; otherwise integers are not scaled.
        features: "values": the model reads the numbers themselves. "log_mel": it reads the logarithm of the power in
            mel bands, in frames of `frame_length` samples every `hop_length` samples. The first frame starts at sample
            0; a sound shorter than a frame is padded with zeros.
        mean, std: [feature_size] each. If set, every step becomes (x - mean) / std. `fit` measures them.
        normalize_sequences: subtract each sequence's own mean from its channels and divide them by its own standard
            deviation, before mean and std. The whole sequence must be known, so it is not for streams. None: no, but
            `fit` sets it to True, with a warning, if one mean and std would turn a quarter of the sequences into zeros;
            else to False.

    Raises:
        ValueError: an option is out of its range.
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
        normalize_sequences: bool | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(feature_size, sampling_rate, padding_value, **kwargs)  # type: ignore[arg-type]  # None is valid
        self.features, self.frame_length, self.hop_length = features, frame_length, hop_length
        self.mean, self.std, self.normalize_sequences = mean, std, normalize_sequences
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
        """Return the padded batch of one sequence or of a list of several.

        Args:
            raw: one sequence or a list of sequences. A sequence is an array, a tensor or nested lists: [T] for one
                channel or log_mel, else [T, feature_size]. A list of lists is one sequence if feature_size is above 1,
                and a batch if it is 1.
            sampling_rate: samples per second of `raw`; it must be the extractor's rate.
            padding: this and the next four arguments are those of SequenceFeatureExtractor.pad.
            max_length: in steps.
            truncation: cut longer sequences to max_length.
            pad_to_multiple_of: in steps.
            return_attention_mask: default: yes.
            return_tensors: "pt", "np", or None for a list with an array for each sequence, which `datasets.map` with
                batched=True can store, even with padding=False.

        Raises:
            ValueError: a sequence has another shape or type, is empty, or holds a value that is not finite; the
                message names it.
        """
        self._check_rate(sampling_rate)
        sequences = [self.extract(x, f"sequence {i}") for i, x in enumerate(self._as_list(raw))]
        is_masked = self.return_attention_mask if return_attention_mask is None else return_attention_mask
        is_usual = (padding, max_length, truncation, pad_to_multiple_of) == (True, None, False, None)
        if is_usual and is_masked and sequences and return_tensors == "pt" and self.padding_side == "right":
            return BatchFeature(self.join(sequences))
        batch = self.pad(
            BatchFeature({"input_values": sequences}),
            padding=padding,
            max_length=max_length,
            truncation=truncation,
            pad_to_multiple_of=pad_to_multiple_of,
            return_attention_mask=return_attention_mask,
            return_tensors=return_tensors,
        )
        if return_tensors is None:  # `pad` makes arrays of objects, which Arrow cannot store
            batch.update({name: list(rows) for name, rows in batch.items()})
        return batch

    def join(self, sequences: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
        """Return what `pad` does for extracted steps [T', feature_size] with return_tensors="pt", in less time.

        The padding is on the right.
        """
        shape = (len(sequences), max(map(len, sequences)))
        values = np.full((*shape, self.feature_size), self.padding_value, np.float32)
        mask = np.zeros(shape, np.int32)
        for row, steps in enumerate(sequences):
            values[row, : len(steps)], mask[row, : len(steps)] = steps, 1
        return {"input_values": torch.from_numpy(values), "attention_mask": torch.from_numpy(mask)}

    def extract(self, raw: Any, name: str = "the sequence") -> np.ndarray:
        """Return the steps [T', feature_size] float32 of one sequence [T] or [T, feature_size]. `name`: for errors."""
        steps = self._steps(raw, name)
        if self.normalize_sequences:
            steps = (steps - steps.mean(axis=0)) / _deviation(steps)
        if self.mean is not None:
            steps = (steps - np.asarray(self.mean)) / np.asarray(self.std)
        return steps.astype(np.float32)

    def fit(self, sequences: Iterable[Any]) -> Self:
        """Measure `mean` and `std` of each channel over all steps of the training sequences; return self.

        The std of a constant channel is set to 1. With `normalize_sequences`, mean and std are None. A second `fit`
        keeps the normalize_sequences of the first.

        Raises:
            ValueError: there is no sequence, or `__call__` would refuse one.
        """
        count, mean, spread = 0, np.zeros(self.feature_size), np.zeros(self.feature_size)
        deviations: list[np.ndarray] = []
        for index, sequence in enumerate(sequences):
            steps = self._steps(sequence, f"sequence {index}")
            if self.normalize_sequences is None:
                deviations.append(_deviation(steps))
            # Merging sums of squared deviations is exact enough; sums of squares would lose digits.
            delta, total = steps.mean(axis=0) - mean, count + len(steps)
            spread += ((steps - steps.mean(axis=0)) ** 2).sum(axis=0) + delta**2 * (count * len(steps) / total)
            mean, count = mean + delta * (len(steps) / total), total
        if not count:
            raise ValueError("fit needs at least one sequence; got none.")
        std = np.sqrt(spread / count)
        std[std <= CONSTANT * np.maximum(np.abs(mean), 1e-30)] = 1.0
        if self.normalize_sequences is None:
            faded = float((np.array(deviations) < FADES * std).mean(axis=0).max())
            self.normalize_sequences = faded >= FADED
            if self.normalize_sequences:
                logger.warning(
                    "%.0f %% of the sequences vary less than a thousandth as much as all sequences together: one scale "
                    "for all would turn them into zeros. So each sequence is normalised by itself. If it is the "
                    "amplitude that tells the classes apart, set normalize_sequences to False.",
                    100 * faded,
                )
        self.mean, self.std = (None, None) if self.normalize_sequences else (mean.tolist(), std.tolist())
        return self

    def _steps(self, raw: Any, name: str) -> np.ndarray:
        """Check a sequence and return [T, feature_size] float64, not standardised."""
        values = _as_array(raw, name, is_sound=self.sampling_rate is not None)
        shape = values.shape
        wanted = "[T]" if self.features == "log_mel" else f"[T, {self.feature_size}]"
        if values.ndim == 1 and (self.features == "log_mel" or self.feature_size == 1):
            values = values[:, None]
        channels = 1 if self.features == "log_mel" else self.feature_size
        if values.ndim != 2 or values.shape[1] != channels or (self.features == "log_mel" and len(shape) != 1):
            raise ValueError(f"{name} must be {wanted}; got {shape}.")
        if not len(values):
            raise ValueError(f"{name} is empty; it needs at least one step. Leave such rows out.")
        finite = np.abs(values) <= np.finfo(np.float32).max  # False for NaN
        if not finite.all():
            step, channel = np.argwhere(~finite)[0]
            raise ValueError(
                f"{name} holds {values[step, channel]} at step {step}, channel {channel}: no finite float32. "
                "Fill the gap or leave the row out."
            )
        return values if self.features == "values" else self._log_mel(values[:, 0])

    def _log_mel(self, samples: np.ndarray) -> np.ndarray:
        """Return log-mel frames [frames, mel bands] of samples [T]."""
        short = max(self.frame_length - len(samples), 0)
        return spectrogram(
            np.pad(samples, (0, short)),
            self.window,
            frame_length=self.frame_length,
            hop_length=self.hop_length,
            fft_length=optimal_fft_length(self.frame_length),
            power=2.0,
            center=False,  # frames use no samples before the sound, so that a stream gives the same frames
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

    def _as_list(self, raw: Any) -> list[Any]:
        """Return the sequences of a batch, or a list of the only one."""
        if isinstance(raw, (np.ndarray, torch.Tensor)):
            return list(raw) if raw.ndim == 3 else [raw]
        raw = list(raw)
        width = self.feature_size if self.features == "values" and self.feature_size > 1 else None
        return [raw] if is_one_sequence(raw, width) else raw

    def _pad(self, processed_features: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Pad one sequence [T, feature_size]; the base class expects [T] if feature_size is 1."""
        if self.feature_size == 1:
            processed_features["input_values"] = processed_features["input_values"].reshape(-1)
        padded = super()._pad(processed_features, *args, **kwargs)
        padded["input_values"] = padded["input_values"].reshape(-1, self.feature_size)
        return padded


def _deviation(steps: np.ndarray) -> np.ndarray:
    """Return the standard deviation of each channel of a sequence [T, I]; infinite for a constant channel."""
    std = steps.std(axis=0)
    return np.where(std <= ROUNDED * np.abs(steps).max(axis=0), np.inf, std)


def is_one_sequence(raw: Any, feature_size: int | None) -> bool:
    """Return whether nested lists are one sequence: numbers [T] or, if feature_size is given, [T][feature_size]."""
    if not isinstance(raw, (list, tuple)) or not raw:
        return False
    if all(isinstance(x, NUMBERS) for x in raw):
        return True
    return feature_size is not None and all(
        isinstance(x, (list, tuple)) and len(x) == feature_size and all(isinstance(y, NUMBERS) for y in x) for x in raw
    )


def _as_array(raw: Any, name: str, is_sound: bool) -> np.ndarray:
    """Return a sequence as float64, with the integer samples of a sound scaled to [-1, 1].

    Raises:
        ValueError: it does not hold numbers, steps have different lengths, or its integer type is not a PCM type.
    """
    if isinstance(raw, torch.Tensor):
        raw = raw.detach().cpu()
        raw = (raw.float() if raw.dtype == torch.bfloat16 else raw).numpy()  # NumPy has no bfloat16
    try:
        array = np.asarray(raw)
        if array.dtype.kind == "O":  # Python's numbers: the list tells their type, the array does not
            array = np.asarray(array.tolist())
        if array.dtype.kind == "c":
            raise TypeError(f"{array.dtype} is not a type of real numbers")
        values = array.astype(np.float64)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name} must hold numbers, as many at every step: {error}") from error
    kind = array.dtype.newbyteorder("=")  # files may have another order of bytes
    if not is_sound or kind.kind not in "iub":
        return values
    if kind not in PCM:
        raise ValueError(
            f"{name} holds {array.dtype}, whose range as sound is unknown. Pass PCM as {', '.join(map(str, PCM))}, or "
            "floats in [-1, 1]."
        )
    zero, largest = PCM[kind]
    return (values - zero) / largest
