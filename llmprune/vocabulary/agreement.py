"""Whether a smaller vocabulary still says the same: text comes back, and how much is spelt anew."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from llmprune.base.errors import UnsupportedModel
from llmprune.calibration.windows import token_ids


@dataclass(frozen=True, kw_only=True)
class RoundTrip:
    """Tokens of the same texts before and after; `num_changed` of those before are no longer."""

    num_texts: int
    num_bytes: int
    tokens_before: int
    tokens_after: int
    num_changed: int

    def text(self) -> str:
        """Return the finding as a sentence."""
        share = self.num_changed / max(self.tokens_before, 1)
        return (
            f"{self.num_texts} texts of {self.num_bytes} bytes come back unchanged; "
            f"{self.tokens_before} tokens became {self.tokens_after}, {self.num_changed} "
            f"({share:.2%}) spelt anew"
        )


def round_trip(old: Any, new: Any, texts: Iterable[str]) -> RoundTrip:
    """Encode and decode texts with two tokenizers of transformers, and compare.

    The new one must give what the old one gives, which is the text itself unless the tokenizer
    normalises it.

    Raises:
        UnsupportedModel: a text decodes to something else.
    """
    sums: Counter[str] = Counter()
    for text in texts:
        before, after = token_ids(text, old), token_ids(text, new)
        _check_same(_decoded(before, old), _decoded(after, new))
        strings = Counter(old.convert_ids_to_tokens(before))
        gone = strings - Counter(new.convert_ids_to_tokens(after))
        sums.update(
            num_texts=1,
            num_bytes=len(text.encode()),
            tokens_before=len(before),
            tokens_after=len(after),
            num_changed=gone.total(),
        )
    names = ("num_texts", "num_bytes", "tokens_before", "tokens_after", "num_changed")
    return RoundTrip(**{name: sums[name] for name in names})


def _decoded(ids: list[int], tokenizer: Any) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def _check_same(wanted: str, found: str) -> None:
    """Check that a text came back as before.

    Raises:
        UnsupportedModel: it did not.
    """
    if wanted == found:
        return
    pairs = zip(wanted, found, strict=False)
    place = next(
        (index for index, (a, b) in enumerate(pairs) if a != b), min(len(wanted), len(found))
    )
    around = slice(max(place - 20, 0), place + 20)
    raise UnsupportedModel(
        f"with the smaller vocabulary {wanted[around]!r} comes back as {found[around]!r}. The "
        "tokenizer cannot spell it from what is kept; keep more tokens, or choose them on text "
        "that has these characters."
    )
