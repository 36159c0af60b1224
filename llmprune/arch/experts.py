"""Experts of a mixture and the channels inside them: what moves with them, and how many must stay.

Experts are stacked on the first axis of their parameters, (E, 2F, D) and (E, D, F), or transposed;
or they are modules in a list, numbered. Rows and biases of the router, and what corrects its
choice, go with them. Legend: E experts, F channels of one, D hidden size, K kept units.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from llmprune.arch.couplings import EXPERT_CHANNELS, EXPERTS, Linears, Shapes
from llmprune.arch.limits import ACTIVE
from llmprune.arch.limits import EXPERTS as COUNT_KEYS
from llmprune.arch.types import Coupling, Mixture, Span
from llmprune.base.errors import UnsupportedModel

WIDTH_KEYS = ("moe_intermediate_size", "expert_intermediate_size", "expert_ffn_hidden_size",
              "intermediate_size", "ffn_dim")  # fmt: skip
SHARED_KEYS = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
WIDE, NARROW = ("gate_proj", "up_proj", "w1", "w3"), ("down_proj", "w2")
COUNT_SIZES = ("num_experts", "num_local_experts", "n_routed_experts", "out_features")
WIDTH_SIZES = ("intermediate_dim", "intermediate_size", "ffn_dim")
MULTIPLE = 8  # grouped products want rows of a multiple of 16 bytes, which 8 channels have in bf16

NUMBERED = re.compile(r"^(.*\bexperts)\.(\d+)(?=\.)")
PER_EXPERT = re.compile(r"(expert|score|correction)\w*(bias|scale)$")


def mixture_of(config: Any) -> Mixture | None:
    """Return what a config says of its mixtures; None where it counts no experts."""
    data = config.get_text_config(decoder=True).to_dict()
    numbers = {key: n for key, n in data.items() if isinstance(n, int) and n > 0}
    count_key = next((key for key in COUNT_KEYS if key in numbers), None)
    if count_key is None:
        return None
    grouped = data.get("topk_method") != "greedy" and {"n_group", "topk_group"} <= numbers.keys()
    return Mixture(
        num_experts=numbers[count_key],
        count_key=count_key,
        active=next((numbers[key] for key in ACTIVE if key in numbers), 1),
        widths=tuple((key, numbers[key]) for key in WIDTH_KEYS if key in numbers),
        num_shared=next((numbers[key] for key in SHARED_KEYS if key in numbers), 0),
        apart=any(
            "share" in key and key.endswith(("intermediate_size", "_dim")) for key in numbers
        ),
        num_groups=numbers["n_group"] if grouped else 1,
        top_groups=numbers["topk_group"] if grouped else 1,
        # a group is known by its best expert where the config says so, else by its best two
        least=2 if grouped and data.get("topk_method") != "group_limited_greedy" else 1,
    )


def fewest_experts(mixture: Mixture) -> int:
    """Return the fewest experts with which a mixture still runs; it keeps a multiple of its groups.

    >>> fewest_experts(Mixture(num_experts=8, count_key="num_experts", active=3, widths=()))
    3
    """
    in_group = max(mixture.least, math.ceil(mixture.active / mixture.top_groups))
    return mixture.num_groups * in_group


def expert_couplings(
    mixture: Mixture | None, linears: Linears, shapes: Shapes, routers: Collection[str]
) -> tuple[tuple[Coupling, ...], dict[str, str]]:
    """Return the couplings of a block's experts, and for kinds of unit that it lacks the reason.

    One coupling has experts as units. Of channels there is one coupling per expert, and one for the
    shared experts where the same entry of the config counts theirs: all must lose equally many. A
    block without routed experts has none. `routers` are the names of what chooses experts.
    """
    experts = experts_of(linears)
    if not experts:
        return (), {}
    if (reason := _odd_experts(mixture, len(experts), linears)) is not None or mixture is None:
        return (), dict.fromkeys((EXPERTS, EXPERT_CHANNELS), str(reason))
    found: list[Coupling] = []
    lacks: dict[str, str] = {}
    try:
        found.append(_whole(mixture, experts, linears, shapes, routers))
    except UnsupportedModel as error:
        lacks[EXPERTS] = str(error)
    try:
        found += _channels(mixture, experts, linears)
    except UnsupportedModel as error:
        lacks[EXPERT_CHANNELS] = str(error)
    return tuple(found), lacks


def experts_of(linears: Linears) -> dict[int, list[str]]:
    """Return the linears of every routed expert."""
    experts: dict[int, list[str]] = {}
    for name, linear in linears.items():
        match = NUMBERED.match(name)
        expert = linear.expert if linear.expert is not None else int(match[2]) if match else None
        if expert is not None:
            experts.setdefault(expert, []).append(name)
    return dict(sorted(experts.items()))


def _odd_experts(mixture: Mixture | None, num_experts: int, linears: Linears) -> str | None:
    """Say why the experts of a block are not one mixture that the config speaks of."""
    if mixture is None or num_experts != mixture.num_experts:
        counted = f"{mixture.num_experts} of them" if mixture else "none"
        return f"it has {num_experts} experts where its config counts {counted}"
    owners = {parent_of(home) for home in homes_of(linears)}
    if len(owners) > 1:
        return f"its experts belong to more than one mixture: {', '.join(sorted(owners))}"
    return None


def _whole(
    mixture: Mixture,
    experts: Mapping[int, list[str]],
    linears: Linears,
    shapes: Shapes,
    routers: Collection[str],
) -> Coupling:
    """Return the coupling whose units are experts.

    Raises:
        UnsupportedModel: no router is found, or a tensor that is not known goes with experts.
    """
    num_experts = mixture.num_experts
    rows = {name for name in routers if name in shapes and "shared" not in name}
    rows = {name for name in rows if len(shapes[name]) == 2 and shapes[name][0] == num_experts}
    if not rows:
        raise UnsupportedModel(f"no router with a row for each of its {num_experts} experts")
    roots = {root_of(name, owner_of(linears)) for name in rows}
    homes = homes_of(linears) | roots
    stacked = {linear.param for linear in linears.values()}
    names = [
        name for name in axes_by_expert(shapes, num_experts, homes, linears) if name not in stacked
    ]
    paths = {owner_of(linears), *homes, *map(parent_of, rows)} - {"", *rows}
    return Coupling(
        name=EXPERTS,
        spans=tuple(
            Span(linear=name, axis="all", unit=expert)
            for expert, members in experts.items()
            for name in members
        ),
        num_units=num_experts,
        num_groups=mixture.num_groups,
        least=fewest_experts(mixture),
        config_keys=((mixture.count_key, 1),),
        vectors=tuple((name, 1) for name in names),
        module_sizes=tuple((path, key, 1) for path in sorted(paths) for key in COUNT_SIZES),
    )


def _channels(
    mixture: Mixture, experts: Mapping[int, list[str]], linears: Linears
) -> list[Coupling]:
    """Return the couplings whose units are channels: of every expert, and of the shared ones.

    A unit of n shared experts, which lie in one FFN of n times the width, is n channels.

    Raises:
        UnsupportedModel: their linears or the entry that counts their channels are not known.
    """
    spans = {expert: _spans(members, linears) for expert, members in experts.items()}
    widths = {linears[found[-1].linear].shape[1] for found in spans.values()}
    key = next((key for key, width in mixture.widths if {width} == widths), None)
    if key is None:
        raise UnsupportedModel(f"no entry of its config counts the {sorted(widths)} channels")
    width = widths.pop()
    paths = sorted(homes_of(linears))
    sizes = [(path, name, 1) for path in paths for name in WIDTH_SIZES]
    groups = [(str(expert), spans[expert], 1) for expert in experts]
    if shared := _shared(mixture, width, linears):
        groups.append(("shared", *shared))
    return [
        Coupling(
            name=f"{EXPERT_CHANNELS}.{which}",
            spans=tuple(found),
            num_units=width,
            grid=MULTIPLE,
            config_keys=((key, 1),),
            module_sizes=(*sizes, *_features(found, linears, times)),
        )
        for which, found, times in groups
    ]


def _shared(mixture: Mixture, width: int, linears: Linears) -> tuple[list[Span], int] | None:
    """Return the channels of shared experts, and how many a unit has, where they move as well.

    Raises:
        UnsupportedModel: their width is no multiple of the routed experts'.
    """
    owner = owner_of(linears)
    names = [
        name
        for name, linear in linears.items()
        if linear.expert is None and "shared" in name and name.startswith(owner)
    ]
    if mixture.apart or not names:
        return None
    whole = linears[_spans(names, linears)[-1].linear].shape[1]
    times = mixture.num_shared or max(1, whole // width)
    if whole != times * width:
        raise UnsupportedModel(
            f"its shared experts have {whole} channels, which is not {times} times the {width} of "
            "the others, and no entry of its config counts them"
        )
    return _spans(names, linears, times=times), times


def _spans(members: Iterable[str], linears: Linears, *, times: int = 1) -> list[Span]:
    """Return the rows of gate and up and, last, the columns of down that a channel owns.

    Raises:
        UnsupportedModel: the linears are not known to be these.
    """
    names = list(members)
    wide = [name for name in names if name.rpartition(".")[2] in WIDE]
    narrow = [name for name in names if name.rpartition(".")[2] in NARROW]
    sizes = {linears[name].shape[0] for name in wide}
    known = len(wide) + len(narrow) == len(names) and len(narrow) == 1 and len(sizes) == 1
    if not known or linears[narrow[0]].shape[1] not in sizes:
        raise UnsupportedModel(
            f"its experts' linears {', '.join(sorted(names))} are not known as gate, up and down"
        )
    rows = [Span(linear=name, axis="out", width=times) for name in wide]
    return [*rows, Span(linear=narrow[0], axis="in", width=times)]


def _features(
    spans: Iterable[Span], linears: Linears, times: int
) -> Iterator[tuple[str, str, int]]:
    """Yield the sizes that modules hold of linears that are modules of their own."""
    for span in spans:
        if linears[span.linear].param == f"{span.linear}.weight":
            yield span.linear, "out_features" if span.axis == "out" else "in_features", times
            yield from ((parent_of(span.linear), name, times) for name in WIDTH_SIZES)


def homes_of(linears: Linears) -> set[str]:
    """Return the modules that hold the routed experts."""
    homes = {parent_of(one.param) for one in linears.values() if one.expert is not None}
    return homes | {match[1] for name in linears if (match := NUMBERED.match(name))} - {""}


def owner_of(linears: Linears) -> str:
    """Return the path of the mixture, which its experts' modules are parts of."""
    return parent_of(min(homes_of(linears)))


