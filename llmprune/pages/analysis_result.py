"""The result of an analysis: text, figures, and a folder with page, tables and pictures."""

from __future__ import annotations

import csv
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from io import StringIO
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmprune.analysis.pictures import charts_of, draw_charts, height_of
from llmprune.analysis.types import Finding
from llmprune.base.errors import CheckpointError, RecipeError
from llmprune.base.registry import unknown
from llmprune.checkpoint.sink import write_json
from llmprune.pages.analyses import analysis_page, written
from llmprune.pages.result import ANALYSIS, renew_page

if TYPE_CHECKING:
    from llmprune.report.plots import Picture

CONTENT = "analysis.json"


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """What was found of a result; `findings` by name in the order of the page."""

    model: str
    settings: Mapping[str, Any]
    findings: Mapping[str, Finding]
    command: str

    def __repr__(self) -> str:
        lines = [f"analysis of {self.model}"]
        for finding in self.findings.values():
            lines += ["", finding.title, *(f"  {text}" for text in finding.means)]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        from llmprune.base.markup import html_folded, html_table

        parts = []
        for finding in self.findings.values():
            rows = [[written(cell) for cell in row] for row in finding.rows]
            table = html_table(finding.columns, rows) if rows else ""
            parts.append(html_folded(" ".join((f"{finding.title}.", *finding.means)), table))
        return "".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON holds it."""
        return {
            "model": self.model,
            "settings": dict(self.settings),
            "command": self.command,
            "findings": {name: each.to_dict() for name, each in self.findings.items()},
        }

    def plot(self, name: str | None = None) -> Picture:
        """Return a figure of all charts, or of those of one analysis.

        Raises:
            UnknownName: there is no such analysis, or none with a chart.
        """
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        from llmprune.report.plots import Picture

        drawn = [each for each in self.findings.values() if each.charts]
        names = [each.name for each in drawn]
        if not names:
            raise RecipeError("plot: nothing was measured, so there is nothing to draw.")
        if name is not None and name not in names:
            raise unknown("plot", name, names)
        charts = charts_of([each for each in drawn if name in (None, each.name)])
        figure = Picture(figsize=(8.0, height_of(charts)), dpi=110, layout="constrained")
        FigureCanvasAgg(figure)
        draw_charts(figure, charts)
        return figure

    def page(self) -> str:
        """Return the page in HTML."""
        settings = [(key, str(value)) for key, value in self.settings.items() if value is not None]
        return analysis_page(
            self.model, settings, list(self.findings.values()), command=self.command
        )

    def save(self, folder: str | PathLike[str]) -> Path:
        """Write JSON, page, a CSV per analysis and its picture; an earlier analysis is replaced.

        Raises:
            RecipeError: the folder holds something else.
        """
        out = Path(folder).expanduser()
        check_folder(out)
        partial = out.with_name(f".{out.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            for each in self.findings.values():
                if each.rows:
                    text = csv_text(each)
                    (partial / f"{each.name}.csv").write_text(text, encoding="utf-8", newline="")
                if each.charts:
                    self.plot(each.name).savefig(partial / f"{each.name}.png")
            (partial / "analysis.html").write_text(self.page(), encoding="utf-8")
            write_json(partial / CONTENT, self.to_dict())
            shutil.rmtree(out, ignore_errors=True)
            os.replace(partial, out)
            if out.name == ANALYSIS:
                renew_page(out.parents[1])
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(
                f"{out} cannot be written ({error.strerror or error}). Choose another --out."
            ) from None
        return out


def check_folder(out: Path) -> None:
    """Check that a folder is free, or holds an earlier analysis.

    Raises:
        RecipeError: it is a file, or holds something else.
    """
    if out.is_dir() and (not any(out.iterdir()) or (out / CONTENT).is_file()):
        return
    if out.exists():
        raise RecipeError(
            f"out: {out} is there and is no earlier analysis, which alone is replaced. Choose "
            "another folder with --out."
        )


def csv_text(finding: Finding) -> str:
    """Return the table of a finding as CSV, with a head."""
    buffer = StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(finding.columns)
    writer.writerows(["" if cell is None else cell for cell in row] for row in finding.rows)
    return buffer.getvalue()
