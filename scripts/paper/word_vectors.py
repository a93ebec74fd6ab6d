"""Learn word vectors from the training reviews of IMDB with gensim's word2vec, and write them to a file for --vectors.

    python -m scripts.paper.word_vectors runs/imdb-100.bin       # about 5 minutes of one core
    hf-skiprnn train --config imdb-skip-lstm --vectors runs/imdb-100.bin

A skipped word's embedding gets no gradient, so a model that skips learns embeddings slowly. The paper's vectors were
learnt from news. Reviews for validation and test are not read here.
"""

import sys
from argparse import ArgumentParser
from pathlib import Path

from hf_skiprnn.tasks import IMDB
from hf_skiprnn.tasks.readers.words import tokenize

WHOLE_REVIEW = 10_000  # words: more than any review has


def learn(dataset_name: str, path: Path, size: int, epochs: int, seed: int) -> int:
    """Write the vectors, `size` numbers each, in word2vec's binary format; return their number.

    Args:
        dataset_name: Hub id, or local folder in the same layout.
        path: the file to write; its name must end in .bin, by which --vectors knows the format.
        size: numbers of a vector.
        epochs: number of times that every review is read.
        seed: see gensim.models.Word2Vec.
    """
    from gensim.models import Word2Vec

    task = IMDB(dataset_name=dataset_name, length=WHOLE_REVIEW)
    tokenizer = task.processor()
    reviews = tokenize(tokenizer, task.load(seed).train["text"][:])
    words = [tokenizer.convert_ids_to_tokens(ids.tolist()) for ids in reviews]
    model = Word2Vec(words, vector_size=size, sg=1, min_count=1, epochs=epochs, workers=1, seed=seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    model.wv.save_word2vec_format(str(path), binary=True)
    return len(model.wv)


def main(argv: list[str] | None = None) -> int:
    """Learn and write the vectors."""
    parser = ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("path", type=Path, help="the file to write; its name must end in .bin")
    parser.add_argument("--dataset_name", default=IMDB.dataset_name, help="Hub id, or folder in the same layout")
    parser.add_argument("--size", type=int, default=100, help="numbers of a vector, as the model's input_size")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args(argv)
    if chosen.path.suffix != ".bin":
        parser.error(f"the file's name must end in .bin; got {chosen.path}")
    count = learn(chosen.dataset_name, chosen.path, chosen.size, chosen.epochs, chosen.seed)
    print(f"{count} vectors of {chosen.size} numbers: {chosen.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
