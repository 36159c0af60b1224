"""Turn a folder of plain-text books into a tokenizer and the token files that train.py reads.

BOOKS holds one `.txt` or `.md` file per book, in one folder per author. Only English books are
taken, judged by the share of the word "the". WORK receives `tokenizer/`, `train.bin` and `val.bin`
(uint16 token ids) and `train_books.txt` (the books behind `train.bin`, in its order).

    python eval/demo_model/prepare.py BOOKS WORK --held-out "Jane Austen" "H. G. Wells"
"""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 4096
BOS, EOS = "<|bos|>", "<|eos|>"
BOS_ID, EOS_ID = 0, 1  # the trainer numbers the special tokens first, in this order
CONTEXT = 512

MIN_WORDS, SAMPLED_WORDS, MIN_SHARE_OF_THE = 2_000, 20_000, 0.03
TOKENIZER_CHARS = 80_000  # of each book: enough for 4096 merges, and no author dominates them
NUM_HELD_OUT_BOOKS = 12
HELD_OUT_CHARS = slice(50_000, 250_000)  # past prefaces and tables of contents


class Book(NamedTuple):
    """One book: who wrote it, what it is called, and its cleaned text."""

    author: str
    title: str
    text: str


def clean(raw: str) -> str:
    """Drop the title block above a dashed rule and put each paragraph on one line.

    >>> clean("A Title\\n-------\\nOne line\\nand another.\\n\\n\\n\\nNext.")
    'One line and another.\\n\\nNext.'
    """
    text = raw.replace("\r", "")
    rule = re.search(r"^-------\s*$", text, re.MULTILINE)
    text = re.sub(r"\n{3,}", "\n\n", text[rule.end() :] if rule else text).strip()
    return re.sub(r"(?<!\n)\n(?!\n)", " ", text)


def is_english(text: str) -> bool:
    """Tell whether the beginning of a text is long enough and says "the" as often as English does.

    >>> is_english("the cat and a dog " * 500), is_english("der Hund und die Katze " * 500)
    (True, False)
    """
    words = text.split()[:SAMPLED_WORDS]
    num_the = sum(word.lower() == "the" for word in words)
    return len(words) >= MIN_WORDS and num_the > MIN_SHARE_OF_THE * len(words)


def read_books(folder: Path) -> list[Book]:
    """Read every English book under a folder, shuffled with a fixed seed."""
    books = []
    for path in sorted(p for p in folder.rglob("*") if p.suffix in {".txt", ".md"}):
        text = clean(path.read_text(encoding="utf-8", errors="ignore"))
        if is_english(text):
            books.append(Book(path.parent.name, path.stem, text))
    random.Random(0).shuffle(books)
    return books


def pieces(text: str, size: int) -> Iterator[str]:
    """Cut a text into consecutive pieces of `size` characters.

    >>> list(pieces("abcde", 2))
    ['ab', 'cd', 'e']
    """
    return (text[start : start + size] for start in range(0, len(text), size))


def train_tokenizer(books: list[Book]) -> Tokenizer:
    """Train a byte-level BPE tokenizer of 4096 tokens that puts BOS before a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    sample = (piece for book in books for piece in pieces(book.text[:TOKENIZER_CHARS], 20_000))
    tokenizer.train_from_iterator(sample, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, BOS_ID)]
    )
    return tokenizer


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Encode a text without special tokens, in pieces of 50,000 characters."""
    batch = tokenizer.encode_batch(list(pieces(text, 50_000)), add_special_tokens=False)
    return [token for encoding in batch for token in encoding.ids]


def tokenize_training(
    tokenizer: Tokenizer, books: list[Book], max_tokens: int
) -> tuple[list[int], list[Book]]:
    """Encode books as `BOS text EOS` until `max_tokens` is passed; return the books used too."""
    tokens: list[int] = []
    for count, book in enumerate(books, start=1):
        tokens += [BOS_ID, *encode(tokenizer, book.text), EOS_ID]
        if len(tokens) > max_tokens:
            return tokens, books[:count]
    return tokens, books


def write_tokens(path: Path, tokens: list[int]) -> None:
    """Write token ids as a flat uint16 file."""
    np.array(tokens, dtype=np.uint16).tofile(path)


def prepare(folder: Path, work: Path, held_out: list[str], max_tokens: int) -> str:
    """Write the tokenizer and the token files of a folder of books; return a line that sums it up.

    Raises ValueError where the folder leaves nothing to train on or nothing to validate with.
    """
    books = read_books(folder)
    training = [book for book in books if book.author not in held_out]
    validation = [book for book in books if book.author in held_out]
    if not training or not validation:
        raise ValueError(
            f"{folder} has {len(training)} English books to train on and {len(validation)} held "
            f"out; both must be at least 1. Name folders of {folder} with --held-out AUTHOR."
        )
    tokenizer = train_tokenizer(training)
    tokens, used = tokenize_training(tokenizer, training, max_tokens)
    held = [
        token
        for book in validation[:NUM_HELD_OUT_BOOKS]
        for token in encode(tokenizer, book.text[HELD_OUT_CHARS])
    ]
    work.mkdir(parents=True, exist_ok=True)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, model_max_length=CONTEXT
    ).save_pretrained(work / "tokenizer")
    write_tokens(work / "train.bin", tokens)
    write_tokens(work / "val.bin", held)
    listing = "\n".join(f"{book.author} - {book.title}" for book in used)
    (work / "train_books.txt").write_text(listing + "\n", encoding="utf-8")
    return (
        f"{len(training)} books, {len(tokens) / 1e6:.1f} M tokens from {len(used)} of them, "
        f"{len(validation)} held out"
    )


def main() -> None:
    """Read the command line and prepare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("books", type=Path, help="folder of books, one folder per author")
    parser.add_argument("work", type=Path, help="folder to write")
    parser.add_argument("--held-out", nargs="+", required=True, metavar="AUTHOR")
    parser.add_argument("--max-tokens", type=int, default=60_000_000)
    args = parser.parse_args()
    try:
        print(prepare(args.books, args.work, args.held_out, args.max_tokens))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
