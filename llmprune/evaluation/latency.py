"""Measured seconds of one decoder block of given sizes, and of what is around the blocks.

A budget of latency is kept with these numbers: a forward takes about its trunk and the sum of its
blocks. Blocks have random weights and need no checkpoint; all candidates look into one pool of
numbers, so that any number of them takes the memory of the largest. Before every timed call the
processor's caches are flushed, since in a whole model each block's weights come from memory.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from llmprune.arch.limits import longest_sequence
from llmprune.base.errors import (
    LlmpruneError,
    RecipeError,
    TooLarge,
    UnsupportedModel,
    first_line,
)
from llmprune.checkpoint.skeleton import tie
from llmprune.evaluation.single_block import Phase, Pool, block_call, build, trunk_call

if TYPE_CHECKING:
    import torch

Sizes = Mapping[str, int]
WARM_UPS = 2
FLUSHED = 2**28  # bytes, where the size of the last cache is not known
LAST_CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")


def latency_table(
    config: Any,
    candidates: Sequence[Sizes],
    *,
    device: torch.device,
    dtype: torch.dtype,
    batch: int = 1,
    prompt: int = 128,
    phase: Phase = "decode",
    block: int = 0,
    repeat: int = 7,
    trust_remote_code: bool = False,
) -> list[float]:
    """Return the seconds that one decoder block takes, per candidate.

    Args:
        config: of the model: an object, or its data.
        candidates: keys of the config and their numbers, such as `{"intermediate_size": 2816}`;
            `{}` is the block as it is.
        phase: "decode" is one token per sequence with a cache of `prompt` tokens; "prefill" is
            `prompt` tokens at once.
        block: which block, where a model has several kinds.
        repeat: timed rounds. In each, every candidate has its turn; the order turns every round.

    Raises:
        RecipeError: a number below 1, an unknown key, or sizes that do not go together.
        UnsupportedModel: a block of this family cannot be run on its own.
        TooLarge: the memory of the device is full.
    """
    _check_counts(batch=batch, prompt=prompt, repeat=repeat)
    base = _config(config)
    _check_length(base, prompt + (phase == "decode"))
    pool = Pool(device, dtype)
    built = []
    for sizes in candidates:
        with _in_words(base, sizes):
            built.append(build(_changed(base, sizes), dtype, trust_remote_code))
            pool.add(built[-1].blocks[block])
    calls = []
    with _in_words(base):
        pool.fill()
    for sizes, one in zip(candidates, built, strict=True):
        with _in_words(base, sizes):
            calls.append(block_call(one, block, device, batch, prompt, phase))
    del built
    return _medians(calls, repeat, device)


def trunk_latency(
    config: Any,
    *,
    device: torch.device,
    dtype: torch.dtype,
    batch: int = 1,
    prompt: int = 128,
    phase: Phase = "decode",
    repeat: int = 7,
    trust_remote_code: bool = False,
) -> float:
    """Return the seconds of a forward without its blocks: embeddings, final norm and head.

    Arguments and errors are those of `latency_table`. Of a prompt, the logits of the last token are
    computed, as generation does.
    """
    _check_counts(batch=batch, prompt=prompt, repeat=repeat)
    base = _config(config)
    _check_length(base, prompt + (phase == "decode"))
    with _in_words(base):
        built = build(base, dtype, trust_remote_code)
        pool = Pool(device, dtype)
        pool.add(built.model, outside=built.blocks)
        pool.fill()
        tie(built.model)
        call = trunk_call(built, device, batch, prompt if phase == "prefill" else 1)
        call()
    return _medians([call], repeat, device)[0]


def _medians(
    calls: Sequence[Callable[[], float]], repeat: int, device: torch.device
) -> list[float]:
    """Return the median of every call's seconds; calls take turns, the order turns every round."""
    import torch

    rows: list[list[float]] = [[] for _ in calls]
    flush = torch.zeros(_flushed_bytes(device), dtype=torch.uint8, device=device)
    order = list(range(len(calls)))
    for call in calls:
        for _ in range(WARM_UPS):
            call()
    for turn in range(repeat):
        for place in order[::-1] if turn % 2 else order:
            calls[place]()  # the code is as warm as in a model that runs, and the weights are not
            flush.add_(1)
            rows[place].append(calls[place]())
    return [median(row) for row in rows]


def _flushed_bytes(device: torch.device) -> int:
    """Return the bytes to touch so that nothing stays in the device's last cache."""
    import torch

    if device.type == "cuda":
        return 2 * int(torch.cuda.get_device_properties(device).L2_cache_size or FLUSHED)
    with suppress(OSError, ValueError):
        return min(2**30, 2 * 1024 * int(LAST_CACHE.read_text().strip().removesuffix("K")))
    return FLUSHED


def _config(config: Any) -> Any:
    """Return a config as an object."""
    from transformers import AutoConfig

    if not isinstance(config, Mapping):
        return config
    data = dict(config)
    return AutoConfig.for_model(data.pop("model_type"), **data)


def _changed(config: Any, sizes: Sizes) -> Any:
    """Return a copy of a config with other sizes.

    Raises:
        RecipeError: it has no such key, or a number is below 1.
    """
    changed = copy.deepcopy(config)
    for key, number in sizes.items():
        if not hasattr(config, key):
            near = difflib.get_close_matches(key, config.to_dict(), 1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise RecipeError(
                f"candidates: {key!r} is no key of a {config.model_type} config.{hint} Give keys "
                "of config.json that are sizes of a block."
            )
        if number < 1:
            raise RecipeError(
                f"candidates: {key} {number} leaves nothing to run. Give 1 or more, and leave "
                "blocks without it out."
            )
        setattr(changed, key, number)
    return changed


def _check_counts(**counts: int) -> None:
    """Check that there is something to measure."""
    for name, count in counts.items():
        if count < 1:
            raise RecipeError(f"{name}: {count} measures nothing. Give 1 or more.")


def _check_length(config: Any, tokens: int) -> None:
    """Check that a model takes so many tokens."""
    longest = longest_sequence(config)
    if longest is not None and tokens > longest:
        raise RecipeError(
            f"prompt: {tokens} tokens are more than this {config.model_type} takes, which is "
            f"{longest}. Give fewer, such as {longest // 2}."
        )


@contextmanager
def _in_words(config: Any, sizes: Sizes | None = None) -> Iterator[None]:
    """Let what a model's own code raises end as an error that says which sizes it was given."""
    try:
        yield
    except LlmpruneError:
        raise
    except Exception as error:  # code of any family, run on sizes that nobody has tried
        line = first_line(error)
        if "out of memory" in line.lower() or "can't allocate memory" in line:
            raise TooLarge(
                f"latency: no memory for a block of {dict(sizes or {})} ({line}). Give a smaller "
                "batch or prompt, or bfloat16."
            ) from error
        if sizes:
            raise RecipeError(
                f"candidates: a block of {dict(sizes)} cannot run ({line}). Sizes must go "
                "together: query heads in equal groups per key-value head, for one."
            ) from error
        raise UnsupportedModel(
            f"latency: a block of {config.model_type} cannot be run on its own ({line}). Give a "
            "budget of parameters instead."
        ) from error
