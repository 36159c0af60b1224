"""Which hidden sizes a config takes, and what its entries become with a smaller one.

Legend: D hidden size, V vocabulary.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from llmprune.arch.couplings import heads_of
from llmprune.base.errors import RecipeError, UnsupportedModel, first_line
from llmprune.calibration.replay import capture

if TYPE_CHECKING:
    import torch

MULTIPLE = 8
EPS = re.compile(r"norm_?(eps|epsilon)$")


def hidden_size(config: Any) -> int:
    """Return the hidden size of a config.

    Raises:
        UnsupportedModel: it has none of its own, as configs of several parts.
    """
    if config.get_text_config(decoder=True) is not config or not hasattr(config, "hidden_size"):
        raise UnsupportedModel(
            f"the hidden size cannot be cut: the config of {config.model_type!r} does not hold it "
            "itself. Prune widths inside the blocks instead: --pattern ffn-channels or heads."
        )
    return int(config.hidden_size)


def fitting_width(config: Any, sparsity: float, *, multiple: int = MULTIPLE) -> int:
    """Return the largest hidden size that removes at least this share and that the config takes.

    It is a multiple of `multiple`. Some configs ask for more, such as Llama's for a multiple of the
    number of heads: sizes are tried downwards.

    Raises:
        RecipeError: no size is left, or `sparsity` is not within [0, 1).
    """
    width = hidden_size(config)
    if not 0 <= sparsity < 1:
        raise RecipeError(
            f"prune.sparsity: {sparsity} of the hidden size cannot be removed. Give a number from "
            "0 to below 1, such as 0.25."
        )
    largest = int((1 - sparsity) * width + 1e-9) // multiple * multiple
    reason = f"there is no multiple of {multiple} from 1 to {(1 - sparsity) * width:g}"
    for size in range(largest, 0, -multiple):
        try:
            config_of_width(config, size, untie=False)
            return size
        except UnsupportedModel as error:
            reason = str(error)
    raise RecipeError(
        f"prune.sparsity: {sparsity} leaves no hidden size of {width} ({reason}). Give less."
    )


def config_changes(config: Any, width: int, *, untie: bool) -> dict[str, Any]:
    """Return the entries of a config that change when D channels become `width`.

    The size of a head is said, which many configs derive from the hidden size. The eps of norms
    becomes eps D / width, so that it weighs in the mean over fewer channels as it did. Where norms
    of queries and keys share that entry they get it too: it is far below what they divide by.
    """
    before = hidden_size(config)
    data = config.to_dict()
    changes: dict[str, Any] = {config.attribute_map.get("hidden_size", "hidden_size"): width}
    heads = heads_of(config)
    if heads is not None and not data.get("head_dim"):
        changes["head_dim"] = heads.head_dim
    for key, value in data.items():
        if EPS.search(key) and isinstance(value, float):
            changes[key] = value * before / width
    if untie and data.get("tie_word_embeddings"):
        changes["tie_word_embeddings"] = False
    return changes


def config_of_width(config: Any, width: int, *, untie: bool) -> Any:
    """Return the config with another hidden size, as its class validates it.

    Raises:
        UnsupportedModel: the class refuses it.
    """
    changes = config_changes(config, width, untie=untie)
    try:
        return type(config).from_dict(config.to_dict() | changes)
    except Exception as error:  # configs are validated in many ways, by many kinds of error
        raise UnsupportedModel(
            f"the config of {config.model_type!r} takes no hidden size {width}: {first_line(error)}"
        ) from error


def untying_cost(config: Any, width: int) -> int:
    """Return how many parameters a rotation adds by parting head and embeddings: V K, or none."""
    return int(config.vocab_size) * width if config.tie_word_embeddings else 0


def entrance_scale(model: Any, blocks: Any, *, returns: int = 0) -> float:
    """Return what a model multiplies its token embeddings with before the first block.

    The model may be on meta: an embedding of ones is put in for the moment and read at the door of
    the first block.
    """
    import torch

    embedding = model.get_input_embeddings()
    own = embedding._parameters["weight"]
    ones: torch.Tensor = torch.ones(1, 1).expand(own.shape)
    embedding._parameters["weight"] = torch.nn.Parameter(ones, requires_grad=False)
    try:
        with torch.no_grad():
            ids_BT = torch.full((1, 2), min(3, own.shape[0] - 1))
            first, _ = capture(model, blocks, ids_BT, returns=returns)
    finally:
        embedding._parameters["weight"] = own
    return float(first.flatten()[0])
