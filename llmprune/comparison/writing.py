"""A comparison as text: the table for people, Markdown and CSV, and the protocol in sentences."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from llmprune.base.progress import human_bytes, human_seconds
from llmprune.base.text import columns, named_lines
from llmprune.comparison.rows import Row

HEAD = ("method", "asked", "reached", "kept", "perplexity", "x dense", "loss gap", "KL")

KL_IS = (
    "mean KL(dense || pruned) of the next token in nats, at the tokens that perplexity is of; its "
    "standard error is by windows, of several seeds the mean of both"
)


def cells_of(rows: Sequence[Row], dense: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the head and the rows of the table as text, the dense model first."""
    tasks = list(dense["tasks"])
    head = [*HEAD, *tasks, "seconds", "memory", ""]
    first = ["dense", "", "0.0000", f"{dense['parameters']:,}", f"{dense['perplexity']:.3f}"]
    first += ["1.000", "0.0000", "0.0000"]
    first += [*(score_text(*dense["tasks"][name]) for name in tasks), "", "", ""]
    body = [
        [
            *(row.method, row.asked, f"{row.sparsity:.4f}", f"{row.kept:,}"),
            *(row.perplexity.text(3), f"{row.ratio:.3f}", f"{row.gap:.4f}"),
            "" if row.kl is None else kl_text(*row.kl),
            *(score_text(*row.tasks[name]) if name in row.tasks else "" for name in tasks),
            *(f"{row.seconds:.1f}", human_bytes(row.memory), row.marks),
        ]
        for row in rows
    ]
    return head, [first, *body]


def score_text(value: float, error: float | None) -> str:
    """Return a task's score with its standard error."""
    return f"{value:.5g}" if error is None else f"{value:.4f} ± {error:.4f}"


def kl_text(value: float, error: float | None) -> str:
    """Return a mean KL in nats per token with its standard error.

    >>> kl_text(0.25, 0.01), kl_text(0.25, None)
    ('0.2500 ± 0.0100', '0.2500')
    """
    return f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")