def root_of(name: str, owner: str) -> str:
    """Return the part of a mixture that a router's parameter lies in.

    >>> root_of("mlp.router.gate.weight", "mlp"), root_of("router.proj.weight", "")
    ('mlp.router', 'router')
    """
    start = f"{owner}." if owner else ""
    return start + name.removeprefix(start).partition(".")[0]


def axes_by_expert(
    shapes: Shapes, num_experts: int, homes: Collection[str], linears: Linears
) -> dict[str, int]:
    """Return what has an entry per expert, with the axis: of the stacks, the router, beside it.

    Raises:
        UnsupportedModel: something of the mixture has one, and is not known.
    """
    owner = owner_of(linears)
    plain = {linear.param for linear in linears.values() if linear.expert is None}
    axes: dict[str, int] = {}
    for name, shape in shapes.items():
        numbered = NUMBERED.match(name)
        if name in plain or (numbered and numbered[1] in homes) or num_experts not in shape:
            continue
        inside = any(f"{name}.".startswith(f"{home}.") for home in homes)
        beside = PER_EXPERT.search(name) is not None and name.startswith(owner)
        if not inside and not beside and not (owner and name.startswith(f"{owner}.")):
            continue
        if "shared" in name.removeprefix(owner):
            continue
        axis = 0 if shape[0] == num_experts else len(shape) - 1
        whole = axis == 0 or math.prod(shape) == num_experts
        if not whole or not (inside or beside):
            raise UnsupportedModel(
                f"{name} {list(shape)} may have an entry for each of its {num_experts} experts, "
                "and it is not known which: an expert cannot go without it"
            )
        axes[name] = axis
    return axes


def parent_of(name: str) -> str:
    """Return the path of the module that holds a parameter."""
    return name.rpartition(".")[0]
