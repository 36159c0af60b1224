"""The config of a result: new sizes, fewer blocks, and every entry that speaks of blocks by index.

What an entry means for a block cannot always be told from the config alone. So the new config is
built, without weights, and each block compared with the one it came from: its kind and its shapes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

from llmprune.arch.layout import Layout
from llmprune.base.errors import WontLoad

NUM_BLOCKS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
PREFIXES = ("first_k_dense_replace", "max_window_layers", "num_dense_layers")
"""Entries that count the first blocks, which are of one kind, and the rest of another."""
INDICES = ("mlp_only_layers", "full_attn_idxs", "attn_layer_indices", "no_rope_layer_indices")
"""Entries that list blocks by index."""
# ruff: noqa: SIM905
COUNTS = frozenset(
    ("layer_idx layer_id in_features out_features nf nx training num_heads num_attention_heads "
     "n_head n_heads num_key_value_heads num_kv_heads num_key_value_groups num_query_heads "
     "intermediate_size moe_intermediate_size ffn_dim hidden_size embed_dim split_size d_model "
     "num_experts n_routed_experts num_local_experts top_k ffn_hidden_size num_key_value_groups "
     "normalized_shape eps variance_epsilon expert_dim intermediate_dim inner_dim").split()
)  # fmt: skip
"""Attributes of modules that hold sizes, or the place of a block: those may change."""


def resized(config: Mapping[str, Any], layout: Layout, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Return a config.json with the blocks of a layout and other sizes.

    Entries that list something per block lose those of blocks that went; entries that name or count
    blocks by index follow.

    >>> from llmprune.arch.layout import BlockLayout
    >>> layout = Layout(blocks=(BlockLayout(source=0), BlockLayout(source=2)))
    >>> resized({"num_hidden_layers": 3, "layer_types": ["a", "b", "c"]}, layout, {})
    {'num_hidden_layers': 2, 'layer_types': ['a', 'c']}
    """
    changed = deepcopy(dict(config))
    kept = [block.source for block in layout.blocks]
    key = next((name for name in NUM_BLOCKS if isinstance(changed.get(name), int)), None)
    if key is not None and changed[key] != len(kept):
        num_blocks = changed[key]
        changed[key] = len(kept)
        for name, value in changed.items():
            changed[name] = _renumbered(name, value, kept, num_blocks)
    return changed | dict(sizes)


def as_mistral(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config.json of a Llama without biases as that of the same model, a Mistral.

    >>> as_mistral({"model_type": "llama", "head_dim": 8, "mlp_bias": False})["model_type"]
    'mistral'
    """
    left_out = ("attention_bias", "mlp_bias", "pretraining_tp")
    twin = {key: value for key, value in config.items() if key not in left_out}
    twin |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    return twin | {"sliding_window": None}


def _renumbered(name: str, value: Any, kept: Sequence[int], num_blocks: int) -> Any:
    """Return an entry of the config for the blocks that are left."""
    places = {source: place for place, source in enumerate(kept)}
    if name in INDICES and isinstance(value, list):
        return [places[index] for index in value if index in places]
    if name in PREFIXES and isinstance(value, int):
        return sum(index < value for index in kept)
    if isinstance(value, list) and len(value) == num_blocks:
        return [value[index] for index in kept]
    return value


def check_blocks_alike(
    source: Sequence[Any], result: Sequence[Any], layout: Layout, roots: Mapping[str, Sequence[str]]
) -> None:
    """Check that every block of a result is of the kind of the block that it came from.

    `roots` are, for every half that may be gone, the paths of the modules that it lies in. Classes
    are compared where both are of the same model's code.

    Raises:
        WontLoad: one is not; names the block and what differs.
    """
    if len(result) != len(layout.blocks):
        raise WontLoad(
            f"the config of {len(layout.blocks)} blocks makes {len(result)}: no entry of this "
            f"family's config.json counts them ({', '.join(NUM_BLOCKS)} are known). Type --set "
            "prune.form=masked, or choose another --pattern."
        )
    for place, block in enumerate(layout.blocks):
        one, other = source[block.source], result[place]
        before, after = kind_of(one), kind_of(other)
        same = type(one).__module__ == type(other).__module__  # else of another model's code
        gone = [root for half in block.without for root in roots.get(half, ())]
        if block.without:  # what stands in place of a half, or of its norm, holds nothing
            both = (*one.named_modules(), *other.named_modules())  # or stood, in another tier
            gone += [path for path, module in both if _is_empty(module)]
        for name in sorted(before.keys() & after.keys()):
            inside = any(name == root or name.startswith(root + ".") for root in gone)
            if before[name] != after[name] and not inside and (same or not name.endswith("class")):
                raise WontLoad(_differs(block.source, place, name, before[name], after[name]))


def _differs(source: int, place: int, name: str, before: Any, after: Any) -> str:
    """Say that a block would be of another kind than the one that it came from."""
    if source == place:
        return (
            f"block {source} would have {name} {after!r} instead of {before!r} with the sizes that "
            "are left: this family's config derives it from them. Choose another --pattern, or "
            "type --set prune.form=masked."
        )
    return (
        f"block {source} would become block {place} with {name} {after!r} instead of {before!r}: "
        "this family's config cannot say which kind of block stands where after others went. Type "
        "--set prune.form=masked, or keep the number of blocks."
    )


def kind_of(block: Any) -> dict[str, Any]:
    """Return what a block is, but for sizes and place: modules' classes and plain attributes."""
    found: dict[str, Any] = {}
    for path, module in block.named_modules():
        found[f"{path}.class" if path else "class"] = type(module).__name__
        for name, value in vars(module).items():
            if not name.startswith("_") and name not in COUNTS and _is_plain(value):
                found[f"{path}.{name}" if path else name] = value
    return found


def _is_empty(module: Any) -> bool:
    return next(module.parameters(), None) is None


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)
