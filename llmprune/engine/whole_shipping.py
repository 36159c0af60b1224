"""How a result with a narrower stream or fewer tokens is stored: by its stock class, as tier E0.

All that would keep it from loading is found here, before anything is read or written.
Legend: D hidden size, K channels that are left, V vocabulary.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmprune.arch.layout import BlockLayout, Layout
from llmprune.base.errors import RecipeError, UnsupportedModel, first_line
from llmprune.checkpoint.skeleton import Skeleton, build_skeleton
from llmprune.checkpoint.source import Source, read_json
from llmprune.delivery.masks import MaskFiles
from llmprune.engine.shipment import Shipment
from llmprune.engine.whole import HIDDEN, Whole
from llmprune.hidden.narrowing import open_narrowing
from llmprune.hidden.sizes import config_changes, config_of_width
from llmprune.vocabulary.choosing import choose_tokens
from llmprune.vocabulary.required import required_ids
from llmprune.vocabulary.rewriting import renumbered_files
from llmprune.walk.streamed import Streamed

if TYPE_CHECKING:
    from llmprune.engine.plan import Plan


def ship_whole(plan: Plan, source: Source, blocks: Streamed, tokenizer: Any) -> Shipment:
    """Decide how the result is stored; `tokenizer` is the source's where its vocabulary is cut.

    Raises:
        UnsupportedModel, WontLoad: the stock class cannot hold it, or the tokenizer not be cut.
        RecipeError: the asked size is too small, or the source was pruned by single weights.
    """
    assert plan.whole is not None
    before = source.config()
    trust = plan.recipe.trust_remote_code
    if plan.whole.site.kind == HIDDEN:
        _check_no_masks(plan, source)
        skeleton, changes = _narrow(plan.whole, blocks, trust)
    else:
        skeleton, changes = _fewer_rows(plan.whole, source, blocks, tokenizer, trust)
    layout = Layout(
        blocks=tuple(BlockLayout(source=index) for index in range(len(blocks))),
        shared={plan.whole.site.kind: plan.whole.kept},
    )
    return Shipment(
        layout=layout, tier="E0", config=before | changes, before=before, skeleton=skeleton
    )


def _check_no_masks(plan: Plan, source: Source) -> None:
    """Check that no zeros of an earlier pruning would be lost.

    Raises:
        RecipeError: some would.
    """
    if MaskFiles(source.folder).index and not plan.prune.regrow:
        raise RecipeError(
            f"prune.pattern: {source.name} was pruned by single weights, whose zeros a narrower "
            "stream does not keep. Cut the hidden size first and prune weights after it, or give "
            "the zeros up with --set prune.regrow=true."
        )


def _narrow(whole: Whole, blocks: Streamed, trust: bool) -> tuple[Skeleton, dict[str, Any]]:
    """Return the modules of the narrower model, and the entries of the config that change."""
    assert whole.blueprint is not None
    config, rotates = blocks.model.config, whole.score.rotates
    size = whole.site.num_units
    basis = torch.zeros(size, whole.kept) if rotates else torch.arange(whole.kept)
    open_narrowing(blocks, Path("."), whole.blueprint, basis, trust_remote_code=trust)
    return (
        build_skeleton(
            config_of_width(config, whole.kept, untie=rotates),
            dtype=blocks.dtype or blocks.model.dtype,
            attention=config._attn_implementation,
            trust_remote_code=trust,
        ),
        config_changes(config, whole.kept, untie=rotates),
    )


def _fewer_rows(
    whole: Whole, source: Source, blocks: Streamed, tokenizer: Any, trust: bool
) -> tuple[Skeleton, dict[str, Any]]:
    """Return the modules of the model with fewer rows, and its new vocabulary size.

    That enough tokens can go does not depend on which are used most. Which ids the config names in
    the end does: what is built here has none for padding.
    """
    required = required_ids(source.folder, tokenizer, trust_remote_code=trust)
    num_rows = whole.site.num_units
    tokens = read_json(source.folder / "tokenizer.json")
    none_V = torch.zeros(num_rows, dtype=torch.int64)
    kept = choose_tokens(tokens, none_V, num_kept=whole.kept, multiple=1, required=required)
    renumbered_files(source.folder, kept, num_rows, trust_remote_code=trust)
    config = copy.deepcopy(blocks.model.config)
    if config.get_text_config(decoder=True) is not config:
        raise UnsupportedModel(
            f"the config of {config.model_type!r} holds its vocabulary in a part of it. Prune the "
            "text model alone, saved in a folder of its own."
        )
    config.vocab_size, config.pad_token_id = whole.kept, None
    try:
        skeleton = build_skeleton(
            config,
            dtype=blocks.dtype or blocks.model.dtype,
            attention=config._attn_implementation,
            trust_remote_code=trust,
        )
    except (ValueError, RuntimeError) as error:
        raise UnsupportedModel(
            f"a {config.model_type} model of {whole.kept} tokens does not exist: "
            f"{first_line(error)}. Leave the vocabulary as it is."
        ) from error
    return skeleton, {"vocab_size": whole.kept}
