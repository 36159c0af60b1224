"""Try on the classes of a family what a layout asks of them: other sizes, and halves left out.

A miniature with a half left out must compute what it does with that half's weights zero, and the
same with a cache as without. Legend: N rows, T tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from llmprune.arch.layout import Layout
from llmprune.arch.miniature import SEQ_LEN, miniature_model
from llmprune.base.errors import first_line

ROWS = 5  # a tensor of two rows would pass for a pair of outputs
TOLERANCE = 1e-4  # of the largest logit; what a wrong half changes is of its size


def why_no_shape(model_class: Any, stock: Any, layout: Layout) -> str | None:
    """Say which size of a layout makes no difference to the blocks of a family, if one does.

    `stock` is the config of the source, `model_class` the family's causal language model.
    """
    from accelerate import init_empty_weights

    from llmprune.remote.modeling_llmprune import BlockConfig, blocks_of

    family = stock.model_type
    tried: set[tuple[str, int]] = set()
    with init_empty_weights():
        blocks = blocks_of(model_class(stock))
        for index, block in enumerate(layout.blocks):
            for size in block.sizes.items() - tried:
                if size[1] == getattr(stock, size[0], None):
                    continue
                tried.add(size)
                try:
                    other = type(blocks[index])(BlockConfig(stock, dict([size])), index)
                except Exception as error:  # blocks refuse sizes with errors of many kinds
                    return f"{family} has no blocks of {size[0]} {size[1]} ({first_line(error)})"
                if _shapes(other) == _shapes(blocks[index]):
                    return f"the blocks of {family} stay as wide whatever {size[0]} says"
    return None


def _shapes(module: Any) -> dict[str, Any]:
    return {name: value.shape for name, value in module.named_parameters()}


def why_halves_stay(config: Mapping[str, Any], halves: Sequence[str]) -> str | None:
    """Say why blocks of a family cannot be built one by one, without some halves; None if they can.

    `halves` are in the words of `per_layer_config`: attention, mlp.
    """
    data = json.dumps(dict(config), sort_keys=True, default=str)
    for half in halves or ("",):
        try:
            reason = _try_without(data, half)
        except Exception as error:  # any line of any family may be what cannot do it
            reason = f"({first_line(error)})"
        if reason is not None:
            lack = f"run without their {half}" if half else "be built one by one"
            return f"blocks of {config['model_type']} cannot {lack} {reason}"
    return None


@cache
def _try_without(data: str, half: str) -> str | None:
    """Leave a half out of every other block of a miniature; say what is wrong then."""
    import torch
    from transformers import CONFIG_MAPPING

    from llmprune.remote import modeling_llmprune as code

    config = json.loads(data)
    whole = miniature_model(CONFIG_MAPPING[config["model_type"]].from_dict(config))
    _use_eager_experts(whole)
    with torch.no_grad():
        for value in whole.parameters():  # at their usual spread blocks have almost no effect
            value.mul_(5 if value.dim() > 1 else 1)
    blocks = code.blocks_of(whole)
    able = [index for index, block in enumerate(blocks) if code.modules_of(block, half)][::2]
    if half and not able:
        return "(no module of such a name)"
    own = whole.config.to_dict() | {"per_layer_config": {i: {"skip": [half]} for i in able}}
    twin_class = getattr(code, f"Llmprune{type(whole).__name__}")
    twin = twin_class(twin_class.config_class.from_dict(own)).eval()
    _use_eager_experts(twin)
    missing, gone = twin.load_state_dict(whole.state_dict(), strict=False)
    if missing:
        return f"(it would need {missing[0]})"
    with torch.no_grad():
        for name in gone:
            whole.get_parameter(name).zero_()
        return _compare(whole, twin, cached=half == "attention")


def _use_eager_experts(model: Any) -> None:
    """Let the miniature's experts run on any CPU."""
    if hasattr(model.config, "_experts_implementation"):
        model.set_experts_implementation("eager")


def _compare(whole: Any, twin: Any, *, cached: bool) -> str | None:
    """Say where a model without halves differs from one whose halves are zero."""
    import torch

    generator = torch.Generator().manual_seed(0)
    tokens_NT = torch.randint(3, twin.config.vocab_size, (ROWS, SEQ_LEN), generator=generator)
    expected = whole(input_ids=tokens_NT, use_cache=False).logits
    largest = float(expected.abs().max())
    apart = float((twin(input_ids=tokens_NT, use_cache=False).logits - expected).abs().max())
    if not apart <= TOLERANCE * largest:
        return f"(logits are {apart:.1e} apart)"
    if cached:
        before = twin(input_ids=tokens_NT[:, :-1], use_cache=True).past_key_values
        last = twin(input_ids=tokens_NT[:, -1:], past_key_values=before, use_cache=True).logits
        apart = float((last[:, -1] - expected[:, -1]).abs().max())
        if not apart <= TOLERANCE * largest:
            return f"(with a cache logits are {apart:.1e} apart)"
    return None
