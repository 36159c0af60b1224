"""Write the items of the offline tasks, all of the bundled evaluation text, from it and SEED alone.

    demo_cloze      cut within a sentence: which of four with one first word goes on? The right
                    one alone takes up a word that the passage has said, and not lately
    demo_sentences  cut behind a sentence: which of four whole sentences follows?
    demo_last_word  cut before a sentence's last word, one that has been said before: what is it?

Wrong answers are the right ones of other items, each used three times, so that whoever looks at
the answers alone scores one in four. With one first word in all, the word before it tells nothing.

    python eval/tasks/make_demo_tasks.py
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from itertools import islice
from pathlib import Path

HERE = Path(__file__).resolve().parent
TEXT = HERE.parents[1] / "llmprune" / "demo" / "evaluation.txt"

SEED = 0
NUM_ITEMS = 200
NUM_CHOICES = 4
CONTEXT = 40  # words before a sentence, at most
LEAST = 15  # words before a sentence, at least
ANSWER = 3  # words of an answer of demo_cloze
LATELY = 20  # words before the cut that have not said what the answer takes up
TAKEN_UP = 5  # letters of a word that is taken up, at least
APART = 40  # words between cuts of demo_cloze, at least
SENTENCE = range(6, 21)  # words of an answer of demo_sentences
PASSAGE = 120  # words before the last one, at most; before a cut of demo_cloze
LONG = 4  # letters of a last word, at least
END = re.compile(r"[.!?]['\"’”_]*$")  # of the last word of a sentence

Pair = tuple[str, str]  # what is shown, and what goes on


def spans(words: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Yield where each sentence of a paragraph begins and ends."""
    ends = [index + 1 for index, word in enumerate(words) if END.search(word)]
    yield from zip([0, *ends], [*ends, len(words)], strict=True)


@cache
def bare(word: str) -> str:
    """Return a longer word that is no name, without what stands around it; of others nothing."""
    found = re.sub(r"\W", "", word)
    return found if len(found) >= TAKEN_UP and found.islower() else ""


def telling(words: Iterable[str]) -> set[str]:
    """Return the longer words that are no names."""
    return set(filter(None, map(bare, words)))


def echoes(words: Sequence[str]) -> dict[str, list[int]]:
    """Return the cuts where a sentence takes up what was said, and not lately, by the next word."""
    found: dict[str, list[int]] = {}
    for cut in range(PASSAGE, len(words) - ANSWER):
        answer = words[cut : cut + ANSWER]
        if not re.fullmatch(r"[a-zI]+", answer[0]) or END.search(words[cut - 1]):
            continue
        taken = telling(answer[1:])
        if not taken:
            continue
        said, lately = (
            telling(words[cut - PASSAGE : cut - LATELY]),
            telling(words[cut - LATELY : cut]),
        )
        if taken & said and not taken & lately and not any(map(END.search, answer[:-1])):
            found.setdefault(answer[0], []).append(cut)
    return found


def strange(words: Sequence[str], cut: int, other: int) -> bool:
    """Tell whether the answers at two cuts differ, and neither is heard of at the other one."""
    one, two = (words[at : at + ANSWER] for at in (cut, other))
    heard = telling(two[1:]) & telling(words[cut - PASSAGE : cut])
    return (
        one != two and not heard and not telling(one[1:]) & telling(words[other - PASSAGE : other])
    )


def fours(words: Sequence[str], draw: random.Random) -> Iterator[list[int]]:
    """Yield four cuts with one next word, far from all others, whose answers are strange to each
    other; each word in turn, as long as it has four.
    """
    found = echoes(words)
    heads = sorted(found)
    draw.shuffle(heads)
    pools = {head: draw.sample(found[head], len(found[head])) for head in heads}
    taken: list[int] = []
    live = [head for head in heads if len(pools[head]) >= NUM_CHOICES]
    while live:
        for head in list(live):
            four: list[int] = []
            for cut in list(pools[head]):
                if any(abs(cut - other) < APART for other in (*taken, *four)):
                    pools[head].remove(cut)
                elif all(strange(words, cut, other) for other in four):
                    four.append(cut)
                if len(four) == NUM_CHOICES:
                    break
            if len(four) < NUM_CHOICES:
                live.remove(head)
                continue
            pools[head] = [cut for cut in pools[head] if cut not in four]
            taken += four
            yield four


def cloze(words: Sequence[str]) -> Iterator[dict[str, object]]:
    """Yield items of four choices, which are the answers at the cuts of one four."""
    draw = random.Random(SEED)
    for four in islice(fours(words, draw), NUM_ITEMS // NUM_CHOICES):
        for cut in four:
            offered = [" ".join(words[at : at + ANSWER]) for at in four]
            right = " ".join(words[cut : cut + ANSWER])
            draw.shuffle(offered)
            context = " ".join(words[cut - PASSAGE : cut])
            yield {"context": context, "choices": offered, "label": offered.index(right)}


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
        "demo_cloze": list(cloze(" ".join(paragraphs).split())),
        "demo_sentences": list(choices(of(sentences))),
        "demo_last_word": list(words(list(last_words(" ".join(paragraphs))))),
    }


def main() -> None:
    for name, rows in items(TEXT.read_text(encoding="utf-8")).items():
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (HERE / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
