"""A comparison as a value: the data of all cells, their rows, table, figure and files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmprune.base.errors import CheckpointError
from llmprune.checkpoint.sink import write_failed, write_json
from llmprune.checkpoint.source import read_json
from llmprune.comparison.rows import PERPLEXITY, Row, rows_of
from llmprune.comparison.writing import comma_separated, comparison_text, markdown, table_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "comparison"


@dataclass(frozen=True, repr=False)
class Comparison:
    """Prunings of one model side by side; `data` is comparison.json.

    `str(comparison)` is what the command prints.
    """

    data: Mapping[str, Any]

    @classmethod
    def read(cls, folder: str | Path) -> Comparison:
        """Read the comparison of a folder.

        Raises:
            CheckpointError: there is none.
        """
        path = Path(folder) / f"{NAME}.json"
        if not path.exists():
            raise CheckpointError(
                f"{folder} has no {NAME}.json, so no comparison was finished there. Type llmprune "
                "compare --model MODEL --methods wanda,sparsegpt --sparsity 0.5 --out DIR."
            )
        return cls(read_json(path))

    @property
    def axis(self) -> str:
        """Return what the Pareto front is of, beside the parameters that are kept."""
        return str(self.data.get("pareto", PERPLEXITY))

    @cached_property
    def rows(self) -> list[Row]:
        """Return a row per method and amount, over all seeds."""
        return rows_of(self.data["cells"], self.data["dense"], self.axis)

    @property
    def failed(self) -> dict[str, str]:
        """Return what is wrong with the cells that failed, by name."""
        return {
            cell["name"]: cell["error"]["message"] for cell in self.data["cells"] if "error" in cell
        }

    @property
    def exit_code(self) -> int:
        """Return 0; where cells failed 1, if one of these is our fault, else 2."""
        codes = {cell["error"]["code"] for cell in self.data["cells"] if "error" in cell}
        return 0 if not codes else min(codes)

    def table(self) -> str:
        """Return a line per method and amount, the dense model first."""
        return table_text(self.data, self.rows)

    def plot(self) -> Figure:
        """Return a figure: perplexity, or KL, over the parameters that are kept, with the Pareto
        front."""
        from llmprune.comparison.pictures import pareto_figure

        return pareto_figure(self.data["dense"], self.rows, self.axis)

    def save(self, folder: str | Path) -> list[Path]:
        """Write comparison.{json,csv,md,html} and pareto.{png,svg}, each whole or not at all.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        from llmprune.comparison.sheet import comparison_page

        home = Path(folder)
        write_json(home / f"{NAME}.json", self.data)
        texts = {
            f"{NAME}.csv": comma_separated(self.data, self.rows),
            f"{NAME}.md": markdown(self.data, self.rows),
            f"{NAME}.html": comparison_page(self.data, self.rows),
        }
        written = [home / f"{NAME}.json"]
        try:
            for name, text in texts.items():
                beside = home / f".{name}.tmp"
                beside.write_text(text, encoding="utf-8")
                os.replace(beside, home / name)
                written.append(home / name)
            figure = self.plot()
            for kind in ("png", "svg"):
                beside = home / f".pareto.tmp.{kind}"
                figure.savefig(
                    beside, format=kind, metadata={"Date": None} if kind == "svg" else {}
                )
                os.replace(beside, home / f"pareto.{kind}")
                written.append(home / f"pareto.{kind}")
        except OSError as error:
            raise write_failed(home, error) from error
        return written

    def __repr__(self) -> str:
        return comparison_text(self.data, self.rows)

    def _repr_html_(self) -> str:
        from llmprune.comparison.sheet import table_html

        return table_html(self.data, self.rows)
