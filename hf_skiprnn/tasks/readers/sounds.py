"""Read sound files with soundfile, which needs no system package (datasets itself would need torchcodec)."""

import io
from pathlib import Path
from typing import Any

import numpy as np


def read_sound(audio: Any, name: str, sampling_rate: int | None = None) -> tuple[np.ndarray, int]:
    """Read a cell of an undecoded `datasets.Audio` column; channels are averaged.

    Args:
        audio: {"bytes": content of a sound file or None, "path": its path}.
        name: row and column of the sound, for errors.
        sampling_rate: samples per second to resample to; None: keep the file's rate.

    Returns:
        Samples [T] float32, and their rate.

    Raises:
        ValueError: the cell holds no sound, an unknown kind of file, or an empty sound.
    """
    import soundfile

    source = (audio or {}).get("bytes")
    path = (audio or {}).get("path")
    if source is None and (path is None or not Path(path).is_file()):
        raise ValueError(f"{name} holds no sound: neither bytes nor a file at {path!r}. Leave such rows out.")
    try:
        samples, rate = soundfile.read(path if source is None else io.BytesIO(source), dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{name} is no sound file that soundfile can read: {error}") from error
    if not len(samples):
        raise ValueError(f"{name} is an empty sound. Leave such rows out.")
    mono = samples.mean(axis=1)
    if sampling_rate is None or rate == sampling_rate:
        return mono, rate
    from scipy.signal import resample_poly

    divisor = int(np.gcd(rate, sampling_rate))
    return resample_poly(mono, sampling_rate // divisor, rate // divisor).astype(np.float32), sampling_rate
