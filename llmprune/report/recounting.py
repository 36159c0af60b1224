"""Sparsity by linear of a result whose masks moved while it was trained, counted from the masks.

What a report says of blocks is written when a model is cut. Where training moved the masks since,
those that lie beside the weights know better.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from llmprune.delivery.masks import NUMBER, MaskFiles
from llmprune.report.recoveries import cut_while_trained


def with_moved_masks(data: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return a report whose rows of blocks are those of the masks in a folder.

    Reports of models that were cut in a step of their own are returned as they are.
    """
    if cut_while_trained(data) is None or not MaskFiles(folder).index:
        return dict(data)
    return {**data, "blocks": block_rows(folder)}


def block_rows(folder: Path) -> list[dict[str, Any]]:
    """Return a row for each block with masks, and in it a row for each of their linears."""
    blocks: dict[int, dict[str, Any]] = {}
    for name, shape, kept in _counts(MaskFiles(folder)):
        number = NUMBER.search(name)
        block = int(number[0]) if number else 0
        found = blocks.setdefault(block, {"block": block, "error": None, "sites": [], "masks": {}})
        weights = prod(shape)
        found["masks"][name] = list(shape)
        found["sites"].append(
            {
                "site": name,
                "units": weights,
                "removed": weights - kept,
                "weights": weights,
                "removed_weights": weights - kept,
                "sparsity": (weights - kept) / weights,
                "tokens": 0,
                "error": None,
            }
        )
    for found in blocks.values():
        removed = sum(row["removed_weights"] for row in found["sites"])
        found["sparsity"] = removed / sum(row["weights"] for row in found["sites"])
    return [blocks[block] for block in sorted(blocks)]


def _counts(masks: MaskFiles) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """Yield name, shape and kept weights of every mask, in the order of the index."""
    from safetensors import safe_open

    for name, row in masks.index.items():
        shape = tuple(row["shape"])
        with safe_open(str(masks.folder / Path(row["file"]).name), "np") as file:
            bits = np.unpackbits(file.get_tensor(name), count=prod(shape))
        yield name, shape, int(bits.sum())
