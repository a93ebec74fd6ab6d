"""Make batches of the rows of a data set: text, images, sounds or series, with names or numbers as labels.

collator = SkipRNNDataCollator(model, tokenizer, label_column="mood")
args = TrainingArguments(..., remove_unused_columns=False)
trainer = SkipRNNTrainer(model, args, data_collator=collator, train_dataset=rows)
"""

from .collator import SkipRNNDataCollator

__all__ = ["SkipRNNDataCollator"]
