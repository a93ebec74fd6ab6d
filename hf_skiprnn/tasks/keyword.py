"""Keyword: is one of ten digits said in three seconds of room noise, and which? The case of an always-on microphone.

Source: the recordings of the task `fsdd` (Free Spoken Digit Dataset; Jackson et al.; licence CC BY-SA 4.0). Each is put
at a random place of 3 s of noise, 5 to 25 dB louder than the noise. One row in eleven is only noise, class "none". The
noise mixes pauses from the recordings (their quietest 40 ms, overlapped and added) with coloured noise (a spectrum of
1 / f^b with b from 0 to 2). A row's number is the seed of its random choices, so the rows are always the same. One
speaker is held out for the test split and one for validation; the others are for training.

Steps are log-mel frames (25 ms every 10 ms, 32 bands): 298 steps, about 40 of them speech.

    {"steps": [[-11.2, -10.8, ...], ...], "label": 7}
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from datasets import Array2D, Audio, ClassLabel, Dataset, Features, concatenate_datasets

from hf_skiprnn.tasks.readers.arrow_cache import cached_rows
from hf_skiprnn.tasks.readers.sounds import read_sound

from .base import TEST, TRAIN, VALIDATION, Splits
from .fsdd import SAMPLING_RATE, STEPS, VERSION, SpokenTask

SECONDS = 3.0
NONE = 10  # the class of rows without a digit
PAUSE = 320  # samples of a pause, 40 ms
LOUDNESS = 0.05  # root mean square of the speech before the random gain
GAIN = (-6.0, 6.0)  # dB, range of the random gain of the speech
SPEECH_TO_NOISE = (5.0, 25.0)  # dB, range of the signal-to-noise ratio
COLOUR = (0.0, 2.0)  # range of the exponent b in the noise spectrum 1 / f^b


@dataclass
class Keyword(SpokenTask):
    """The task to tell whether and which digit is said in three seconds of noise."""

    name = "keyword"
    labels = (*"0123456789", "none")
    test_speaker: str = field(default="theo", metadata={"help": "Speaker of all test rows."})
    validation_speaker: str = field(default="george", metadata={"help": "Speaker of all validation rows."})
    copies: int = field(
        default=2, metadata={"help": "Training rows made of each recording, each with its own place and noise."}
    )
    cache_folder: str | None = field(
        default=None, metadata={"help": "Folder of the cached steps; default: datasets' cache."}
    )

    def __post_init__(self) -> None:
        if self.copies < 1:
            raise ValueError(f"copies must be at least 1; got {self.copies}.")

    def splits(self) -> Splits:
        data = self.recordings()
        if "speaker" not in data["train"].column_names:
            raise ValueError(f"{self.dataset_name} must have a column speaker; got {data['train'].column_names}.")
        everything = concatenate_datasets([data["train"], data["test"]]).cast_column("audio", Audio(decode=False))
        speakers = np.array(everything["speaker"][:])
        known, held_out = set(speakers.tolist()), (self.validation_speaker, self.test_speaker)
        if not known.issuperset(held_out) or len(set(held_out)) < 2 or len(known) < 3:
            raise ValueError(
                f"validation_speaker and test_speaker must be two of {', '.join(sorted(known))}, and one must be left "
                f"for training; got {self.validation_speaker!r} and {self.test_speaker!r}."
            )
        train = everything.select(np.flatnonzero(~np.isin(speakers, held_out)))
        validation, test = (everything.select(np.flatnonzero(speakers == speaker)) for speaker in held_out)
        return Splits(
            partial(self._rows, train, TRAIN, self.copies),
            partial(self._rows, validation, VALIDATION, 1),
            partial(self._rows, test, TEST, 1),
        )

    def _rows(self, recordings: Dataset, split: int, copies: int) -> Dataset:
        """Put every recording into noise `copies` times, and add rows that are only noise."""
        sounds = [
            read_sound(audio, f"recording {i}, column 'audio'", SAMPLING_RATE)[0]
            for i, audio in enumerate(recordings["audio"][:])
        ]
        labels = [int(label) for label in recordings["label"][:]]
        bank = np.stack([quietest(sound) for sound in sounds])
        parts = [(i, copy) for copy in range(copies) for i in range(len(sounds))]
        parts += [(-1, number) for number in range(max(len(parts) // 10, 1))]

        def row(part: tuple[int, int]) -> dict[str, Any]:
            rng = np.random.default_rng([split, part[0] + 1, part[1]])
            sound = None if part[0] < 0 else sounds[part[0]]
            samples = in_noise(sound, bank, rng)
            label = NONE if sound is None else labels[part[0]]
            return {STEPS: self.extractor.extract(samples, f"row {part}"), "label": label}

        kind = Array2D((None, self.extractor.feature_size), "float32")
        features = Features({STEPS: kind, "label": ClassLabel(names=list(self.labels))})
        facts = {"recordings": recordings._fingerprint, "split": split, "copies": copies, "features": self.features}
        facts["version"] = VERSION
        return cached_rows(self.name, parts, row, features, facts, self.cache_folder).with_format("numpy")


def in_noise(sound: np.ndarray | None, bank: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return 3 s of noise with `sound` at a random place; with None, only the noise.

    Args:
        sound: [samples] of a recording; it is cropped to 3 s.
        bank: [recordings, 320], the pauses from which the noise is made.
        rng: generator of the random place, gains and noise.

    Returns:
        [24000] samples float32.
    """
    length = round(SECONDS * SAMPLING_RATE)
    loudness = LOUDNESS * 10 ** (rng.uniform(*GAIN) / 20)
    share = rng.uniform(0.2, 0.8)
    noise = share * pauses(bank, length, rng) + (1 - share) * coloured(length, rng)
    noise *= loudness / 10 ** (rng.uniform(*SPEECH_TO_NOISE) / 20) / np.sqrt(np.mean(noise**2))
    if sound is not None:
        sound = sound[:length]
        start = rng.integers(length - len(sound) + 1)
        noise[start : start + len(sound)] += loudness * sound / max(float(np.sqrt(np.mean(sound**2))), 1e-9)
    return noise.astype(np.float32)


