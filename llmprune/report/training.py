"""What a model card says of training: in its summary, in a list, and of what it limits."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from llmprune.recovery.schedules import SCHEDULES
from llmprune.report.recoveries import (
    Recovery,
    cut_while_trained,
    is_pruned,
    last_wish,
    loss_text,
    merge_text,
    recoveries_of,
    shaping_words,
)


def training_words(data: Mapping[str, Any]) -> str:
    """Return by what methods a result was trained, in their order, and on how many tokens.

    Empty where it was not. A paper is cited once.
    """
    found = recoveries_of(data)
    if not found:
        return ""
    papers = [one.paper for one in found]
    named = ", then ".join(
        one.title + ("" if one.paper in papers[:place] else _cited(one.paper))
        for place, one in enumerate(found)
    )
    total = sum(one.record["tokens"] for one in found)
    return f"{named}, {total:,} tokens" + (" in all" if len(found) > 1 else "")


def training_sentence(data: Mapping[str, Any]) -> str:
    """Return when a pruned model was trained, and by what; empty where it was not."""
    words = training_words(data)
    if not words:
        return ""
    chain = data.get("run", {}).get("chain") or {}
    cuts = sum("prune" in step for step in chain.get("steps", ()))
    if last_wish(data) is None:
        when = "Before its last cut it was trained"
    elif cut_while_trained(data) is not None:
        when = "The training"
    else:
        when = (
            "Then it was trained" if cuts < 2 else "Between its cuts and after them it was trained"
        )
    return f" {when}: {words}."


def removal_kept(data: Mapping[str, Any]) -> str:
    """Return that what was removed stayed so in the last training; empty where there was none."""
    wish = last_wish(data)
    if wish is None or wish.get("prune"):
        return ""
    if is_pruned(data):
        stays = "zero" if data["form"] == "masked" else "out"
        return f" What had been removed stayed {stays}."
    if wish.get("masks") == "zeros":
        return " It had been pruned by another tool; what was zero stayed zero."
    return ""


def training_list(data: Mapping[str, Any]) -> str:
    """Return an item for each training: method, share, course, losses, the merge; and its teacher.

    Of what was asked for only the runs that made this result know.
    """
    return "\n".join(f"- {_item(one)}" for one in recoveries_of(data))


def limits_of_training(data: Mapping[str, Any]) -> str:
    """Return what a training does not show; empty where there was none."""
    if not data.get("recovery"):
        return ""
    return (
        "The training text shaped it: on text of another kind it may have lost what it gained on "
        "this. The dense model was not trained on the same text, so the numbers do not say how "
        "much of the gain is recovery and how much is further training."
    )


def linked(paper: str) -> str:
    """Return a reference whose arXiv number leads there."""
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", paper)


def _item(one: Recovery) -> str:
    record = one.record
    adapters = f" of rank {record['rank']}" if record.get("rank") else ""
    parts = [
        f"{one.title}{adapters}{_cited(one.paper)}: {record['trained']:,} numbers trained (the "
        f"model has {record['parameters']:,} parameters), {record['steps']:,} steps of "
        f"{record['batch']} x {record['seq_len']} tokens ({record['tokens']:,} in all), learning "
        f"rate {record['learning_rate']:g} ({record['decay']})",
        *_shaped(one),
        loss_text(one),
        merge_text(one),
    ]
    return "; ".join(filter(None, parts)) + "."


def _shaped(one: Recovery) -> list[str]:
    """Return what moved masks and who taught; a schedule with its paper."""
    words = shaping_words(one)
    schedule = SCHEDULES.get(str(one.wish.get("schedule")))
    if words and schedule is not None and words[0].endswith(f"schedule {one.wish['schedule']}"):
        words[0] += _cited(schedule.paper)
    return words


def _cited(paper: str) -> str:
    return f" ({linked(paper)})" if paper else ""
