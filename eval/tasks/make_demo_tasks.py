"""Write the items of the offline tasks, all of the bundled evaluation text, from it and SEED alone.

    demo_cloze      cut a sentence behind its fourth word: which of four goes on?
    demo_sentences  cut behind a sentence: which of four whole sentences follows?
    demo_last_word  cut before a sentence's last word, one that has been said before: what is it?

Wrong answers are the right ones of other items, each used three times, so that whoever looks at
the answers alone scores one in four.

    python eval/tasks/make_demo_tasks.py
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
TEXT = HERE.parents[1] / "llmprune" / "demo" / "evaluation.txt"

SEED = 0
NUM_ITEMS = 200
NUM_CHOICES = 4
CONTEXT = 40  # words before the cut, at most
LEAST = 15  # words before the cut, at least
HEAD = 4  # words of the sentence that a question of demo_cloze shows
ANSWER = 4  # words of an answer of demo_cloze
SENTENCE = range(6, 21)  # words of an answer of demo_sentences
PASSAGE = 120  # words before the last one, at most
LONG = 4  # letters of a last word, at least
END = re.compile(r"[.!?]['\"’”_]*$")  # of the last word of a sentence

Pair = tuple[str, str]  # what is shown, and what goes on


def spans(words: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Yield where each sentence of a paragraph begins and ends."""
    ends = [index + 1 for index, word in enumerate(words) if END.search(word)]
    yield from zip([0, *ends], [*ends, len(words)], strict=True)


def openings(paragraph: str) -> Iterator[Pair]:
    """Yield the text before and the four words behind the head of every sentence long enough."""
    words = paragraph.split()
    for start, end in spans(words):
        cut = start + HEAD
        if cut >= LEAST and end - cut >= ANSWER:
            yield " ".join(words[max(0, cut - CONTEXT) : cut]), " ".join(words[cut : cut + ANSWER])


def sentences(paragraph: str) -> Iterator[Pair]:
    """Yield the text before every sentence of a usual length, and the sentence."""
    words = paragraph.split()
    for start, end in spans(words):
        if start >= LEAST and end - start in SENTENCE:
            yield " ".join(words[max(0, start - CONTEXT) : start]), " ".join(words[start:end])


def last_words(text: str) -> Iterator[Pair]:
    """Yield a passage and the last word of its last sentence, where it was said in the passage."""
    words = text.split()
    for start, end in spans(words):
        word = re.sub(r"\W", "", words[end - 1]) if end > start else ""
        shown = words[max(0, end - 1 - PASSAGE) : end - 1]
        said = {re.sub(r"\W", "", other) for other in shown[: -(LEAST // 3)]}
        if len(word) >= LONG and word.islower() and word in said and len(shown) == PASSAGE:
            yield " ".join(shown), word


def choices(found: Sequence[Pair]) -> Iterator[dict[str, object]]:
    """Yield items with four choices, in an order, and with choices in an order, drawn by SEED."""
    draw = random.Random(SEED)
    chosen = draw.sample(found, NUM_ITEMS)
    for index, (context, answer) in enumerate(chosen):
        step = NUM_ITEMS // NUM_CHOICES  # far enough that no item meets itself
        others = [chosen[(index + turn * step) % NUM_ITEMS][1] for turn in range(1, NUM_CHOICES)]
        offered = [answer, *others]
        draw.shuffle(offered)
        yield {"context": context, "choices": offered, "label": offered.index(answer)}


def words(found: Sequence[Pair]) -> Iterator[dict[str, object]]:
    """Yield every passage with its last word."""
    for context, word in found:
        yield {"context": context, "word": word}


def items(text: str) -> dict[str, list[dict[str, object]]]:
    """Return the items of each task by its name."""
    paragraphs = [part for part in text.split("\n\n") if not part.startswith("#")]

    def of(cut: Callable[[str], Iterator[Pair]]) -> list[Pair]:
        return [pair for part in paragraphs for pair in cut(part)]

    return {
        "demo_cloze": list(choices(of(openings))),
        "demo_sentences": list(choices(of(sentences))),
        "demo_last_word": list(words(list(last_words(" ".join(paragraphs))))),
    }


def main() -> None:
    for name, rows in items(TEXT.read_text(encoding="utf-8")).items():
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (HERE / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
