"""How a result whose blocks differ travels: which tier fits it, with which config and which code.

E0 stock and uniform; E1 stock, padded with zeros to the widest block; E2 Llama as DeciLM, which
other runtimes know too; E3 any family, with code of our own. The code lies in `llmprune/remote`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from llmprune import remote
from llmprune.arch.layout import BlockLayout, Layout, Tier
from llmprune.arch.resize import NUM_BLOCKS
from llmprune.base.errors import WontLoad, first_line
from llmprune.delivery.trial import why_halves_stay, why_no_shape

TIERS: tuple[Tier, ...] = ("E0", "E1", "E2", "E3")
HALF = {"attention": "attention", "ffn": "mlp"}  # our words, and those of per_layer_config
HOME = Path(remote.__file__).parent
FREE, PORTABLE = "modeling_llmprune", "modeling_decilm"
LLAMAS = ("llama", "mistral", "qwen2")  # what one class for Llama computes as well
NOT_LLAMA = ("layer_types", "sliding_window", "use_sliding_window", "max_window_layers")
MULTIPLE = 256  # to which runtimes of DeciLM round the width of an FFN
QUERIES = ("num_attention_heads", "n_head", "n_heads")
GROUPS = ("num_key_value_heads", "num_kv_heads")


def lowest_tier(config: Mapping[str, Any], layout: Layout) -> tuple[Tier, list[tuple[Tier, str]]]:
    """Return the tier that travels farthest, and why those before it do not fit.

    E1 is never among them: it stores as much as the source does.

    Raises:
        WontLoad: none fits.
    """
    unfit: list[tuple[Tier, str]] = []
    for tier in ("E0", "E2", "E3"):
        reason = why_not(config, layout, tier)
        if reason is None:
            return tier, unfit
        unfit.append((tier, reason))
    raise WontLoad(
        f"no tier delivers this shape of {config.get('model_type')}: "
        + "; ".join(f"{tier}: {reason}" for tier, reason in unfit)
        + ". Prune other units, or write zeros instead (--set prune.form=masked)."
    )


def is_own_code(folder: Path) -> bool:
    """Tell whether the Python code beside a model is, byte for byte, what llmprune ships."""
    found = sorted(folder.glob("*.py"))
    own = {path.name: path.read_bytes() for path in HOME.glob("modeling_*.py")}
    return bool(found) and all(own.get(path.name) == path.read_bytes() for path in found)


def stale_code(folder: Path, config: Mapping[str, Any]) -> list[Path]:
    """Return the files of our code in a folder that its config.json does not ask for."""
    asked = {str(name).partition(".")[0] for name in (config.get("auto_map") or {}).values()}
    found = [folder / f"{name}.py" for name in (FREE, PORTABLE) if name not in asked]
    return [path for path in found if path.is_file()]


def why_not(config: Mapping[str, Any], layout: Layout, tier: Tier) -> str | None:
    """Say why a layout cannot be delivered in a tier; None where it can.

    `config` is that of the source, cut to the blocks of the layout.
    """
    if tier not in TIERS:
        raise ValueError(f"no tier {tier!r}; there are {', '.join(TIERS)}")
    cut = bool(layout.widest) or any(block.without for block in layout.blocks)
    if cut and (config.get("per_layer_config") or config.get("block_configs")):
        return f"the blocks of {config['model_type']} differ before anything is pruned"
    if (kinds := _stock_classes(config)) is None:
        if tier in ("E0", "E1"):  # its own code builds it; the gate proves whether it does
            return next(_differences(layout), None) if tier == "E0" else None
        return f"{config.get('model_type')} is no causal language model of transformers"
    stock = _config_of(kinds[0], config)
    built = _padded(layout) if tier in ("E0", "E1") else layout
    if (odd := _odd_groups(stock, built)) is not None:
        return odd
    if tier == "E0" and (different := next(_differences(layout), None)) is not None:
        return different
    if tier == "E2":
        return _why_not_portable(stock, layout)
    if (shapeless := why_no_shape(kinds[1], stock, built)) is not None:
        return shapeless
    try:
        delivered, _ = heterogeneous_config(config, layout, tier)
        parameter_shapes(delivered)
    except Exception as error:  # configs and modules refuse sizes with errors of many kinds
        return f"{config['model_type']} refuses these sizes ({first_line(error)})"
    halves = sorted({HALF[half] for block in layout.blocks for half in block.without})
    return why_halves_stay(config, halves) if tier == "E3" else None


def heterogeneous_config(
    config: Mapping[str, Any], layout: Layout, tier: Tier
) -> tuple[dict[str, Any], tuple[Path, ...]]:
    """Return the config.json of a result and the files of code to put beside it.

    `config` is that of the source, cut to the blocks of the layout, with the sizes that all blocks
    share. Whether the tier fits is `why_not`'s to say.
    """
    if tier == "E2":
        return _portable_config(config, layout), (HOME / f"{PORTABLE}.py",)
    uniform = deepcopy({**config, **layout.widest})
    if tier != "E3":
        return uniform, ()
    kinds = _stock_classes(config)
    assert kinds is not None, "the tier does not fit"
    config_class, model_class = (f"Llmprune{kind.__name__}" for kind in kinds)
    own = {str(index): _own_entries(layout, index) for index in range(len(layout.blocks))}
    return uniform | {
        "allow_global_per_layer_attribute_access": True,  # the widest, to size buffers by
        "architectures": [model_class],
        "auto_map": _auto_map(FREE, config_class, model_class),
        "model_type": f"llmprune_{config['model_type']}",  # no stock class must claim it
        "per_layer_config": {index: entries for index, entries in own.items() if entries},
    }, (HOME / f"{FREE}.py",)


def factored_config(
    config: Mapping[str, Any], ranks: Sequence[Mapping[str, int]]
) -> tuple[dict[str, Any], tuple[Path, ...]]:
    """Return the config.json of a result with two linears in place of some, and its code.

    `ranks` are, block by block, those of linears by their names in the block; of two that became
    one's, each may become two again.

    Raises:
        WontLoad: the family has no class that could be built upon.
    """
    found = dict(config)
    before = found.get("ranks") or [{}] * len(ranks)
    if not is_free(config):
        if _stock_classes(config) is None:
            raise WontLoad(
                f"{config.get('model_type')} is no causal language model of transformers, so no "
                "code of ours can put two linears in place of one. Type --set prune.tier=E0 for "
                "their product, which saves nothing, or choose another --pattern."
            )
        alike = Layout(blocks=tuple(BlockLayout(source=index) for index in range(len(ranks))))
        found, _ = heterogeneous_config(config, alike, "E3")
        del found["per_layer_config"], found["allow_global_per_layer_attribute_access"]
    joined = [{**old, **own} for old, own in zip(before, ranks, strict=True)]
    return found | {"ranks": joined}, (HOME / f"{FREE}.py",)


def unfolded(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[BlockLayout]] | None:
    """Return the stock config of a result whose blocks differ, and what each block has of it.

    That is its config.json without what tiers E2 and E3 wrote into it, the widest of all sizes for
    all. None for any other model, and for linears of low rank, of which no stock config can say.
    """
    if config.get("ranks"):
        return None
    if is_free(config):
        return _unfolded_free(config)
    if config.get("model_type") == "nemotron-nas" and config.get("block_configs"):
        return _unfolded_portable(config)
    return None


def _unfolded_free(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[BlockLayout]]:
    own = {
        int(index): dict(entries)
        for index, entries in (config.get("per_layer_config") or {}).items()
    }
    keys = sorted({key for entries in own.values() for key in entries} - {"skip"})
    ours = {half: word for word, half in HALF.items()}
    blocks = []
    for index in range(_num_blocks(config)):
        entries = own.get(index, {})
        gone = tuple(ours[half] for half in entries.get("skip", ()))
        sizes = {key: entries.get(key, config[key]) for key in keys}
        blocks.append(_as_left(index, sizes, gone))
    written = ("allow_global_per_layer_attribute_access", "auto_map", "per_layer_config")
    return {key: value for key, value in config.items() if key not in written} | {
        "architectures": [name.removeprefix("Llmprune") for name in config["architectures"]],
        "model_type": str(config["model_type"]).removeprefix("llmprune_"),
    }, blocks


def _unfolded_portable(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[BlockLayout]]:
    blocks = []
    for index, parts in enumerate(config["block_configs"]):
        gone = ("attention",) if parts["attention"]["no_op"] else ()
        sizes = {"intermediate_size": parts["ffn"]["intermediate_size"]}
        blocks.append(_as_left(index, sizes, gone))
    written = ("auto_map", "block_configs", "per_layer_config", "qkv_bias")
    found = {key: value for key, value in config.items() if key not in written}
    qwen = config.get("qkv_bias", False) and not config.get("attention_bias")
    kind = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    kind = kind if qwen else {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    return found | kind, blocks


def _num_blocks(config: Mapping[str, Any]) -> int:
    return next(int(config[key]) for key in NUM_BLOCKS if isinstance(config.get(key), int))


def _as_left(index: int, sizes: Mapping[str, int], gone: tuple[str, ...]) -> BlockLayout:
    """Return a block without the sizes of halves that it lacks."""
    heads = (*QUERIES, *GROUPS)
    lost = {"attention": heads, "ffn": tuple(sizes.keys() - set(heads))}
    without = {key for half in gone for key in lost[half]}
    left = {key: size for key, size in sizes.items() if key not in without}
    return BlockLayout(source=index, sizes=left, without=gone)


def cut_again(layout: Layout, before: Sequence[BlockLayout]) -> Layout:
    """Return what is left of blocks that had sizes of their own, and may have lacked halves."""
    blocks = []
    for block in layout.blocks:
        earlier = before[block.source]
        gone = tuple(dict.fromkeys((*earlier.without, *block.without)))
        blocks.append(_as_left(block.source, {**earlier.sizes, **block.sizes}, gone))
    return Layout(blocks=tuple(blocks), shared=layout.shared)


def is_free(config: Mapping[str, Any]) -> bool:
    """Tell whether a config.json is that of a result of tier E3, whose classes are ours."""
    classes = (config.get("auto_map") or {}).values()
    return bool(classes) and all(str(name).startswith(f"{FREE}.") for name in classes)


def parameter_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every parameter that a delivered config.json asks for.

    These are all that a result may store: halves that are gone have none, and in E2 the norm before
    attention goes with it.
    """
    from accelerate import init_empty_weights

    config_class, model_class = _classes(config)
    with init_empty_weights():
        model = model_class(_config_of(config_class, config))
    named = model.named_parameters(remove_duplicate=False)
    return {name: tuple(value.shape) for name, value in named}


