"""Write demo_cloze.jsonl: which of four continuations follows, in the bundled evaluation text.

Cut a sentence behind its fourth word; the question is the text before, and the right answer the
next four words. The wrong ones are right answers of other items, each used three times, so that
whoever looks at the answers alone scores one in four. Everything follows from the text and SEED.

    python eval/tasks/make_demo_cloze.py
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
TEXT = HERE.parents[1] / "llmprune" / "demo" / "evaluation.txt"
OUT = HERE / "demo_cloze.jsonl"

SEED = 0
NUM_ITEMS = 200
NUM_CHOICES = 4
CONTEXT = 40  # words before the cut, at most
LEAST = 15  # words before the cut, at least
HEAD = 4  # words of the sentence that the question shows
ANSWER = 4  # words of an answer
END = re.compile(r"[.!?]['\"’”_]*$")  # of the last word of a sentence


def cuts(paragraph: str) -> Iterator[tuple[str, str]]:
    """Yield (context, right answer) for every sentence that is long enough."""
    words = paragraph.split()
    ends = [index + 1 for index, word in enumerate(words) if END.search(word)]
    for start, end in zip([0, *ends], [*ends, len(words)], strict=True):
        cut = start + HEAD
        if cut >= LEAST and end - cut >= ANSWER:
            yield " ".join(words[max(0, cut - CONTEXT) : cut]), " ".join(words[cut : cut + ANSWER])


def items(text: str) -> Iterator[dict[str, object]]:
    """Yield the items in an order, and with choices in an order, drawn by SEED."""
    draw = random.Random(SEED)
    paragraphs = [part for part in text.split("\n\n") if not part.startswith("#")]
    found = [item for part in paragraphs for item in cuts(part)]
    chosen = draw.sample(found, NUM_ITEMS)
    for index, (context, answer) in enumerate(chosen):
        step = NUM_ITEMS // NUM_CHOICES  # far enough that no item meets itself
        others = [chosen[(index + turn * step) % NUM_ITEMS][1] for turn in range(1, NUM_CHOICES)]
        choices = [answer, *others]
        draw.shuffle(choices)
        yield {"context": context, "choices": choices, "label": choices.index(answer)}


def main() -> None:
    text = TEXT.read_text(encoding="utf-8")
    lines = [json.dumps(item, ensure_ascii=False) for item in items(text)]
    OUT.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
