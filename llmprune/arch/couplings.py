"""The table of units: what of a block moves together, for every kind of unit that it has.

Legend: D hidden size, F channels, H query heads, G key/value heads, g = H / G, d values of a head.

| kind         | units | rows                                      | columns   | config counts |
|--------------|-------|-------------------------------------------|-----------|---------------|
| ffn-channels | F     | of gate and up (or of the one wide linear)| down      | F             |
| heads        | G     | g d of query, d of key, d of value        | g d of out| G, and g each |
| query-heads  | H     | d of query, as many in each of G groups   | d of out  | H             |
| attention    | 1     | the whole half                            |           |               |
| ffn          | 1     | the whole half                            |           |               |
| block        | 1     | both                                      |           | blocks        |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmprune.arch.types import Attention, Coupling, Family, Ffn, Heads, Linear, Span

CHANNELS, HEADS, QUERY_HEADS = "ffn-channels", "heads", "query-heads"
EXPERTS, EXPERT_CHANNELS = "experts", "expert-channels"
ATTENTION, FFN, BLOCK = "attention", "ffn", "block"
WIDTHS = (CHANNELS, HEADS, QUERY_HEADS, EXPERTS, EXPERT_CHANNELS)
DEPTHS = (ATTENTION, FFN, BLOCK)
PAIRS = "two linears stand in place of one; remove units first, then lower ranks"
PER_HEAD = ("sinks",)  # vectors with an entry per query head
Linears = Mapping[str, Linear]
Shapes = Mapping[str, tuple[int, ...]]


def heads_of(config: Any) -> Heads | None:
    """Return the heads that a config speaks of; None where it has none."""
    text = config.get_text_config(decoder=True)
    num_heads = getattr(text, "num_attention_heads", None) or getattr(text, "n_heads", None)
    hidden = getattr(text, "hidden_size", None) or getattr(text, "d_model", None)
    if not isinstance(num_heads, int) or not isinstance(hidden, int) or not num_heads:
        return None
    groups = getattr(text, "num_key_value_heads", None) or num_heads
    if hasattr(text, "multi_query"):  # falcon counts them only in its newer architecture
        newer = getattr(text, "new_decoder_architecture", False)
        groups = text.num_kv_heads if newer else 1 if text.multi_query else num_heads
    head_dim = getattr(text, "head_dim", None) or hidden // num_heads
    if not isinstance(groups, int) or num_heads % groups:
        return None
    differ = vars(config).get("_heterogeneity_spec") is not None
    return Heads(num_heads=num_heads, num_groups=groups, head_dim=head_dim, differ=differ)


def couplings_of(
    family: Family, linears: Linears, shapes: Shapes
) -> tuple[tuple[Coupling, ...], dict[str, str]]:
    """Return the couplings of a block, and for kinds of unit that it lacks the reason."""
    found: list[Coupling] = []
    why: dict[str, str] = {}
    for row in family.ffns:
        if all(name in linears for name in (*row.wide, row.narrow)):
            found.append(_channels(row, linears))
    for attention in family.attentions:
        names = {attention.query, attention.key, attention.value, attention.output}
        if names <= linears.keys():
            heads = _heads_here(attention, family.heads, linears)
            reason = _odd_heads(attention, heads, linears, shapes)
            if reason is not None:
                why[HEADS] = why[QUERY_HEADS] = reason
            elif heads is not None:
                found += _heads(attention, heads, linears, shapes)
    found += _halves(family, linears)
    if any(f"{name.removesuffix('.left')}.right" in linears for name in linears if ".left" in name):
        why |= dict.fromkeys({CHANNELS, HEADS, QUERY_HEADS} - {row.kind for row in found}, PAIRS)
    return tuple(found), why


def _channels(row: Ffn, linears: Linears) -> Coupling:
    """Return the channels of a feed-forward half."""
    num_units = linears[row.narrow].shape[1]
    spans = [
        Span(linear=name, axis="out", offset=part * num_units)
        for name in row.wide
        for part in range(row.parts)
    ]
    owner = row.narrow.rpartition(".")[0]
    sizes = [(name, key, row.parts) for name in row.wide for key in ("out_features", "nf")]
    sizes += [(row.narrow, key, 1) for key in ("in_features", "nx")]
    sizes += [(owner, row.config_key, 1)] if owner and row.config_key else []
    return Coupling(
        name=CHANNELS,
        spans=(*spans, Span(linear=row.narrow, axis="in")),
        num_units=num_units,
        config_keys=((row.config_key, 1),) if row.config_key else (),
        module_sizes=tuple(sizes),
    )


def _heads_here(row: Attention, heads: Heads | None, linears: Linears) -> Heads | None:
    """Return the heads of a block: the model's, or where they differ those it has room for."""
    if heads is None or not heads.differ:
        return heads
    d = heads.head_dim
    num_heads = linears[row.output].shape[1] // d
    rows = linears[row.key].shape[0] // d
    num_groups = rows if row.layout == "apart" else (rows - num_heads) // 2
    whole = num_groups > 0 and num_heads % num_groups == 0
    return replace(heads, num_heads=num_heads, num_groups=num_groups) if whole else heads


