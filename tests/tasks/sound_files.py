"""Make sound files for tests."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
from datasets import Audio, Features, Value

RATE = 8000


def wav(samples, rate=RATE):
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", subtype="FLOAT")
    return {"bytes": file.getvalue(), "path": None}


def tone(frequency, seconds=0.1, rate=RATE):
    return np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate).astype(np.float32)


def as_parquet(columns, path):
    """Write a parquet file with the features of sounds; datasets itself would need torchcodec for this."""
    kinds = {"audio": Audio(sampling_rate=RATE), "label": Value("int64"), "speaker": Value("string")}
    features = Features({name: kinds[name] for name in columns})
    pq.write_table(pa.table(columns, schema=features.arrow_schema), path)
