"""The sites of a report by kind: what is left of a name without its block and its expert."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from llmprune.arch.anatomy import split_index
from llmprune.base.text import ranges


class Kind(NamedTuple):
    """All sites of a kind: in how many blocks, how many, and their weights before and removed."""

    name: str
    blocks: list[int]
    num_sites: int
    weights: int
    removed: int

    @property
    def where(self) -> str:
        """Return the blocks as ranges; of what lies in no block alone, all."""
        return "all" if self.blocks == [-1] else ranges(self.blocks)

    @property
    def sparsity(self) -> float:
        """Return the removed share of the weights."""
        return self.removed / self.weights


def split_site(site: str, block: int) -> tuple[str, int | None]:
    """Return a site's kind and the index of its expert, if it has one.

    >>> split_site("model.layers.3.self_attn.q_proj", 3)
    ('self_attn.q_proj', None)
    >>> split_site("model.layers.3.mlp.experts.7.up_proj", 3)
    ('mlp.experts.*.up_proj', 7)
    """
    return split_index(site.split(f".{block}.", 1)[-1])


def site_rows(data: Mapping[str, Any]) -> Iterator[tuple[int, str, int | None, Mapping[str, Any]]]:
    """Yield block, kind, expert and row of every site of a report."""
    for block in data["blocks"]:
        for row in block["sites"]:
            kind, expert = split_site(row["site"], block["block"])
            yield block["block"], kind, expert, row


def by_kind(data: Mapping[str, Any]) -> list[Kind]:
    """Return the kinds of a report in the order of their first site."""
    found: dict[str, Kind] = {}
    for block, name, _, row in site_rows(data):
        kind = found.get(name, Kind(name, [], 0, 0, 0))
        found[name] = Kind(
            name,
            [*kind.blocks, *([] if block in kind.blocks[-1:] else [block])],
            kind.num_sites + 1,
            kind.weights + row["weights"],
            kind.removed + row["removed_weights"],
        )
    return list(found.values())
