"""`report.html`: what a run did and what came of it, from report.json and evaluations.json.

The same data give the same page: nothing of the moment or of the machine that writes it is in it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from markupsafe import Markup

from llmprune.base.errors import CheckpointError, LlmpruneError
from llmprune.base.progress import Progress, human_bytes, human_count
from llmprune.checkpoint.sink import settle, write_failed
from llmprune.checkpoint.source import read_json
from llmprune.pages.blocks import allocation_part, errors_part, sparsity_part
from llmprune.pages.distributions import distributions_part
from llmprune.pages.document import Section, card_row, listed, page, together
from llmprune.pages.making import beginning_part, data_part, left_part, warnings_part
from llmprune.pages.quality import perplexity_part, speed_part, tasks_part, training_part
from llmprune.pages.samples import samples_part
from llmprune.pages.tables import facts
from llmprune.report.recoveries import cut_method, is_pruned, sides
from llmprune.report.run import Report
from llmprune.report.tables import report_lines

PAGE = "report.html"
ANALYSIS = "analysis"  # the folder beside the page that `llmprune analyze` fills


def report_page(
    data: Mapping[str, Any],
    later: Mapping[str, Any] | None = None,
    analysis: Mapping[str, Any] | None = None,
) -> str:
    """Return the page of a result as HTML; `data` is report.json, `later` evaluations.json.

    `analysis` is the analysis.json that lies with the result, whose own page is linked.

    Raises:
        CheckpointError: the report lacks what every report of llmprune has.
    """
    later = later or {}
    try:
        found = [
            Section("Summary", together([_cards(data), facts(report_lines(data))])),
            beginning_part(data),
            sparsity_part(data),
            allocation_part(data),
            errors_part(data),
            distributions_part(data),
            training_part(data),
            perplexity_part(data, later),
            tasks_part(data, later),
            speed_part(later),
            _analysis_part(analysis),
            samples_part(data),
            left_part(data),
            warnings_part(data),
            data_part(data),
        ]
        title, subtitle = _title(data)
    except (KeyError, TypeError, IndexError) as error:
        raise CheckpointError(
            f"the report holds nothing readable at {error}, so there is no page to make of it. "
            "It was written by another version of llmprune, or changed since: prune again with "
            "--overwrite."
        ) from error
    return page(title, [section for section in found if section is not None], subtitle=subtitle)


def write_page(folder: str | Path, path: str | Path | None = None) -> Path:
    """Write the page of a result, by default into its own folder; return where it lies.

    Raises:
        CheckpointError: the folder is no result of llmprune, or the page cannot be written.
    """
    own = Path(folder) / "llmprune"
    data = Report.read(folder).data
    later, analysis = own / "evaluations.json", own / ANALYSIS / "analysis.json"
    text = report_page(
        data,
        read_json(later) if later.exists() else {},
        read_json(analysis) if analysis.exists() else None,
    )
    return write_text(Path(path) if path is not None else own / PAGE, text)


def write_last(folder: str | Path, progress: Progress) -> None:
    """Write the page of a result that has its name already, and which no failure takes back."""
    try:
        write_page(folder)
    except LlmpruneError as error:
        progress.warn(f"{PAGE} was not written: {error}")


def renew_page(folder: str | Path) -> None:
    """Write the page of a result anew, where it has one."""
    if (Path(folder) / "llmprune" / PAGE).exists():
        write_page(folder)


def write_text(path: Path, text: str) -> Path:
    """Write a text file as a whole or not at all; return its path.

    Raises:
        CheckpointError: it cannot be written there.
    """
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder. Name a file, such as {path / PAGE}.")
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        settle(temporary)
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise write_failed(path, error) from error
    return path


def _analysis_part(analysis: Mapping[str, Any] | None) -> Section | None:
    """Return what an analysis found, in its own sentences, and where to read more."""
    if not analysis:
        return None
    found = [
        f"{finding['title']}: {' '.join(finding['means'])}"
        for finding in analysis["findings"].values()
        if finding.get("means")
    ]
    link = Markup('<p><a href="{}">All tables and charts</a></p>').format(
        f"{ANALYSIS}/analysis.html"
    )
    return Section("Analysis", together([listed(found), link]))


def _title(data: Mapping[str, Any]) -> tuple[str, str]:
    """Return the name of a result, and how it was made in a few words."""
    run = data.get("run", {})
    model = str((run.get("origin") or run.get("source") or {}).get("name") or data["model"])
    name = Path(data["out"]).name if data["out"] else "a model in memory"
    if not is_pruned(data):
        return name, f"{model}, trained"
    words = [f"{model} pruned by {cut_method(data)}", str(data["pattern"])]
    words += ["trained"] if data.get("recovery") else []
    return name, ", ".join(words)


def _cards(data: Mapping[str, Any]) -> Any:
    """Return the numbers that are looked for first."""
    cards = []
    if is_pruned(data):
        cards.append(("of the eligible weights removed", f"{100 * data['sparsity']:.4g} %"))
        cards.append(("of all parameters removed", f"{100 * data['sparsity_of_all']:.4g} %"))
    for side in sides(data):
        cards.append((f"perplexity, {side.label}", f"{side.entry['value']:.3f}"))
    if data.get("parameters_after"):
        after, before = data["parameters_after"], data["parameters_before"]
        of = "" if after == before else f", of {human_count(before)}"
        cards.append((f"parameters stored{of}", human_count(after)))
    size = data.get("sizes", {}).get("size", {})
    if size.get("after") is not None:
        cards.append(("of tensors", human_bytes(size["after"])))
    return card_row(cards)
