"""What of a page was measured: perplexity, tasks, speed, and the losses of trainings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmprune.base.progress import human_bytes
from llmprune.pages.charts import bars, lines
from llmprune.pages.document import Section, paragraph, preformatted, side_by_side, together
from llmprune.pages.tables import facts, table
from llmprune.report.evaluations import Measured, measured
from llmprune.report.recoveries import (
    loss_text,
    merge_text,
    recoveries_of,
    shaping_words,
    sides,
    trained_text,
)

MOST_BARS = 24


def perplexity_part(data: Mapping[str, Any], later: Mapping[str, Any]) -> Section:
    """Return the perplexities of dense and pruned model, with how they were measured."""
    found = [one for one in measured(data, later) if not _is_task(one, later)]
    if not found:
        return Section(
            "Perplexity",
            together(
                [
                    paragraph("None was measured. This measures it:"),
                    _ask(data, "eval {}", "Command"),
                ]
            ),
        )
    both = sides(data)
    parts = []
    if len(both) > 1:
        names, values = zip(*((s.label, float(s.entry["value"])) for s in both), strict=True)
        parts.append(
            bars(
                f"Perplexity of {both[-1].entry['data']}, lower is better",
                names,
                {"perplexity": values},
                text=lambda value: f"{value:.3f}",
            )
        )
    return Section("Perplexity", together([*parts, _beside(data, found, "Perplexity")]))


def tasks_part(data: Mapping[str, Any], later: Mapping[str, Any]) -> Section | None:
    """Return the scores of tasks; None where none was asked."""
    found = [one for one in measured(data, later) if _is_task(one, later)]
    if not found:
        return None
    shown = [one for one in found if one.dense is not None and 0 <= one.value <= 1][:MOST_BARS]
    parts = []
    if shown:
        parts.append(
            bars(
                "Scores of tasks",
                [one.what for one in shown],
                {"dense": [one.dense for one in shown], "pruned": [one.value for one in shown]},
                text=lambda value: f"{value:.3f}",
            )
        )
    return Section("Tasks", together([*parts, _beside(data, found, "Tasks")]))


def speed_part(later: Mapping[str, Any]) -> Section | None:
    """Return the last measurement of speed; None where there is none."""
    if not later.get("speed"):
        return None
    last = later["speed"][-1]
    models = [last[side] for side in ("against", "model") if last.get(side)]
    head = ("model", "batch", "prefill, tokens/s", "decode, tokens/s", "first token, ms", "memory")
    rows = [
        (
            *(str(model["name"]), f"{speed['batch']}"),
            *(f"{speed[what]['median']:.1f}" for what in ("prefill", "decode")),
            f"{1000 * speed['first_token']['median']:.1f}",
            human_bytes(speed["memory"]),
        )
        for model in models
        for speed in model["speeds"]
    ]
    where = f"{models[-1]['dtype']} on {models[-1]['device']}"
    lead = f"Medians of {last['repeat']} repetitions, {last['prompt']} tokens read, {last['new']} "
    return Section("Speed", table(head, rows), f"{lead}decoded, {where}.")


def training_part(data: Mapping[str, Any]) -> Section | None:
    """Return the course of every training; None where there was none."""
    found = recoveries_of(data)
    if not found:
        return None
    parts = []
    for one in found:
        history = one.record["history"]
        told = [trained_text(one), *shaping_words(one), loss_text(one), merge_text(one)]
        parts.append(facts([(one.name, "; ".join(filter(None, told)))]))
        taught = bool(one.wish.get("distill"))
        series = {"held out": history["held"]}
        series = series if taught else {"training": history["training"], **series}
        charts = [_losses(f"Loss of {one.name}", series, "nats per token")]
        if taught:
            own = {"training": history["training"]}
            charts.append(_losses("Training loss with the teacher's share", own, "loss"))
        parts.append(side_by_side(*charts))
    return Section("Training", together(parts))


def _losses(title: str, series: Mapping[str, Sequence[Any]], label: str) -> Any:
    found = {name: [tuple(pair) for pair in pairs] for name, pairs in series.items() if pairs}
    return lines(title, found, x_label="step", y_label=label, marks=False)


def _beside(data: Mapping[str, Any], found: Sequence[Measured], caption: str) -> Any:
    """Return a table of measurements, the dense model's beside the result's."""
    labels = [side.label for side in sides(data) if side.label != "dense"]
    has_before = any(one.before is not None for one in found)
    before = [labels[0]] if has_before else []
    result = labels[-1] if labels else "recovered" if data.get("recovery") else "pruned"
    rows = [
        (
            *(one.what, _number(one.dense, one.dense_stderr)),
            *(_number(one.before, None) for _ in before),
            *(_number(one.value, one.stderr), _change(one), one.protocol),
        )
        for one in found
    ]
    head = ("measured", "dense", *before, result, "change", "how")
    return table(head, rows, caption=caption)


def _is_task(one: Measured, later: Mapping[str, Any]) -> bool:
    """Tell whether a number is the score of a task."""
    return any(one.data in entry["tasks"] for entry in later.get("tasks", ()))


def _change(one: Measured) -> str:
    if not one.dense:
        return ""
    return f"{100 * (one.value / one.dense - 1):+.1f} %"


def _number(value: float | None, stderr: float | None) -> str:
    """Return a value with its standard error, as far as there are."""
    if value is None:
        return ""
    text = f"{value:.4f}" if abs(value) < 1 else f"{value:,.3f}"
    return text if stderr is None else f"{text} ± {stderr:.4f}"


def _ask(data: Mapping[str, Any], command: str, label: str) -> Any:
    return preformatted(f"llmprune {command.format(data['out'] or 'DIR')}", label=label)
