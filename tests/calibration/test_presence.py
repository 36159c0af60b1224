"""A dry run refuses texts that are not there as the run does, and asks for no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmprune.api import make_recipe
from llmprune.base.errors import LlmpruneError
from llmprune.calibration.presence import check_texts
from tests.story.conftest import Command, command

__all__ = ["command"]


def recipe_of(calib: str | None = None, **settings: Any) -> Any:
    given = [f"{key.replace('__', '.')}={value}" for key, value in settings.items()]
    return make_recipe("a/model", sparsity=0.5, calib=calib, settings=given)


@pytest.mark.parametrize(
    ("wish", "key"),
    [
        ({"calib": "no.txt"}, "calibration.data: 'no.txt'"),
        ({"calib": "c4:3,no.jsonl"}, r"calibration.data\[1\]: 'no.jsonl'"),
        ({"calib": "on-policy", "calibration__prompts": "no.txt"}, "calibration.prompts: 'no.txt'"),
        ({"recover__data": "no.txt:2,c4"}, r"recover.data\[0\]: 'no.txt'"),
        ({"evaluate__data": "no.txt", "evaluate__perplexity": "true"}, "evaluate.data: 'no.txt'"),
    ],
)
def test_a_text_that_is_not_there_is_named(wish: dict[str, Any], key: str) -> None:
    with pytest.raises(LlmpruneError, match=f"^{key}"):
        check_texts(recipe_of(**wish))


def test_what_will_not_be_read_may_be_missing(tmp_path: Path) -> None:
    (tmp_path / "here.txt").write_text("a", encoding="utf-8")
    check_texts(recipe_of(str(tmp_path)))
    check_texts(recipe_of("no.txt"), calibrates=False)
    check_texts(recipe_of("owner/name", evaluate__data="no.txt"))  # measured where it can be
    with pytest.raises(LlmpruneError, match=r"^evaluate\.data"):
        check_texts(recipe_of(evaluate__data="no.txt"), measures=True)
    with pytest.raises(LlmpruneError, match=r"^calibration\.data"):
        check_texts(recipe_of("no.txt", recover__steps=4), calibrates=False)  # which trains on it


def test_plan_and_run_say_the_same(pico: Any, tmp_path: Path, command: Command) -> None:
    wish = ("--model", pico("llama"), "--sparsity", 0.5, "--out", tmp_path / "out")
    text = ("--calib", "no.txt")
    dry, run, plan = (
        command(*wish, *text, "--dry-run"),
        command(*wish, *text, "--quiet"),
        command("plan", *wish, *text),
    )
    assert [dry.code, run.code, plan.code] == [2, 2, 2]
    assert dry.err == run.err == plan.err and "'no.txt' is neither" in dry.err
    assert not dry.out
    assert command(*wish, *text, "--method", "magnitude", "--dry-run").code == 0
    grid = ("--model", pico("llama"), "--methods", "wanda", "--sparsity", 0.5, "--dry-run")
    ended = command("compare", *grid, "--perplexity", "gone.txt")
    assert ended.code == 2 and "evaluate.data: 'gone.txt'" in ended.err
    assert not list(tmp_path.iterdir())
