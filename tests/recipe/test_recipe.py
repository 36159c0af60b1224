"""Recipes say what is wrong, where, and what to type; and they survive every round trip."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from llmprune.allocation import ALLOCATIONS
from llmprune.base.errors import RecipeError, UnknownName
from llmprune.catalog import METHODS
from llmprune.recipe import Recipe, build, default_steps, differences, override, read_recipe
from llmprune.repair import REPAIRS
from llmprune.solver import COMPENSATIONS, REFINEMENTS, SOLVERS

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
CUTS = [path for path in CONFIGS if Recipe.read(path).recover is None]


def wish(**prune: Any) -> dict[str, Any]:
    return {"model": "org/name", "steps": [{"prune": prune}, {"evaluate": None}]}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_a_recipe_that_round_trips(path: Path, tmp_path: Path) -> None:
    recipe = Recipe.read(path)
    assert build(recipe.to_dict()) == recipe
    (tmp_path / "again.yaml").write_text(recipe.to_yaml())
    again = Recipe.read(tmp_path / "again.yaml")
    assert again == recipe
    assert again.hash() == recipe.hash()


def test_the_configs_are_there() -> None:
    names = {path.stem for path in CONFIGS}
    assert names >= {"wanda-50", "wanda-2of4", "magnitude-50", "compact-25", "finercut-25"}


def keys_of_a_recipe() -> dict[str, list[str]]:
    """Return the keys of every section."""
    sections = build(wish(sparsity=0.5)).to_dict()
    prune, evaluate = (next(iter(step.values())) for step in sections["steps"])
    return {
        "": [*sections],
        "calibration": [*sections["calibration"]],
        "prune": [*prune],
        "evaluate": [*evaluate],
    }


def keys_of(path: Path) -> list[tuple[str, str]]:
    """Return the keys that a config gives or shows, in order, each with the comment above it."""
    known = {key for keys in keys_of_a_recipe().values() for key in keys}
    found: list[tuple[str, str]] = []
    comments: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        key = re.match(r"(?:# )?(\w+):(?: [^ ]|$)", line.strip())
        if key and key[1] in known:
            found.append((key[1], " ".join(comments)))
        if (key and key[1] in known) or not line.strip().startswith("# "):
            comments = []
        else:
            comments.append(line.strip(" #"))
    return found


@pytest.mark.parametrize("path", CUTS, ids=lambda path: path.stem)
def test_the_configs_name_every_key(path: Path) -> None:
    named = {key for key, _ in keys_of(path)}
    for section, keys in keys_of_a_recipe().items():
        assert not set(keys) - named, section


@pytest.mark.parametrize("path", CUTS, ids=lambda path: path.stem)
def test_the_configs_say_what_a_key_means_in_one_order(path: Path) -> None:
    def steps(path: Path) -> list[tuple[str, str]]:
        keys = keys_of(path)
        return keys[[key for key, _ in keys].index("steps") + 1 :]

    here = steps(path)
    assert all("efault" in said or "follows" in said for _, said in here)
    assert [key for key, _ in here] == [key for key, _ in steps(CUTS[0])]


@pytest.mark.parametrize("path", CUTS, ids=lambda path: path.stem)
def test_the_configs_name_parts_that_there_are(path: Path) -> None:
    said = dict(keys_of(path))
    tables: dict[str, dict[str, Any]] = {
        "method": METHODS,
        "allocation": ALLOCATIONS,
        "solver": {**SOLVERS, **COMPENSATIONS},
        "refine": REFINEMENTS,
        "repair": REPAIRS,
    }
    for key, table in tables.items():
        pairs = re.findall(r"([\w+-]+)(?= \||: )|(?<=\| )([\w+-]+)", said[key])
        names = {one or other for one, other in pairs} - {"none", "Default"}
        assert len(names) > 2
        assert names <= table.keys(), key


@pytest.mark.parametrize(
    ("prune", "message"),
    [
        ({"sparsity": 50}, r"steps\[0\]\.prune\.sparsity: 50 .* did you mean 0\.5\?"),
        ({"sparsity": 1}, r"sparsity: 1 is not a fraction.*type 0\.5"),
        ({"sparsity": -0.1}, r"sparsity: -0\.1 is not a fraction"),
        ({"sparsity": float("nan")}, r"sparsity: nan is not a fraction"),
        ({}, r"steps\[0\]\.prune\.sparsity: missing; .*`--sparsity 0\.5`"),
        ({"pattern": "ffn-channels"}, r"prune\.sparsity: missing"),
        ({"pattern": "2:4", "sparsity": 0.6}, r"0\.6 contradicts pattern '2:4'.* removes 0\.5\."),
        ({"pattern": "4:2"}, r"steps\[0\]\.prune\.pattern: '4:2' .*Did you mean '2:4'\?"),
        ({"pattern": "0:4"}, r"'0:4' would keep 0 of every 4"),
        ({"pattern": "4:4"}, r"'4:4' would keep 4 of every 4"),
        ({"pattern": 124}, r"pattern: 124 is a number here\. Put quotes around it: '124'"),
        (
            {"sparsity": 0.5, "method": []},
            r"method: \[\] does not fit; it should be a valid string",
        ),
        ({"sparsity": 0.5, "group": "rows"}, r"group: 'rows' does not fit; .*'matrix' or 'mass'"),
        ({"pattern": "1x1", "sparsity": 0.5}, r"pattern: '1x1' is no tile\. .*as in '16x16'"),
        ({"sparsity": 0.5, "min_keep": 1}, r"min_keep: 1 is not a fraction.*type 0\.05"),
        ({"sparsity": 0.5, "sparsities": {"*": 30}}, r"sparsities: 30 for '\*'.*mean 0\.3\?"),
        ({"sparsity": 0.5, "sparsities": {}}, r"sparsities: no linear is named"),
        ({"sparsity": 0.5, "sparsities": [0.5]}, r"sparsities: \[0\.5\] is not a mapping"),
        ({"sparsity": 0.5, "allocation": "manual"}, r"sparsities: no linear is named.*down_proj"),
        (
            {"sparsity": 0.5, "allocation": "lamp", "sparsities": {"*": 0.5}},
            r"sparsities: shares .* contradict allocation 'lamp'",
        ),
    ],
)
def test_a_malformed_prune_step_is_explained(prune: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build(wish(**prune))


@pytest.mark.parametrize("pattern", ["N:M", "HxW", "diagonal", "heads+diagonal"])
def test_an_unknown_pattern_is_an_unknown_name(pattern: str) -> None:
    says = rf"prune\.pattern: '{re.escape(pattern)}' is no pattern\. There are: .*N:M.*, heads, "
    with pytest.raises(UnknownName, match=says):
        build(wish(pattern=pattern, sparsity=0.5))


@pytest.mark.parametrize(
    ("pattern", "meant"),
    [("unstructurd", "unstructured"), ("ffn_channels", "ffn-channels"), ("blocks+head", "heads")],
)
def test_an_unknown_pattern_gets_its_near_match(pattern: str, meant: str) -> None:
    with pytest.raises(UnknownName, match=f"is no pattern. Did you mean '{meant}'"):
        build(wish(pattern=pattern, sparsity=0.5))


def test_the_sparsity_of_n_of_m_follows_from_the_pattern() -> None:
    absent, rounded = wish(pattern="1:3"), wish(pattern="1:3", sparsity=0.667)
    assert build(absent).prune.sparsity == 1 - 1 / 3
    assert build(absent).hash() == build(rounded).hash()


@pytest.mark.parametrize(
    ("assignment", "hint"),
    [
        ("prune.patern=2:4", r"steps\[0\]\.prune\.patern: .*'pattern'"),
        ("calibration.num_sample=3", r"calibration\.num_sample: .*'num_samples'"),
        ("sparsity=0.5", r"sparsity: .*'steps\[0\]\.prune\.sparsity'"),
        ("steps=[evaluat]", r"steps\[0\]\.evaluat: .*'evaluate'"),
    ],
)
def test_an_unknown_key_gets_its_near_match(assignment: str, hint: str) -> None:
    with pytest.raises(UnknownName, match=hint):
        build(override(wish(sparsity=0.5), [assignment]))


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([], "steps: no step prunes"),
        ([{"prune": {"sparsity": 0.5}}, "evaluate", "evaluate"], "step 2 evaluates, and one"),
        (["evaluate", {"prune": {"sparsity": 0.5}}], "step 0 evaluates, and one"),
        ([{"prune": {"sparsity": 0.5}, "evaluate": {}}], r"steps\[0\]: a step has one kind"),
        ([{"prune": 3}], r"steps\[0\]\.prune: 3 is not a mapping"),
        (None, "steps: None does not fit"),
    ],
)
def test_the_steps_are_checked(steps: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build({"model": "org/name", "steps": steps})


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        build({"seed": -1, "steps": default_steps()})
    paths = [line.split(":")[0] for line in str(caught.value).splitlines()]
    assert paths == ["model", "seed", "steps[0].prune.sparsity"]


def test_overrides_reach_any_key_and_leave_the_data_alone() -> None:
    data = wish(sparsity=0.5)
    assignments = ["calibration.num_samples=256", "steps[0].prune.sparsity=0.6", "seed=7"]
    changed = build(override(data, [*assignments, "evaluate.perplexity=no"]))
    assert changed.calibration.num_samples == 256
    assert changed.seed == 7
    assert changed.prune.sparsity == 0.6
    assert changed.steps[1].evaluate is not None
    assert changed.steps[1].evaluate.perplexity is False
    assert data == wish(sparsity=0.5)


def test_overrides_are_checked_together() -> None:
    data = override(wish(sparsity=0.5), ["prune.sparsity=0.6", "prune.pattern=1:2"])
    with pytest.raises(RecipeError, match=r"0\.6 contradicts pattern '1:2'"):
        build(data)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("seed", "'seed' is not an assignment"),
        ("=1", "'=1' is not an assignment"),
        ("steps[3].prune.sparsity=1", r"steps\[3\].*no item '3'\. The items there: 0 to 1"),
        ("model.x=1", r"model\.x: 'x' is below 'org/name'"),
        ("seed={a", "seed: the value '{a' is not YAML"),
    ],
)
def test_a_malformed_override_is_explained(assignment: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        override(wish(sparsity=0.5), [assignment])


def test_yaml_without_quotes_means_what_it_says(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: org/name\nsteps:\n  - prune: {pattern: 2:4, sparsity: 5e-1}\n")
    assert read_recipe(path)["steps"] == [{"prune": {"pattern": "2:4", "sparsity": 0.5}}]


def test_text_that_looks_like_a_number_survives_yaml(tmp_path: Path) -> None:
    recipe = build(wish(sparsity=0.5) | {"revision": "12345e7", "out": "089"})
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert Recipe.read(tmp_path / "recipe.yaml") == recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [a\nseed: 1\n", r"recipe\.yaml, line 2, column"),
        ("seed: 1\nseed: 2\n", r"recipe\.yaml, line 2, column 1: the key 'seed' stands here twice"),
        ("- a\n", r"recipe\.yaml, line 1: a recipe is a mapping.*a list"),
        ("", r"recipe\.yaml, line 1: a recipe is a mapping.*nothing"),
    ],
)
def test_a_file_that_is_no_recipe_is_located(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(RecipeError, match=message):
        read_recipe(tmp_path / "recipe.yaml")


def test_a_missing_file_gets_its_near_match(tmp_path: Path) -> None:
    (tmp_path / "wanda-50.yaml").touch()
    with pytest.raises(RecipeError, match=r"no such file\. Did you mean '.*wanda-50\.yaml'\?"):
        read_recipe(tmp_path / "wanda50.yaml")
    with pytest.raises(RecipeError, match="this is a folder"):
        read_recipe(tmp_path)


def test_differences_name_the_keys_with_both_values() -> None:
    old = build(wish(sparsity=0.5))
    new = build(override(wish(sparsity=0.6), ["calibration.seq_len=64"]))
    found = ["calibration.seq_len: None and 64", "steps[0].prune.sparsity: 0.5 and 0.6"]
    assert differences(old, new) == found
    assert differences(old, old) == []
    assert old.hash() != new.hash()


def test_memory_limits_are_sizes() -> None:
    good = build(wish(sparsity=0.5) | {"max_memory": {0: "8GB", "cpu": 1000}})
    assert good.max_memory == {"0": "8GB", "cpu": 1000}
    with pytest.raises(RecipeError, match=r"max_memory: '3X' for 'cpu' is no size"):
        build(wish(sparsity=0.5) | {"max_memory": {"cpu": "3X"}})


def test_a_wrong_target_is_the_only_mistake_told() -> None:
    wrong = {"model": "org/name", "steps": [{"prune": {"target": {"ppl": "much"}}}]}
    with pytest.raises(RecipeError, match="is no target") as caught:
        build(wrong)
    assert "missing" not in str(caught.value)