def table_text(data: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """Return the aligned table."""
    return columns(*cells_of(rows, data["dense"]))


def comparison_text(data: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """Return the table, what could not be done, and the protocol."""
    parts = [table_text(data, rows), *failures(data), named_lines(protocol_lines(data))]
    return "\n\n".join(parts)


def failures(data: Mapping[str, Any]) -> list[str]:
    """Return a paragraph of cells that failed, and one of those that were left out, if any."""
    failed = [
        f"failed: {cell['name']}: {cell['error']['message']}"
        for cell in data["cells"]
        if "error" in cell
    ]
    skipped = [f"left out: {cell['name']}: {cell['why']}" for cell in data["skipped"]]
    return ["\n".join(lines) for lines in (failed, skipped) if lines]


def markdown(data: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """Return the comparison as a Markdown page."""
    head, body = cells_of(rows, data["dense"])
    numbers = len(head) - 3
    lines = [
        _line(head),
        _line(["---", "---", *["---:"] * numbers, "---"]),
        *map(_line, body),
    ]
    protocol = [f"- {name}: {text}" for name, text in protocol_lines(data)]
    parts = [f"# Prunings of {data['model']} compared", "\n".join(lines)]
    parts += ["\n".join(f"- {line}" for line in text.splitlines()) for text in failures(data)]
    return "\n\n".join([*parts, "## Protocol", "\n".join(protocol)]) + "\n"


def comma_separated(data: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """Return the rows as CSV, numbers as they are, the dense model first."""
    tasks = list(data["dense"]["tasks"])
    head = [
        *("method", "asked", "seeds", "sparsity", "parameters", "kept", "loss", "perplexity"),
        *("perplexity_std", "ratio", "loss_gap", "kl", "kl_stderr"),
        *(part for name in tasks for part in (name, f"{name} stderr")),
        *("seconds", "peak_memory", "best", "pareto"),
    ]
    dense = data["dense"]
    first = ["dense", "", 1, 0.0, dense["parameters"], dense["parameters"], dense["loss"]]
    first += [dense["perplexity"], None, 1.0, 0.0, 0.0, None]
    first += [*(part for name in tasks for part in dense["tasks"][name]), None, None, 0, 0]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerow(first)
    for row in rows:
        scores = [part for name in tasks for part in row.tasks.get(name, (None, None))]
        writer.writerow(
            [
                *(row.method, row.asked, row.num_seeds, row.sparsity, row.parameters, row.kept),
                *(row.loss, row.perplexity.mean, row.perplexity.deviation, row.ratio, row.gap),
                *(row.kl or (None, None)),
                *scores,
                *(row.seconds, row.memory, int(row.best), int(row.front)),
            ]
        )
    return text.getvalue()


def protocol_lines(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what all numbers were measured with, each with its name."""
    told = data["protocol"]
    lines = {
        "model": told["model"],
        "calibration": told["calibration"],
        "evaluation": told["evaluation"],
        "statistics": told.get("statistics") or "",
        "leak": leak_text(told["leak"]),
        "KL": KL_IS if any("kl" in cell for cell in data["cells"]) else "",
        "tasks": told.get("tasks") or "",
        "settings": ", ".join(told["settings"]),
        "computed": f"{told['dtype']} on {told['device']}, {told['threads']} threads",
        "versions": ", ".join(f"{name} {version}" for name, version in told["versions"].items()),
        "seeds": ", ".join(map(str, told["seeds"])),
        "shared": shared_text(data["shared"]),
    }
    return [(name, text) for name, text in lines.items() if text]


def statistics_text(asked: str, names: Sequence[str]) -> str:
    """Return whose statistics cells learnt from, where these were collected once; else nothing.

    >>> statistics_text("dense", ["col_sq"])[:68]
    'col_sq of the dense model, collected once for all cells: masks differ'
    >>> statistics_text("sequential", [])
    ''
    """
    if asked != "dense" or not names:
        return ""
    return (
        f"{', '.join(names)} of the dense model, collected once for all cells: masks differ from "
        "those of the bare command, whose blocks learn from what pruned ones pass on"
    )


def leak_text(shares: Mapping[str, float | None]) -> str:
    """Return how much of the evaluation text was calibrated on, of the worst seed.

    >>> leak_text({"0": 0.0}), leak_text({"0": 0.25, "1": 0.0}), leak_text({})
    ('0.00 % of the evaluated tokens lie in runs of 32 that the calibration text holds', '25.00 % \
of the evaluated tokens lie in runs of 32 that the calibration text holds: perplexities flatter', \
'no method read a text')
    """
    if not shares:
        return "no method read a text"
    known = [share for share in shares.values() if share is not None]
    if not known:
        return "not checked: windows are shorter than the runs of 32 tokens that are compared"
    worst = max(known)
    text = f"{100 * worst:.2f} % of the evaluated tokens lie in runs of 32 that the calibration "
    return f"{text}text holds" + (": perplexities flatter" if worst > 0.01 else "")


def shared_text(shared: Sequence[Mapping[str, Any]]) -> str:
    """Return what was done once for several cells, and what doing it for each would have added.

    >>> shared_text([{"what": "gradients", "seconds": 2.0, "made": 1, "used": 3}])
    'gradients made once for 3 cells (2.0 s each time; 4.0 s saved)'
    """
    parts = []
    for each in shared:
        once = "once" if each["made"] == 1 else f"{each['made']} times"
        mean = each["seconds"] / max(1, each["made"])
        saved = mean * max(0, each["used"] - each["made"])
        parts.append(
            f"{each['what']} made {once} for {each['used']} cells "
            f"({human_seconds(mean)} each time; {human_seconds(saved)} saved)"
        )
    return "; ".join(parts)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
