"""A missing name teaches: near match, full list."""

from __future__ import annotations

import pytest

from llmprune.base.errors import RecipeError, UnknownName
from llmprune.base.registry import Registry, unknown


def test_a_known_name_is_found_and_an_unknown_one_is_not_a_member() -> None:
    table = Registry("score", {"wanda": 1})
    assert table["wanda"] == 1
    assert "magnitude" not in table
    assert table.get("magnitude") is None


def test_a_missing_name_gives_the_near_match_and_the_full_list() -> None:
    table = Registry("score", {"wanda": 1, "magnitude": 2})
    with pytest.raises(UnknownName) as caught:
        table["Wnada"]
    assert str(caught.value) == (
        "score: 'Wnada' is not known. Did you mean 'wanda'? Choose one of: magnitude, wanda."
    )


def test_a_far_name_gets_no_guess() -> None:
    error = unknown("score", "xyz", ["wanda"])
    assert isinstance(error, RecipeError)
    assert "Did you mean" not in str(error)
    assert "wanda" in str(error)