def _odd_heads(row: Attention, heads: Heads | None, linears: Linears, shapes: Shapes) -> str | None:
    """Say why the heads of a block cannot be told apart, if they cannot."""
    if heads is None:
        return "its config counts no heads"
    queries, rest = heads.num_heads * heads.head_dim, heads.num_groups * heads.head_dim
    rows = {name: linears[name].shape[0] for name in (row.query, row.key, row.value)}
    expected = (
        {row.query: queries, row.key: rest, row.value: rest}
        if row.layout == "apart"
        else {row.query: queries + 2 * rest}
    )
    if rows != expected or linears[row.output].shape[1] != queries:
        return f"its attention is not {heads.num_heads} heads of {heads.head_dim} values"
    owner = row.query.rpartition(".")[0] + "."
    for param, shape in shapes.items():
        inside = param.startswith(owner) and len(shape) == 1 and not param.endswith("bias")
        if inside and shape[0] > heads.head_dim and shape[0] in (queries, rest):
            return f"{param} spans all heads, so no head can go without changing the others"
    return None


def _heads(row: Attention, heads: Heads, linears: Linears, shapes: Shapes) -> list[Coupling]:
    """Return key/value groups with their query heads, and query heads within their groups."""
    d, wide = heads.head_dim, heads.per_group * heads.head_dim
    queries, groups = heads.num_heads * d, heads.num_groups * d
    if row.layout == "apart":
        moved = [
            Span(linear=row.query, axis="out", width=wide),
            Span(linear=row.key, axis="out", width=d),
            Span(linear=row.value, axis="out", width=d),
        ]
    elif row.layout == "stacked":
        moved = [
            Span(linear=row.query, axis="out", width=wide),
            Span(linear=row.key, axis="out", width=d, offset=queries),
            Span(linear=row.value, axis="out", width=d, offset=queries + groups),
        ]
    else:
        moved = [Span(linear=row.query, axis="out", width=wide + 2 * d)]
    owner = row.output.rpartition(".")[0]
    vectors = [f"{owner}.{name}" for name in PER_HEAD if f"{owner}.{name}" in shapes]
    grouped = ((row.groups_key, 1),) if row.groups_key else ()
    pinned = ((row.dim_key, d),) if row.dim_key else ()
    counted = ("num_heads", "num_attention_heads", "n_head")
    rows = [(owner, key, heads.per_group) for key in counted]
    rows += [(owner, key, 1) for key in ("num_key_value_heads", "num_kv_heads")]
    found = [
        Coupling(
            name=HEADS,
            spans=(*moved, Span(linear=row.output, axis="in", width=wide)),
            num_units=heads.num_groups,
            config_keys=((row.heads_key, heads.per_group), *grouped),
            pinned=pinned,
            vectors=tuple((name, heads.per_group) for name in vectors),
            module_sizes=(*rows, *_features(row, wide, d)),
        )
    ]
    if heads.per_group > 1 and row.layout != "grouped":
        found.append(
            Coupling(
                name=QUERY_HEADS,
                spans=(
                    Span(linear=row.query, axis="out", width=d),
                    Span(linear=row.output, axis="in", width=d),
                ),
                num_units=heads.num_heads,
                num_groups=heads.num_groups,
                config_keys=((row.heads_key, 1),),
                pinned=pinned,
                vectors=tuple((name, 1) for name in vectors),
                module_sizes=tuple((owner, key, 1) for key in counted),
            )
        )
    return found


def _features(row: Attention, wide: int, d: int) -> tuple[tuple[str, str, int], ...]:
    """Return the sizes of the linears around the heads, as modules hold them."""
    if row.layout != "apart":
        whole = wide + 2 * d
        return ((row.query, "out_features", whole), (row.output, "in_features", wide))
    return (
        (row.query, "out_features", wide),
        (row.key, "out_features", d),
        (row.value, "out_features", d),
        (row.output, "in_features", wide),
    )


def _halves(family: Family, linears: Linears) -> list[Coupling]:
    """Return the halves of a block and the block, each as one unit.

    The attention half is what lies beside its output projection, the other half all else; a block
    without attention, or with linears of neither kind, has no halves.
    """
    whole = _one(BLOCK, tuple(linears))
    outputs = [row.output for row in family.attentions if row.output in linears]
    if not outputs:
        return [whole]
    root = outputs[0].partition(".")[0] + "."
    attention = tuple(name for name in linears if name.startswith(root))
    rest = tuple(name for name in linears if not name.startswith(root))
    halves = [_one(ATTENTION, attention)]
    if rest:
        halves.append(_one(FFN, rest))
    return [*halves, whole]


def _one(kind: str, names: tuple[str, ...]) -> Coupling:
    """Return a coupling of a single unit that owns linears whole."""
    spans = tuple(Span(linear=name, axis="all") for name in names)
    return Coupling(name=kind, spans=spans, num_units=1)
