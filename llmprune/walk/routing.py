"""Watching a mixture: which experts tokens are sent to, with what weight, and what they answer.

The module that holds the experts is asked itself: its own forward, given the tokens of one expert
and the weight 1, returns that expert's output, whatever its activation, biases and layout are.
Legend: T tokens, K experts of one token, E experts, N pairs of a token and an expert of its.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from llmprune.arch.experts import NUMBERED, experts_of
from llmprune.base.errors import NumericalError, UnsupportedModel, first_line
from llmprune.calibration.replay import call
from llmprune.stats.routing import GATES, ROUTING, RoutingSums
from llmprune.stats.types import Stats
from llmprune.walk.block import Block
from llmprune.walk.forward import Stream

if TYPE_CHECKING:
    from torch import Tensor, nn


class _Complete(Exception):
    """Leaves a block once its experts have been asked."""


def observe_routing(block: Block, stream: Stream, needs: Iterable[str] = ROUTING) -> Stats:
    """Return what the block's routed experts do with all micro-batches, by name, float64 (E,).

    Hidden states and block are left as they are. Experts that are modules in a list show no gates.

    Raises:
        UnsupportedModel: the block has no routed experts, or they are not called as expected.
        NumericalError: an expert's output or gate is not finite.
    """
    experts = experts_of(block.anatomy.linears)
    if not experts:
        raise UnsupportedModel(
            f"block {block.index} has no routed experts, so no routing can be learnt of it: leave "
            "it out."
        )
    sums = RoutingSums(len(experts))
    members = _numbered(block, len(experts))
    if members and (hidden := sorted(set(needs) & set(GATES))):
        raise UnsupportedModel(
            f"the experts of block {block.index} are modules in a list, whose gates are applied "
            f"out of sight: {', '.join(hidden)} cannot be learnt. Score by frequency or ean."
        )
    watched = _each(members, sums) if members else _together(_home(block), block, sums)
    with torch.no_grad(), watched:
        for batch, arguments in enumerate(stream.arguments):
            hidden_BTD = stream.hidden.get(batch, block.device)
            try:
                call(block.module, hidden_BTD, arguments[block.index])
            except _Complete:
                continue
            if members:
                sums.num_tokens += hidden_BTD.shape[:-1].numel()  # no expert sees all of them
    stats = sums.result()
    _check(block, stats)
    return stats


@contextmanager
def _together(home: nn.Module, block: Block, sums: RoutingSums) -> Iterator[None]:
    """Ask the module that holds all experts, each time it is called; leave the block there."""

    def ask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden_TD, expert_TK, gate_TK = _called_with(module.forward, args, kwargs, block)
        wide = torch.promote_types(hidden_TD.dtype, torch.float32)
        norm_TK = torch.zeros(expert_TK.shape, dtype=wide, device=hidden_TD.device)
        largest_TK = torch.zeros_like(norm_TK)
        for expert in range(sums.num_experts):
            where = (expert_TK == expert).nonzero(as_tuple=True)
            if count := len(where[0]):
                output_ND = _asked(
                    module.forward,
                    hidden_TD[where[0]],
                    expert_TK.new_full((count, 1), expert),
                    gate_TK.new_ones((count, 1)),
                )
                norm_TK[where], largest_TK[where] = _sizes(output_ND)
        sums.update(expert_TK, norm_TK, largest_TK, gate_TK)
        raise _Complete

    hook = home.register_forward_pre_hook(ask, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _asked(forward: Callable[..., Any], hidden_ND: Tensor, *chosen: Tensor) -> Tensor:
    """Return what one expert answers.

    Raises:
        UnsupportedModel: the experts cannot be asked for one of them.
    """
    try:
        found: Tensor = forward(hidden_ND, *chosen)
    except (IndexError, TypeError, ValueError) as error:  # reshaped for several experts per token
        raise UnsupportedModel(
            f"experts cannot be asked one at a time ({first_line(error)}), so what each does "
            "cannot be learnt. Score their weights alone."
        ) from error
    return found


@contextmanager
def _each(members: list[nn.Module], sums: RoutingSums) -> Iterator[None]:
    """Watch what every expert returns, where each is a module."""

    def note(expert: int, output: Tensor) -> None:
        norm_N, largest_N = _sizes(output.reshape(-1, output.shape[-1]))
        expert_N = torch.full(norm_N.shape, expert)
        sums.update(expert_N[:, None], norm_N[:, None], largest_N[:, None], num_tokens=0)

    hooks = [
        member.register_forward_hook(lambda module, args, output, e=expert: note(e, output))
        for expert, member in enumerate(members)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _called_with(
    forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], block: Block
) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden_TD, expert_TK and gate_TK that an experts' module is called with.

    Raises:
        UnsupportedModel: it is called with something else.
    """
    given = list(inspect.signature(forward).bind(*args, **kwargs).arguments.values())
    if len(given) == 3 and all(isinstance(value, torch.Tensor) for value in given):
        hidden_TD = given[0].reshape(-1, given[0].shape[-1])
        expert_TK, gate_TK = (value.reshape(-1, value.shape[-1]) for value in given[1:])
        chosen = not expert_TK.is_floating_point() and gate_TK.is_floating_point()
        if chosen and expert_TK.shape == gate_TK.shape and len(expert_TK) == len(hidden_TD):
            return hidden_TD, expert_TK, gate_TK
    shapes = [list(value.shape) if isinstance(value, torch.Tensor) else value for value in given]
    raise UnsupportedModel(
        f"the experts of block {block.index} are called with {shapes}, not with hidden states, the "
        "numbers of each token's experts and their gates: what they do cannot be learnt. Score "
        "their weights alone."
    )


def _home(block: Block) -> nn.Module:
    """Return the module that holds the block's stacked experts.

    Raises:
        UnsupportedModel: there are several.
    """
    linears = block.anatomy.linears.values()
    homes = {one.param.rpartition(".")[0] for one in linears if one.expert is not None}
    if len(homes) != 1:
        raise UnsupportedModel(
            f"the experts of block {block.index} lie in {', '.join(sorted(homes))}: only those of "
            "one module can be asked. Score their weights alone."
        )
    found: nn.Module = block.module.get_submodule(homes.pop())
    return found


def _numbered(block: Block, num_experts: int) -> list[nn.Module]:
    """Return the experts where they are modules in a list; nothing where they are stacked."""
    linears = block.anatomy.linears.values()
    if any(one.expert is not None for one in linears):
        return []
    home = next(match[1] for one in linears if (match := NUMBERED.match(one.name)))
    return [block.module.get_submodule(f"{home}.{expert}") for expert in range(num_experts)]


def _sizes(output_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Return norm and largest absolute value of every row, float32 or wider."""
    wide_ND = output_ND.to(torch.promote_types(output_ND.dtype, torch.float32))
    return torch.linalg.vector_norm(wide_ND, dim=-1), wide_ND.abs().amax(-1)


def _check(block: Block, stats: Stats) -> None:
    """Check that experts were asked, and answered with numbers.

    Raises:
        UnsupportedModel, NumericalError: they did not.
    """
    if not stats.values:
        raise UnsupportedModel(
            f"the experts of block {block.index} were never called as a module: this transformers "
            "runs them in a way that is not watched. Install the version that constraints.txt "
            "names."
        )
    for name, value_E in stats.values.items():
        if not torch.isfinite(value_E).all():
            raise NumericalError(
                f"an expert of block {block.index} answers with NaN or infinity ({name}). In "
                "float16 large activations overflow: use --dtype bfloat16 or float32; otherwise "
                "the checkpoint is damaged."
            )
