"""Plans of methods with several parts: what is said, what goes together, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from llmprune import api, cli
from llmprune.base.errors import LlmpruneError, RecipeError, UnknownName
from llmprune.checkpoint.source import Source
from llmprune.engine.plan import Plan

Pico = Callable[..., Path]
PlanOf = Callable[..., Plan]


@pytest.fixture
def plan_of(pico: Pico, monkeypatch: pytest.MonkeyPatch) -> PlanOf:
    """Plan a pruning of the pico llama by half, without reading a weight."""

    def refuse(self: Source, names: object) -> None:
        raise AssertionError(f"the plan read {names}")

    monkeypatch.setattr(Source, "get", refuse)

    def plan(*settings: str, **wishes: Any) -> Plan:
        if ":" not in wishes.get("pattern", ""):
            wishes = {"sparsity": 0.5} | wishes
        return api.plan(str(pico("llama")), out="x", settings=settings, **wishes)

    return plan


def lines(plan: Plan) -> dict[str, str]:
    """Return the lines of a plan by their names."""
    rows = repr(plan).split("\n\n")[0].splitlines()
    return dict(row.split(maxsplit=1) for row in rows)


NEW = {"stages", "gradients", "probes", "target"}


@pytest.mark.parametrize(
    ("settings", "wishes", "said"),
    [
        ((), {"method": "sparsegpt"}, {}),
        ((), {"method": "gblm"}, {"gradients": ("grad_sq of 128 sequences", "in reverse")}),
        (("prune.refine=swaps",), {}, {"stages": ("masks refined by swaps",)}),
        (("prune.permute=true",), {"pattern": "2:4"}, {"stages": ("channels put in order",)}),
        (("prune.repair=halves",), {}, {"stages": ("repair halves",)}),
        ((), {"method": "wanda++"}, {"stages": ("repair regional",)}),
        (("prune.allocation=owl",), {}, {"probes": ("at most 2 candidates", "the dense model")}),
        (("prune.allocation=ecoflap",), {}, {"probes": ("at most 30 candidates", "in a walk")}),
        (
            (),
            {"target": {"ppl": "+5%"}, "sparsity": 0.8},
            {
                "target": ("ppl +5%", "up to 0.8", "on 16 windows"),
                "probes": ("at most 25 candidates", "8 in a walk"),
            },
        ),
        (
            ("prune.allocation=evopress", "prune.repair=halves"),
            {"method": "gblm"},
            {
                "gradients": ("grad_sq",),
                "probes": ("at most 186 candidates",),
                "stages": ("halves",),
            },
        ),
    ],
)
def test_a_plan_says_what_is_learnt_tried_and_repaired(
    plan_of: PlanOf, settings: tuple[str, ...], wishes: dict[str, Any],
    said: dict[str, tuple[str, ...]],
) -> None:  # fmt: skip
    found = lines(plan_of(*settings, **wishes))
    assert found.keys() & NEW == said.keys()
    for name, words in said.items():
        assert all(word in found[name] for word in words), found[name]


def test_the_command_prints_the_lines(pico: Pico, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--set", "prune.allocation=ecoflap", "--set", "prune.repair=halves"]
    arguments = ["--model", str(pico("llama")), "--sparsity", "0.5", "--method", "gblm", *settings]
    arguments += ["--out", "x"]
    with pytest.raises(SystemExit) as left:
        cli.main([*arguments, "--dry-run"])
    out = capsys.readouterr().out
    assert not left.value.code
    starts = {line.split(" ")[0] for line in out.splitlines()}
    assert starts >= NEW - {"target"}
    with pytest.raises(SystemExit):
        cli.main([*arguments, "--dry-run", "--json"])
    data = json.loads(capsys.readouterr().out)
    plan = data.get("plan", data)
    assert set(plan["needs"]) >= {"grad_sq", "col_sq"} and plan["awaits_survey"]
    assert (plan["solver"], plan["refine"], plan["repair"]) == ("zero", None, "halves")


def test_walks_of_surveys_and_probes_are_counted_as_reads(plan_of: PlanOf) -> None:
    reads = {
        name: plan_of(*settings, **wishes).estimate.num_reads
        for name, settings, wishes in [
            ("wanda", (), {}),
            ("sparsegpt", (), {"method": "sparsegpt"}),
            ("gblm", (), {"method": "gblm"}),
            ("owl", ("prune.allocation=owl",), {}),
            ("evopress", ("prune.allocation=evopress", "prune.options.generations=3"), {}),
            ("target", (), {"target": {"ppl": "+5%"}}),
        ]
    }
    assert reads == {
        "wanda": 1,
        "sparsegpt": 1,
        "gblm": 1 + 2,  # forward, and backward
        "owl": 1 + 1 + 1,  # outliers, then two candidates at once
        "target": 1 + 1 + 3,  # the dense model, then eight sparsities at once
        "evopress": 1 + 1 + 1 + 3 + 1,  # inputs, each linear alone, generations, two candidates
    }


def test_more_reads_than_allowed_are_refused_with_their_number(plan_of: PlanOf) -> None:
    settings = ("prune.allocation=evopress", "prune.options.generations=200")
    with pytest.raises(RecipeError) as refused:
        plan_of(*settings)
    text = str(refused.value)
    assert text.startswith("prune.allocation: evopress would read the checkpoint 204 times")
    assert "where 100 are allowed" in text
    assert "--set prune.options.generations=" in text and "--set prune.max_reads=204" in text
    assert plan_of(*settings, "prune.max_reads=204").estimate.num_reads == 204


@pytest.mark.parametrize(
    ("settings", "wishes", "words"),
    [
        (("prune.options.alpha=3",), {}, r"prune\.options: .*'alpha'.*Wanda has none"),
        (
            ("prune.options.beta=3",),
            {"method": "gblm"},
            r"prune\.options: .*'beta'.* There are: alpha",
        ),
        (
            ("prune.allocation=owl", "prune.options.spred=0.1"),
            {},
            r"'spred'.*outliers \(5\), spread \(0\.08\)",
        ),
        (("prune.repair=halves", "prune.options.rounds=2"), {}, r"'rounds'.*epochs \(4\)"),
        (("prune.solver=zero",), {"method": "sparsegpt"}, r"prune\.solver: .*--method wanda"),
        (("prune.solver=none",), {"method": "alps"}, r"prune\.solver: .*columnwise"),
        (("prune.refine=swaps",), {"pattern": "4x4"}, r"prune\.refine: .*prune\.refine=none"),
        (("prune.permute=true",), {}, r"prune\.permute: .*--pattern 2:4"),
        (("prune.solver=columnwise",), {"pattern": "ffn-channels"}, r"prune\.pattern: ffn-"),
        (("prune.repair=halves", "prune.propagate=dense"), {}, r"prune\.propagate: .*pruned"),
        (("prune.damping=0",), {"method": "sparsegpt"}, r"prune\.damping"),
    ],
)
def test_parts_that_do_not_go_together_are_refused(
    plan_of: PlanOf, settings: tuple[str, ...], wishes: dict[str, Any], words: str
) -> None:
    with pytest.raises(RecipeError, match=words):
        plan_of(*settings, **wishes)


@pytest.mark.parametrize(
    ("setting", "known"),
    [
        ("prune.solver=colunmwise", "columnwise"),
        ("prune.refine=swap", "swaps"),
        ("prune.repair=halfs", "halves"),
        ("prune.allocation=evopres", "evopress"),
    ],
)
def test_a_part_that_does_not_exist_is_refused_with_the_likely_one(
    plan_of: PlanOf, setting: str, known: str
) -> None:
    with pytest.raises(UnknownName, match=known):
        plan_of(setting)


def test_a_number_out_of_range_ends_a_run_before_anything_is_cut(
    pico: Pico, tmp_path: Path, tokens: Tensor
) -> None:
    settings = ["prune.allocation=ecoflap", "prune.options.eps=0"]
    with pytest.raises(LlmpruneError, match=r"prune\.options\.eps: 0 is out of range"):
        api.prune(
            str(pico("llama")), sparsity=0.5, settings=settings, calib=tokens, quiet=True,
            out=tmp_path / "out", device="cpu",
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []
