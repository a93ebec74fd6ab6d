"""Measure how many rows per second a model, `Trainer.predict` and a pipeline read, on texts and on images.

    python scripts/benchmark.py pipelines

The rows are random: reviews of 20 to 400 words, and images of 28 x 28 pixels; a quarter of the steps is read. "model"
calls the model on batches that are ready. "predict" is SkipRNNTrainer.predict with a SkipRNNDataCollator, on rows of
token ids or pixels. "pipeline" starts from texts and PIL images: it cannot be faster than the tokenizer or processor
and then the model. One thread. Only the time of this process counts, not that of other programs.
"""

import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import TrainingArguments, pipeline

from hf_skiprnn import SkipRNNConfig, SkipRNNDataCollator, SkipRNNForSequenceClassification, SkipRNNImageProcessor
from hf_skiprnn.tasks.readers.words import PAD_ID, train_tokenizer
from hf_skiprnn.training import SkipRNNTrainer

BATCH, ROWS, WORDS = 64, 1024, 2000
UPDATE_BIAS = -1.94  # an increment of 1/8: a quarter of the steps


def model_of(**fields: Any) -> SkipRNNForSequenceClassification:
    """Return a model that reads a quarter of the steps."""
    fields |= {"hidden_size": 110, "num_labels": 10}
    model = SkipRNNForSequenceClassification(SkipRNNConfig(**fields)).eval()
    gate: Any = model.base_model.update_gate
    torch.nn.init.zeros_(gate.weight)
    torch.nn.init.constant_(gate.bias, UPDATE_BIAS)
    return model


def seconds(run: Callable[[], Any]) -> float:
    """Return the processor's time for a run, the least of three."""
    times = []
    for _ in range(3):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return min(times)


def measure(
    name: str, model: Any, rows: list[dict[str, Any]], pipe: Any, raw: Any, prepare: Callable[..., Any]
) -> None:
    """Print the rows per second of the ways; `prepare` is the tokenizer or processor."""
    collate = SkipRNNDataCollator(model)
    batches = [dict(collate(rows[start : start + BATCH])) for start in range(0, len(rows), BATCH)]
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        arguments = TrainingArguments(folder, per_device_eval_batch_size=BATCH, report_to="none", disable_tqdm=True)
        trainer = SkipRNNTrainer(model, arguments, data_collator=collate)
        ways = {
            "model": lambda: [model(**batch) for batch in batches],
            "predict": lambda: trainer.predict(rows),  # type: ignore[arg-type]  # a list is a data set
            "tokenizer or processor": lambda: [prepare(raw[start : start + BATCH]) for start in range(0, ROWS, BATCH)],
            "pipeline": lambda: pipe(raw),
        }
        rates = {way: len(rows) / seconds(run) for way, run in ways.items()}
    print(name + ": " + ", ".join(f"{way} {rate:.0f} rows/s" for way, rate in rates.items()))


def main(arguments: Sequence[str]) -> None:
    """Measure and print."""
    if arguments:
        print(__doc__)
        return
    logging.disable(logging.WARNING)  # "using the pipelines sequentially"
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{i}" for i in rng.integers(WORDS, size=n)) for n in rng.integers(20, 401, size=ROWS)]
    tokenizer = train_tokenizer(texts, WORDS + 2, 400)
    rows = [{"input_ids": ids} for ids in tokenizer(texts)["input_ids"]]
    model = model_of(vocab_size=len(tokenizer), input_size=300, pad_token_id=PAD_ID)
    pipe: Any = pipeline("text-classification", model=model, tokenizer=tokenizer)
    measure("texts", model, rows, pipe, texts, tokenizer)
    images = [Image.fromarray(pixels) for pixels in rng.integers(0, 256, size=(ROWS, 28, 28), dtype=np.uint8)]
    processor, model = SkipRNNImageProcessor(size={"height": 28, "width": 28}), model_of()
    rows = [{"pixel_values": processor(image, return_tensors="pt")["pixel_values"][0]} for image in images]
    pipe = pipeline("image-classification", model=model, image_processor=processor)
    measure("images", model, rows, pipe, images, processor)


if __name__ == "__main__":
    main(sys.argv[1:])
