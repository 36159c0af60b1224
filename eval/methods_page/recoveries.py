"""What training there is after a cut or around it: methods, schedules, masks, teachers."""

from __future__ import annotations

from typing import Any

from eval.methods_page.text import cited, filled, item, linked, names, says, table, values
from llmprune.recovery.distillation import DISTILLATIONS
from llmprune.recovery.methods import RECOVERIES
from llmprune.recovery.regrowth import REGROWTHS
from llmprune.recovery.schedules import SCHEDULES
from llmprune.recovery.soft import SOFT_MASKS
from llmprune.report.offer import zeros_stay

AT = {
    "forward": "a forward pass computes with them",
    "update": "they replace the weights after each step of the optimizer",
}
TEACHES = {"logits": "the next-token distribution", "hidden": "the outputs of blocks"}


def recoveries() -> str:
    """Return what a recovery trains, and what that does to zeros."""
    text = (
        "`llmprune recover DIR`, or `- recover: {}` after a step that prunes, trains a result as a "
        "whole on the loss of the next token, and writes a folder of its own that is proven as "
        "pruned ones are. What was removed stays removed: the masks that lie beside the weights "
        "say what that is. Ask for a method with `--method NAME`; without one it is `mask-lora` "
        "where there are masks and `lora` where tensors got smaller. The report says how far the "
        "stored model is from the trained one."
    )
    head = ("method", "trains", "zeros stay", "norms too", "rank", "learning rate")
    rows = [
        (
            f"`{name}`",
            row.summary,
            zeros_stay(row),
            "yes" if "norms" in row.trains else "no",
            str(row.rank) if row.adapter else "",
            f"{row.learning_rate:g}",
        )
        for name, row in RECOVERIES.items()
    ]
    lines = [
        paper(name, f"{row.title}.", row.paper, row.options) for name, row in RECOVERIES.items()
    ]
    return section("Recovery", text, table(head, rows), lines)


def schedules() -> str:
    """Return how sparsity rises while a model is trained."""
    text = (
        "With `recover.prune` weights go while all are trained; `recover.schedule` says how "
        "sparsity rises over `recover.window`, a part of the run, with a cut every `recover.every` "
        "steps. N:M is cut at once, or by `staircase` in rungs that lead to it. Keys of "
        "`recover.prune` are those of a step that prunes, but for targets. With `recover.rewind` "
        "there are `recover.rounds` cuts instead, and after each the kept weights, or the learning "
        "rate, are as they were at first. With `recover.fade` what goes is decided once, where the "
        "window begins, and is gone where it ends: on a line to zero (`march`), or drawn there by "
        "its gradients (`pull`, of whole units)."
    )
    head = ("schedule", "window", "options")
    rows = [
        (f"`{name}`", f"{row.window[0]:g} to {row.window[1]:g}", values(row.options))
        for name, row in SCHEDULES.items()
    ]
    lines = [paper(name, f"{row.summary}.", row.paper) for name, row in SCHEDULES.items()]
    return section("Schedules", text, table(head, rows), lines)


def regrowths() -> str:
    """Return how weights are exchanged while a model is trained."""
    text = (
        "`recover.regrow` exchanges weights every `recover.every` steps: kept ones of the smallest "
        "magnitude are dropped and as many removed ones grow, at their first values or at zero "
        "(`recover.grow_from`), so that counts stay."
    )
    lines = [
        paper(
            name,
            says(row.fn) + (" Needs dense gradients." if row.needs_gradient else ""),
            row.paper,
        )
        for name, row in REGROWTHS.items()
    ]
    return section("Regrowth", text, "", lines)


def soft_masks() -> str:
    """Return the masks that are soft until the end."""
    text = (
        "`recover.soft` lets what goes fade instead of being cut: values that stand for the "
        "weights are computed from them, and the mask is by magnitude. The last mask is hard, "
        "whatever came before. Numbers are `recover.options`."
    )
    head = ("soft mask", "where", "options")
    rows = [(f"`{name}`", AT[row.at], values(row.options)) for name, row in SOFT_MASKS.items()]
    lines = [paper(name, says(row.fn), row.paper) for name, row in SOFT_MASKS.items()]
    return section("Soft masks", text, table(head, rows), lines)


def distillations() -> str:
    """Return what a teacher's loss compares."""
    text = (
        "`recover.distill` draws the model towards the dense one that it was made from, whose "
        "answers to the training text are computed once, block by block, before training begins. "
        "Where nothing is said it is `kl`, if that model is still where it was; `none` leaves it. "
        "One name, or two with a plus, such as `kl+hidden`: of two the second counts as much as "
        "the first does where training begins. `recover.distill_weight` is the teacher's share of "
        "the loss."
    )
    lines = [
        paper(name, f"{says(row.fn)} Compares {TEACHES[row.needs]}.", row.paper)
        for name, row in DISTILLATIONS.items()
    ]
    return section("Distillation", text, "", lines)


def section(title: str, text: str, rows: str, lines: list[str]) -> str:
    """Return a section: what it is about, a table where there is one, an item for each name."""
    middle = f"{rows}\n" if rows else ""
    return f"## {title}\n\n{filled(text)}\n\n{middle}" + "\n".join([*lines, ""])


def paper(name: str, text: str, source: str, options: Any = ()) -> str:
    """Return an item: the name, what it does, its options, where it comes from."""
    extra = [f"Options: {values(options)}."] if options else []
    where = cited(source) or ([f"Paper: {linked(source)}."] if source else [])
    return item(" ".join([f"`{name}`: {text}", *extra, *where]))


def known() -> dict[str, str]:
    """Return the names of each table, for the questions."""
    return {
        "recoveries": names(RECOVERIES),
        "schedules": names(SCHEDULES),
        "regrowths": names(REGROWTHS),
        "soft_masks": names(SOFT_MASKS),
        "distillations": names(DISTILLATIONS),
    }
