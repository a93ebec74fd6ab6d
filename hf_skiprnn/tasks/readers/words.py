"""Read texts word by word: make a word-level tokenizer, and load pretrained word vectors."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

logger = logging.get_logger(__name__)

PAD, UNKNOWN = "[PAD]", "[UNK]"
PAD_ID = 0


def train_tokenizer(texts: Iterable[str], vocabulary: int, max_length: int) -> PreTrainedTokenizerFast:
    """Make a tokenizer that knows the `vocabulary` most frequent lower-case words and punctuation marks in `texts`.

    It crops texts to their first `max_length` words. Line breaks written as HTML (<br />) count as spaces. Ids 0 and 1
    are padding and unknown words.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    words = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
    words.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"<br\s*/?>"), " "), normalizers.Lowercase()]
    )
    apart = Regex(r"\w+(?:'\w+)*|[^\w\s]")  # "don't" and "o'clock" are one word each
    words.pre_tokenizer = pre_tokenizers.Split(apart, behavior="removed", invert=True)
    words.train_from_iterator(
        texts, trainers.WordLevelTrainer(vocab_size=vocabulary, special_tokens=[PAD, UNKNOWN], show_progress=False)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=PAD,
        unk_token=UNKNOWN,
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],  # what the model takes
    )


def tokenize(tokenizer: Any, texts: list[str]) -> list[np.ndarray]:
    """Return the token ids of each text, [T] int32; a text without words becomes one unknown word."""
    rows = tokenizer(texts, truncation=True)["input_ids"]
    return [np.array(ids or tokenizer([UNKNOWN])["input_ids"][0], np.int32) for ids in rows]


def pad_tokens(rows: Sequence[np.ndarray], pad_id: int) -> dict[str, Tensor]:
    """Return input_ids [B, T] and attention_mask [B, T], both int64, of token ids [T] padded on the right."""
    ids = pad_sequence([torch.from_numpy(row).long() for row in rows], batch_first=True, padding_value=pad_id)
    lengths = torch.tensor([len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}


def words_of(tokenizer: Any, batch: dict[str, Tensor]) -> list[list[str]]:
    """Return the words of each row, without padding."""
    rows = zip(batch["input_ids"], batch["attention_mask"], strict=True)
    return [tokenizer.convert_ids_to_tokens(ids[mask != 0].tolist()) for ids, mask in rows]


def real_gates(gates: np.ndarray, mask: Tensor) -> list[np.ndarray]:
    """Return the gates of the real steps of each row, from gates [B, T] and mask [B, T]."""
    return [g[m] for g, m in zip(gates, mask.numpy() != 0, strict=True)]


def start_from_vectors(model: PreTrainedModel, tokenizer: Any, path: str) -> None:
    """Copy word vectors into a new model's embeddings, and log how many; errors as set_vectors'."""
    weight: Any = model.get_input_embeddings().weight
    found = set_vectors(weight, tokenizer.get_vocab(), path)
    logger.warning("%d of %d words have a vector in %s.", found, len(tokenizer), path)


@torch.no_grad()
def set_vectors(embedding: Tensor, vocabulary: dict[str, int], path: str) -> int:
    """Replace the embeddings of the words that a word2vec file holds; return the number of these words.

    A word is looked up as it is, then with a capital first letter.

    Args:
        embedding: [V, D].
        vocabulary: word -> row of the embedding.
        path: file in word2vec's binary format (.bin, .bin.gz) or text format (any other name).

    Raises:
        ValueError: the file is absent or damaged, or the width of its vectors is not D.
        ImportError: gensim is not installed.
    """
    try:
        from gensim.models import KeyedVectors
    except ImportError as error:
        raise ImportError(
            f'Word vectors are read with gensim. Run: pip install "hf_skiprnn[vectors]" ({error})'
        ) from error

    if not Path(path).is_file():
        raise ValueError(f"There is no vectors file {path!r}.")
    binary = path.removesuffix(".gz").endswith(".bin")
    try:
        vectors = KeyedVectors.load_word2vec_format(path, binary=binary)
    except (ValueError, EOFError, IndexError, UnicodeDecodeError) as error:
        kind = "binary (.bin)" if binary else "text"
        raise ValueError(f"{path} could not be read as a word2vec {kind} file: {error}") from error
    if vectors.vector_size != embedding.shape[1]:
        raise ValueError(
            f"{path} holds vectors of {vectors.vector_size} numbers; the model's have {embedding.shape[1]}. "
            f"Set input_size={vectors.vector_size}."
        )
    found = 0
    for word, index in vocabulary.items():
        name = next((form for form in (word, word.capitalize()) if form in vectors), None)
        if name is not None:
            embedding[index] = torch.from_numpy(np.array(vectors[name])).to(embedding)
            found += 1
    return found
