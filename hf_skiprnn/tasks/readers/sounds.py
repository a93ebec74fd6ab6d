"""Read sound files with soundfile, which needs no system package (datasets itself would need torchcodec)."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Audio, load_dataset_builder
from datasets.packaged_modules.audiofolder.audiofolder import AudioFolder


class SoundFile(Audio):  # type: ignore[misc]  # datasets ships no types
    """`datasets.Audio` whose rows are made without torchcodec, from the path of a sound file or its content."""

    def encode_example(self, value: Any) -> dict[str, Any]:
        """Return {"bytes": content or None, "path": path or None} of a path, or of such a dictionary."""
        return value if isinstance(value, dict) else {"bytes": None, "path": str(value)}


def load_undecoded(name: str, config: str | None = None, streaming: bool = False) -> Any:
    """Load a data set as `datasets.load_dataset` does, but make the rows of a folder of sound files without torchcodec.

    Args:
        name: Hub id, or local folder.
        config: configuration of the data set, if it has several.
        streaming: stream the data instead of storing it.
    """
    builder = load_dataset_builder(name, config)
    if isinstance(builder, AudioFolder):
        builder.BASE_FEATURE = SoundFile
    if streaming:
        return builder.as_streaming_dataset()
    builder.download_and_prepare()
    return builder.as_dataset()


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
        ImportError: soundfile is not installed.
    """
    try:
        import soundfile
    except ImportError as error:
        raise ImportError(
            f'Sound files are read with soundfile. Run: pip install "hf_skiprnn[audio]" ({error})'
        ) from error

    source = (audio or {}).get("bytes")
    path = (audio or {}).get("path")
    if source is None and (path is None or not Path(path).is_file()):
        raise ValueError(f"{name} holds no sound: neither bytes nor a file at {path!r}. Leave such rows out.")
    try:
        samples, rate = soundfile.read(path if source is None else io.BytesIO(source), dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{name}{_from(path)} is no sound file that soundfile can read: {error}") from error
    if not len(samples):
        raise ValueError(f"{name}{_from(path)} is an empty sound. Leave such rows out.")
    mono = samples.mean(axis=1)
    if sampling_rate is None or rate == sampling_rate:
        return mono, rate
    from scipy.signal import resample_poly

    divisor = int(np.gcd(rate, sampling_rate))
    return resample_poly(mono, sampling_rate // divisor, rate // divisor).astype(np.float32), sampling_rate


def _from(path: str | None) -> str:
    """Return " (path)", by which a user finds the row of a folder of files; "" without a path."""
    return f" ({path})" if path else ""