def _classes(config: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return the classes of config and model that a config.json names."""
    if "auto_map" not in config:
        kinds = _stock_classes(config)
        assert kinds is not None, "a stock model of a family without a class"
        return kinds
    names = [config["auto_map"][key] for key in ("AutoConfig", "AutoModelForCausalLM")]
    pairs = [name.split(".") for name in names]
    home = importlib.import_module(f"llmprune.remote.{pairs[0][0]}")
    return getattr(home, pairs[0][1]), getattr(home, pairs[1][1])


def _stock_classes(config: Mapping[str, Any]) -> tuple[Any, Any] | None:
    """Return the classes of transformers for a family's config and causal language model."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    kind = str(config.get("model_type"))
    if "auto_map" in config or kind not in CONFIG_MAPPING:
        return None
    config_class: Any = CONFIG_MAPPING[kind]
    if config_class not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
    return (config_class, model_class) if model_class.config_class is config_class else None


def _config_of(config_class: Any, config: Mapping[str, Any]) -> Any:
    """Return what a class makes of a config.json, which stays as it is."""
    return config_class.from_dict(deepcopy(dict(config)))


def _padded(layout: Layout) -> Layout:
    """Return a layout whose blocks are whole, and all as wide as the widest of them."""
    blocks = (
        BlockLayout(source=block.source, sizes={key: layout.widest[key] for key in block.sizes})
        for block in layout.blocks
    )
    return Layout(blocks=tuple(blocks), shared=layout.shared)


def _auto_map(module: str, config_class: str, model_class: str) -> dict[str, str]:
    """Return where transformers finds the classes among the files of a result."""
    return {
        "AutoConfig": f"{module}.{config_class}",
        "AutoModelForCausalLM": f"{module}.{model_class}",
    }


def _own_entries(layout: Layout, index: int) -> dict[str, Any]:
    """Return what the config of one block says other than that of all."""
    block, widest = layout.blocks[index], layout.widest
    own: dict[str, Any] = {k: size for k, size in block.sizes.items() if size != widest[k]}
    return own | ({"skip": sorted(HALF[half] for half in block.without)} if block.without else {})


def _differences(layout: Layout) -> Iterator[str]:
    """Yield in what the blocks of a layout differ, as clauses."""
    for index, block in enumerate(layout.blocks):
        for half in block.without:
            yield f"{_named(half)} of block {index} is gone"
    keys = [key for key in layout.widest if len(_numbers(layout, key)) > 1]
    if keys:
        yield f"blocks differ in {' and '.join(keys)}"
    elif not layout.uniform:
        yield "blocks differ in what they consist of"


def _named(half: str) -> str:
    return "FFN" if half == "ffn" else half


def _numbers(layout: Layout, key: str) -> set[int]:
    """Return all numbers that the blocks have for a size."""
    return {block.sizes[key] for block in layout.blocks if key in block.sizes}


def _odd_groups(stock: Any, layout: Layout) -> str | None:
    """Say where key/value heads do not divide query heads, which only fails once a model runs."""
    for index, block in enumerate(layout.blocks):
        queries, groups = (
            next((n for key in keys if (n := block.sizes.get(key, getattr(stock, key, None)))), 1)
            for keys in (QUERIES, GROUPS)
        )
        if any(key in block.sizes for key in GROUPS) and queries % groups:
            return (
                f"the {groups} key/value heads of block {index} do not divide its {queries} heads"
            )
    return None


def _why_not_portable(stock: Any, layout: Layout) -> str | None:
    """Say what of a layout DeciLM lacks: its class in vLLM, or its graph in llama.cpp."""
    if stock.model_type not in LLAMAS:
        return f"family {stock.model_type} computes other things than Llama does"
    if stock.hidden_act not in ("silu", "swish"):
        return f"its FFN has {stock.hidden_act}, not SiLU"
    if (window := _window(stock)) is not None:
        return f"attention sees only {window} tokens"
    if unknown := sorted(layout.widest.keys() - {"intermediate_size", QUERIES[0], GROUPS[0]}):
        return f"DeciLM has no blocks that differ in {' and '.join(unknown)}"
    for index, block in enumerate(layout.blocks):
        if "ffn" in block.without:
            return f"FFN of block {index} is gone, which llama.cpp's graph cannot run"
        if "attention" in block.without and index == 0:
            return "attention of block 0 is gone, which vLLM's class cannot run"
    if wrong := sorted(w for w in _widths(stock, layout) if w % MULTIPLE):
        return f"FFN width {wrong[0]} is no multiple of {MULTIPLE}"
    return _why_no_uniform_attention(stock, layout)


def _window(stock: Any) -> int | None:
    """Return the tokens that attention sees, where that is fewer than the model takes."""
    window: int | None = getattr(stock, "sliding_window", None)
    kinds = getattr(stock, "layer_types", None) or ["sliding_attention"]
    short = window is not None and window < stock.max_position_embeddings
    return window if short and "sliding_attention" in kinds else None


def _widths(stock: Any, layout: Layout) -> list[int]:
    """Return the FFN width of every block."""
    own = stock.intermediate_size
    return [block.sizes.get("intermediate_size", own) for block in layout.blocks]


def _heads(stock: Any, layout: Layout) -> set[tuple[int, int]]:
    """Return the numbers of query and of key/value heads of the blocks that have attention."""
    return {
        (
            block.sizes.get(QUERIES[0], stock.num_attention_heads),
            block.sizes.get(GROUPS[0], stock.num_key_value_heads),
        )
        for block in layout.blocks
        if "attention" not in block.without
    }


def _why_no_uniform_attention(stock: Any, layout: Layout) -> str | None:
    """Say why attention is not the same in all blocks that have it, or not as wide as the model."""
    heads = _heads(stock, layout)
    if len(heads) > 1:
        return "blocks differ in their attention heads"
    (queries, _), hidden = next(iter(heads)), stock.hidden_size
    head_dim = getattr(stock, "head_dim", None) or hidden // stock.num_attention_heads
    if queries * head_dim != hidden:
        return f"{queries} heads of {head_dim} values are not as wide as the model ({hidden})"
    return None


def _portable_config(config: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """Return a config of DeciLM: that of Llama, and an entry for every block."""
    kinds = _stock_classes(config)
    assert kinds is not None, "the tier does not fit"
    stock = _config_of(kinds[0], config)
    full = {k: v for k, v in stock.to_diff_dict().items() if k not in NOT_LLAMA}
    ((queries, groups),) = _heads(stock, layout)
    widths, hidden = _widths(stock, layout), stock.hidden_size
    bias = {"attention_bias": False, "qkv_bias": True} if stock.model_type == "qwen2" else {}
    return (
        full
        | bias
        | {
            "architectures": ["DeciLMForCausalLM"],
            "auto_map": _auto_map(PORTABLE, "DeciLMConfig", "DeciLMForCausalLM"),
            "block_configs": [
                {
                    "attention": _attention(queries // groups, "attention" in block.without),
                    "ffn": {
                        "no_op": False,
                        "replace_with_linear": False,
                        "ffn_mult": 3 * width / (2 * hidden),  # what runtimes read, if it is there
                        "intermediate_size": width,
                    },
                }
                for block, width in zip(layout.blocks, widths, strict=True)
            ],
            "head_dim": hidden // queries,
            "intermediate_size": max(widths),
            "model_type": "nemotron-nas",
            "num_attention_heads": queries,
            "num_key_value_heads": groups,
        }
    )


def _attention(per_group: int, gone: bool) -> dict[str, Any]:
    """Return a block's entry for attention."""
    return {
        "no_op": gone,
        "replace_with_linear": False,
        "n_heads_in_group": None if gone else per_group,
    }
