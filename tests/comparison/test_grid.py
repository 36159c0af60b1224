"""A grid has the cells that were asked for, refuses what is none, and may only grow."""

from __future__ import annotations

import pytest

from llmprune.base.errors import RecipeError, UnknownName
from llmprune.comparison.grid import Cell, Grid, grid_from, growth
from llmprune.comparison.previewing import make_grid


def test_a_grid_is_methods_by_amounts_by_seeds() -> None:
    grid = make_grid("demo", "wanda,ria", "0.5,0.6", "2:4,unstructured", seeds="0,3")
    assert [cell.asked for cell in grid.cells[:6:2]] == [
        "2:4",
        "unstructured 0.5",
        "unstructured 0.6",
    ]
    assert len(grid.cells) == 2 * 3 * 2
    names = [cell.name for cell in grid.cells]
    assert len(set(names)) == 12
    assert names[:2] == ["wanda-2of4-seed0", "wanda-2of4-seed3"]
    assert grid_from(grid.to_dict()) == grid


def test_a_cell_has_the_recipe_of_the_bare_command() -> None:
    grid = Grid(model="demo", methods=("good", "flap"), sparsities=(0.25,), num_samples=8)
    effort, method = (grid.recipe(cell, "somewhere") for cell in grid.cells)
    assert (effort.prune.effort, effort.prune.method) == ("good", "sparsegpt")
    assert (method.prune.method, method.prune.pattern) == ("flap", "ffn-channels+heads")
    assert method.prune.sparsity == 0.25
    assert method.calibration.num_samples == 8
    assert method.evaluate is not None and method.evaluate.perplexity is False


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ({"methods": "wandaa"}, "Did you mean 'wanda'"),
        ({"methods": ""}, "Type --methods"),
        ({"methods": "wanda,wanda"}, "wanda is given twice"),
        ({"sparsity": "0.5,half"}, "'half' is no share"),
        ({"sparsity": "1.5"}, "'1.5' is no share"),
        ({"sparsity": "nan"}, "'nan' is no share"),
        ({"sparsity": None}, "Type --sparsity"),
        ({"pattern": "2:4"}, "--pattern unstructured,2:4"),
        ({"seeds": "0,x"}, "'x' is no seed"),
        ({"seeds": ""}, "Type --seeds 0"),
        ({"num_windows": 0}, "Give 1 or more"),
        ({"limit": 3}, "Add --tasks"),
        ({"settings": ("seed=1",)}, "has a flag of its own"),
        ({"settings": ("prune.method=ria",)}, "--methods"),
    ],
)
def test_what_is_no_grid_is_refused_with_what_to_type(wish: dict[str, object], said: str) -> None:
    given: dict[str, object] = {"methods": "wanda", "sparsity": "0.5"} | wish
    with pytest.raises(RecipeError, match=said) as caught:
        make_grid("demo", **given)  # type: ignore[arg-type]
    assert isinstance(caught.value, UnknownName) == (given["methods"] == "wandaa")


def test_a_longer_axis_goes_on_and_anything_else_is_another_grid() -> None:
    before = Grid(model="demo", methods=("wanda",), sparsities=(0.5,)).to_dict()
    longer = Grid(model="demo", methods=("ria", "wanda"), sparsities=(0.5, 0.6), seeds=(0, 1))
    assert growth(before, longer.to_dict()) == []
    assert growth(longer.to_dict(), before) == [
        "methods: without ria, which was compared",
        "seeds: without 1, which was compared",
        "sparsities: without 0.6, which was compared",
    ]
    other = Grid(model="demo", methods=("wanda",), sparsities=(0.5,), num_windows=3).to_dict()
    assert growth(before, other) == ["num_windows: 16 then, 3 now"]


def test_what_is_asked_tells_cells_of_a_method_apart() -> None:
    cells = [
        Cell(method="wanda", seed=0, sparsity=0.5),
        Cell(method="wanda", seed=0, sparsity=0.5, pattern="16x16"),
        Cell(method="wanda", seed=0, pattern="2:4"),
        Cell(method="wanda", seed=0, pattern="4:8"),
    ]
    assert [cell.asked for cell in cells] == ["0.5", "16x16 0.5", "2:4", "4:8"]
