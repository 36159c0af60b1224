"""The catalogue names parts that exist in the vocabulary, with their sources."""

from __future__ import annotations

import re

import pytest

from llmprune.base.errors import UnknownName
from llmprune.catalog import METHODS
from llmprune.recipe.models import PATTERNS, PruneStep


def test_each_row_is_listed_under_its_own_name() -> None:
    assert {name: method.name for name, method in METHODS.items()} == {
        "magnitude": "magnitude",
        "wanda": "wanda",
    }


@pytest.mark.parametrize("name", sorted(METHODS))
def test_each_row_can_be_asked_for_and_cites_its_paper(name: str) -> None:
    method = METHODS[name]
    assert method.group in ("row", "matrix")
    assert set(method.patterns) <= set(PATTERNS)
    assert re.search(r"arXiv:\d{4}\.\d{5}$", method.paper)
    assert str(method.year)[2:] == method.paper.split("arXiv:")[1][:2]


def test_the_default_method_of_a_recipe_is_in_the_catalogue() -> None:
    assert PruneStep(sparsity=0.5).method in METHODS


def test_a_misspelt_method_gets_its_near_match() -> None:
    with pytest.raises(UnknownName, match="'wanda'"):
        METHODS["wandaa"]