def quietest(sound: np.ndarray) -> np.ndarray:
    """Return the quietest 40 ms of a recording, [320], scaled to mean square 1; digital silence does not count."""
    sound = np.pad(sound.astype(np.float64), (0, max(PAUSE - len(sound), 0)))
    windows = np.lib.stride_tricks.sliding_window_view(sound, PAUSE)[:: PAUSE // 2]
    energies = (windows**2).mean(axis=1)
    chosen = windows[np.argmin(np.where(energies > 0, energies, np.inf))]
    return chosen / max(float(np.sqrt(np.mean(chosen**2))), 1e-9)


def pauses(bank: np.ndarray, length: int, rng: np.random.Generator) -> np.ndarray:
    """Return noise [length] of mean square 1: randomly chosen pauses of the bank, each overlapping the next by half."""
    hop = PAUSE // 2
    chosen = bank[rng.integers(len(bank), size=length // hop + 1)] * np.hanning(PAUSE)
    noise = np.zeros((len(chosen) + 1, hop))
    noise[:-1] += chosen[:, :hop]
    noise[1:] += chosen[:, hop:]
    noise = noise.reshape(-1)[:length]
    return noise / np.sqrt(np.mean(noise**2))


def coloured(length: int, rng: np.random.Generator) -> np.ndarray:
    """Return noise [length] of mean square 1 with a power spectrum of 1 / f^b, b drawn from 0 (white) to 2 (brown)."""
    spectrum = np.fft.rfft(rng.standard_normal(length))
    frequencies = np.maximum(np.fft.rfftfreq(length), 20 / SAMPLING_RATE)  # flat below 20 Hz
    noise = np.fft.irfft(spectrum * frequencies ** (-rng.uniform(*COLOUR) / 2), length)
    return noise / np.sqrt(np.mean(noise**2))
