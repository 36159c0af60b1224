"""Names, mixes and defaults mean the texts that they should."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from llmprune.base.errors import RecipeError
from llmprune.calibration.heldout import most_windows
from llmprune.calibration.presets import PRESETS
from llmprune.calibration.selection import (
    calibration_texts,
    evaluation_data,
    name_of,
    place_of,
    suffix_of,
)
from llmprune.recipe import Recipe, build, override


def recipe(*settings: str, model: str = "owner/name", **calibration: Any) -> Recipe:
    steps = [{"prune": {"sparsity": 0.5}}, {"evaluate": {}}]
    data = {"model": model, "steps": steps, "calibration": calibration}
    return build(override(data, settings))


def meant(data: Any, **others: Any) -> list[tuple[str, float]]:
    return [(text.data, text.weight) for text in calibration_texts(recipe(data=data, **others))]


DEMO_FOLDER = str(resources.files("llmprune") / "demo" / "model")


@pytest.mark.parametrize(
    ("model", "data", "calibrated", "evaluated"),
    [
        ("owner/name", "auto", "c4", "wikitext2"),
        ("demo", "auto", "demo", "demo"),
        (DEMO_FOLDER, "auto", "demo", "demo"),
        ("owner/name", "demo", "demo", "demo"),
        ("demo", "c4", "c4", "demo"),
        ("owner/name", "own.txt", "own.txt", "wikitext2"),
        ("owner/name", "demo:1,c4:1", "demo:1,c4:1", "wikitext2"),
    ],
)
def test_defaults_follow_the_model_and_the_text(
    model: str, data: str, calibrated: str, evaluated: str
) -> None:
    wish = recipe(model=model, data=data)
    assert name_of(calibration_texts(wish)) == calibrated
    assert evaluation_data(wish) == evaluated
    asked = recipe("evaluate.data=c4", model=model, data=data)
    assert evaluation_data(asked) == "c4"


@pytest.mark.parametrize(
    ("data", "texts"),
    [
        ("c4:3,ultrachat:1", [("c4", 3), ("ultrachat", 1)]),
        ("c4, owner/name:0.5", [("c4", 1), ("owner/name", 0.5)]),
        ("c4:2", [("c4", 2)]),
        (r"C:\texts\own.txt", [(r"C:\texts\own.txt", 1)]),
        (r"C:\texts\own.txt:2,c4:1", [(r"C:\texts\own.txt", 2), ("c4", 1)]),
        ("c4:" + "9" * 400 + ",demo", [("c4:" + "9" * 400, 1), ("demo", 1)]),
        ("hub:owner/name:2,demo", [("hub:owner/name", 2), ("demo", 1)]),
        ([{"data": "c4", "weight": 3}, "ultrachat"], [("c4", 3), ("ultrachat", 1)]),
    ],
)
def test_a_mix_is_written_in_one_string_or_as_a_list(
    data: Any, texts: list[tuple[str, float]]
) -> None:
    assert meant(data) == texts


def test_a_file_whose_name_looks_like_a_mix_is_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a,b.txt", "c4:3"):
        assert len(meant(f"{name},demo")) == name.count(",") + 2
        Path(name).write_text("text")
        assert meant(name) == [(name, 1)]


def test_a_folder_comes_before_a_data_set_of_the_same_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert place_of("owner/texts") == "hub"
    (tmp_path / "owner" / "texts").mkdir(parents=True)
    assert place_of("owner/texts") == "local"
    assert place_of("hub:owner/texts") == "hub"
    assert place_of("nowhere/text.parquet") == "local"
    assert place_of("a b/c") == place_of("/tmp") == place_of("one") == "local"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json.gz", "A.PARQUET", "a.txt", "a.JSON"])
def test_endings_say_how_a_file_is_read(name: str) -> None:
    assert suffix_of(name) == name.lower()[1:]
    assert suffix_of(name + ".bin") is None


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ({"data": "c4:0,demo:1"}, r"^calibration\.data: 'c4:0' weighs nothing"),
        ({"data": "c4:3,demo:1", "split": "train"}, r"^calibration\.split: of which text"),
        ({"data": ["c4", "demo"], "column": "text"}, r"'column' beside a mix"),
        ({"data": [{"data": "c4", "weight": 0}]}, r"^calibration\.data\[0\]\.weight: 0 "),
        ({"data": [{"data": "c4", "wieght": 1}]}, r"\[0\]\.wieght: .*Did you mean 'weight'"),
        ({"data": []}, r"^calibration\.data: \[\] names no text"),
        ({"data": ""}, r"^calibration\.data: '' does not fit"),
        ({"data": 5}, r"^calibration\.data: 5 is a number here"),
    ],
)
def test_mixes_that_mean_nothing_are_refused(calibration: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        calibration_texts(recipe(**calibration))


def test_parts_belong_to_the_one_text() -> None:
    (text,) = calibration_texts(recipe(data="owner/name", split="test", config="a", column="b"))
    assert (text.split, text.config, text.column) == ("test", "a", "b")


def test_presets_can_be_read_as_they_are_described() -> None:
    for name, preset in PRESETS.items():
        assert place_of(name) == "preset"
        assert place_of(preset.repo) == "hub"
        assert preset.split in preset.files
        assert preset.evaluation is None or preset.evaluation in preset.files
        assert preset.evaluation != preset.split
        for patterns in preset.files.values():
            assert {suffix_of(pattern) for pattern in patterns} <= {".json.gz", ".parquet"}
    assert {name: most_windows(name) for name in ("c4", "wikitext2", "demo")} == {
        "c4": 256,
        "wikitext2": None,
        "demo": None,
    }
