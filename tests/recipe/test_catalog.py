"""The catalogue names parts that exist in the vocabulary, with their sources."""

from __future__ import annotations

import re

import pytest

from llmprune.allocation import ALLOCATIONS
from llmprune.base.errors import UnknownName
from llmprune.catalog import METHODS
from llmprune.catalog.types import PATTERNS, WEIGHTS
from llmprune.recipe.pruning import PruneStep
from llmprune.repair import REPAIRS
from llmprune.score import RANK_SCORES, SCORES, UNIT_SCORES, WHOLE_SCORES
from llmprune.solver import COMPENSATIONS, REFINEMENTS, SOLVERS


def test_each_row_is_listed_under_its_own_name() -> None:
    names = {"random", "magnitude", "magnitude-global", "lamp", "wanda", "wanda-alpha", "ria"}
    assert names <= METHODS.keys()
    assert all(name == method.name for name, method in METHODS.items())


@pytest.mark.parametrize("name", sorted(METHODS))
def test_each_row_can_be_asked_for_and_cites_its_paper(name: str) -> None:
    method = METHODS[name]
    assert method.group in ("row", "matrix", "mass")
    assert set(method.patterns) <= set(PATTERNS)
    found = re.search(r"arXiv:(\d\d)\d\d\.\d{5}$|20(\d\d), openreview:\w{10}$", method.paper)
    assert found is not None
    assert str(method.year)[2:] in found.groups()


@pytest.mark.parametrize("name", sorted(METHODS))
def test_each_row_names_parts_that_there_are(name: str) -> None:
    method = METHODS[name]
    assert (method.score in SCORES) + (
        method.score in UNIT_SCORES | WHOLE_SCORES | RANK_SCORES
    ) == 1
    whole_units = not set(method.patterns) & set(WEIGHTS)
    assert method.solver in ({*SOLVERS, *COMPENSATIONS} if whole_units else SOLVERS)
    assert {*method.pattern.split("+")} <= {*method.patterns, "sublayers"}
    assert method.allocation in ALLOCATIONS
    assert method.refine is None or method.refine in REFINEMENTS
    assert method.repair is None or method.repair in REPAIRS


def test_no_two_rows_are_the_same_method() -> None:
    parts = [
        (
            *(row.score, row.allocation, row.solver, row.group, row.pool, row.refine, row.repair),
            *(row.pattern, row.reduce, row.propagate),
        )
        for row in METHODS.values()
    ]
    assert len(set(parts)) == len(parts)


def test_the_default_method_of_a_recipe_is_in_the_catalogue() -> None:
    assert PruneStep(sparsity=0.5).method in METHODS


def test_a_misspelt_method_gets_its_near_match() -> None:
    with pytest.raises(UnknownName, match="'wanda'"):
        METHODS["wandaa"]
