"""A report's picture shows what the report holds."""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
from matplotlib.figure import Figure

from llmprune import Report
from tests.report.conftest import Result


def labels(figure: Figure) -> list[str]:
    """Return the labels of all axes and colour bars."""
    return [axes.get_ylabel() for axes in figure.axes]


def test_both_panels_show_the_values_of_the_report(result: Result) -> None:
    report = Report.read(result("llama"))
    before = set(sys.modules)
    figure = report.plot()
    assert "matplotlib.pyplot" not in set(sys.modules) - before
    sparsity, error = figure.axes[:2]
    cells = sparsity.collections[0].get_array()
    assert cells.shape == (7, 2)
    assert np.allclose(cells, 0.5)
    heights = [bar.get_height() for bar in error.patches]
    assert heights == [block["error"] for block in report.data["blocks"]]
    assert error.get_xlabel() == "block"
    assert {"relative output\nerror", "sparsity\n(share removed)"} <= set(labels(figure))


def test_weights_only_methods_have_no_error_panel(result: Result) -> None:
    figure = Report.read(result("llama", method="magnitude")).plot()
    assert "relative output\nerror" not in labels(figure)
    assert figure.axes[0].get_xlabel() == "block"


def test_experts_are_summed_by_kind(result: Result) -> None:
    figure = Report.read(result("mixtral")).plot()
    kinds = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
    assert kinds[-3:] == [f"mlp.experts.*.{name}_proj" for name in ("gate", "up", "down")]
    assert len(kinds) == 7


def test_a_kind_that_a_block_lacks_is_a_gap_and_explained(
    result: Result, many_blocks: Callable[[Report, int], Report]
) -> None:
    figure = many_blocks(Report.read(result("llama")), 80).plot()
    cells = figure.axes[0].collections[0].get_array()
    assert cells.shape == (7, 80)
    assert np.ma.getmaskarray(cells).sum() == 26 * 4  # blocks 2, 5, ... lack q, k, v and o
    assert "grey" in figure.axes[1].get_xlabel()
    assert len(figure.axes[0].texts) == 0  # no room for numbers


def test_it_shows_itself_in_notebooks(result: Result) -> None:
    figure = Report.read(result("llama", pattern="ffn-channels", sparsity=0.25)).plot()
    assert figure._repr_png_().startswith(b"\x89PNG")
