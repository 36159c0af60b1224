"""A target of perplexity: the highest sparsity that keeps it, found before the cut."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from llmprune import api, cli
from llmprune.allocation.types import Candidate, Measured
from llmprune.base.errors import RecipeError
from llmprune.engine import cutting, planning
from llmprune.engine.probing import Prober
from llmprune.engine.target import ROUNDS, SPLITS
from llmprune.report.run import Report

Pico = Callable[..., Path]
Prune = Callable[..., Report]
LENGTH = 24

pytestmark = pytest.mark.usefixtures("quick_gate")


@pytest.fixture(scope="module")
def own_text(pico: Pico, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a dense llama likes to write, in windows of LENGTH: what is left of it likes it less."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        pico("llama", tied=False), dtype=torch.float32
    ).eval()
    draw = torch.Generator().manual_seed(0)
    ids_NT = torch.randint(2, 54, (40, 1), generator=draw)
    with torch.no_grad():
        for _ in range(LENGTH - 1):
            chances = (2 * model(input_ids=ids_NT).logits[:, -1]).softmax(-1)
            chances[:, [0, 1, *range(54, 64)]] = 0  # letters alone
            ids_NT = torch.cat((ids_NT, chances.multinomial(1, generator=draw)), dim=1)
    path = tmp_path_factory.mktemp("own") / "text.txt"
    path.write_text("".join(tokenizer.convert_ids_to_tokens(ids_NT.flatten().tolist())))
    return path


@pytest.fixture
def prune(tmp_path: Path, own_text: Path) -> Prune:
    """Prune a folder into `tmp_path / out` on its own text, within 20 % of its perplexity."""

    def run(folder: Path, out: str = "out", **wishes: Any) -> Report:
        defaults: dict[str, Any] = {
            "out": tmp_path / out, "method": "magnitude", "calib": str(own_text), "num_samples": 8,
            "seq_len": LENGTH, "device": "cpu", "dtype": "float32", "quiet": True,
            "target": {"ppl": "+20%"},
        }  # fmt: skip
        settings = [f"evaluate.data={own_text}", *wishes.pop("settings", ())]
        return api.prune(str(folder), settings=settings, **(defaults | wishes))

    return run


def target_of(report: Report) -> dict[str, Any]:
    found = report.data["target"]
    assert isinstance(found, dict)
    return found


def contents(folder: Path | None) -> dict[str, bytes]:
    """Return every file of a result, without what tells of the run itself."""
    assert folder is not None
    own = {
        f"llmprune/{name}" for name in ("report.json", "report.html", "events.jsonl", "run.json")
    }
    return {
        name: path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and (name := str(path.relative_to(folder))) not in own
    }


@pytest.mark.parametrize(
    "wishes",
    [
        {},
        {"method": "wanda"},
        {"method": "sparsegpt"},
        pytest.param({"method": "wanda++"}, marks=pytest.mark.slow),
        pytest.param({"method": "gblm", "pattern": "4x4"}, marks=pytest.mark.slow),
        pytest.param({"settings": ["prune.repair=halves"]}, marks=pytest.mark.slow),
    ],
)
def test_the_highest_sparsity_within_the_target_is_found(
    pico: Pico, prune: Prune, wishes: dict[str, Any]
) -> None:
    report = prune(pico("llama", tied=False), **wishes)
    target = target_of(report)
    assert report.perplexity is not None
    dense, pruned = report.perplexity
    assert target["asked"] == {"ppl": "+20%"}
    assert target["dense"] == pytest.approx(dense, rel=1e-5)
    assert target["limit"] == pytest.approx(1.2 * dense, rel=1e-5)
    assert target["reached"] == pruned and target["met"] == (pruned <= target["limit"])
    looked = {float(share): value for share, value in target["looked_at"].items()}
    assert len(looked) <= SPLITS * ROUNDS
    found = target["sparsity"]
    step = 0.9 / SPLITS**ROUNDS
    nearest = min(looked, key=lambda share: abs(share - found))
    assert abs(nearest - found) <= 2e-4 and looked[nearest] == target["expected"]
    assert target["expected"] <= target["limit"]
    above = [value for share, value in looked.items() if nearest < share < nearest + 1.5 * step]
    assert above and all(value > target["limit"] for value in above)
    assert report.sparsity == pytest.approx(found, abs=2e-3)
    assert report.data["sparsity_asked"] == found


def test_what_was_expected_of_magnitude_is_what_comes(pico: Pico, prune: Prune) -> None:
    """No text decides the masks, so nothing differs between the search and the cut."""
    report = prune(pico("gpt2"))
    target = target_of(report)
    assert target["reached"] == pytest.approx(target["expected"], rel=5e-3)
    plain = prune(pico("gpt2"), "plain", target=None, sparsity=target["sparsity"])
    for path in sorted((report.out or Path()).glob("*.safetensors")):
        one, two = load_file(path), load_file((plain.out or Path()) / path.name)
        assert all(torch.equal(value, two[name]) for name, value in one.items())


@pytest.mark.slow
def test_a_value_means_the_same_as_the_rise_to_it(pico: Pico, prune: Prune) -> None:
    rise = prune(pico("llama", tied=False), "rise")
    value = prune(
        pico("llama", tied=False), "value", target={"ppl": repr(target_of(rise)["limit"])}
    )
    assert target_of(value)["sparsity"] == target_of(rise)["sparsity"]
    assert contents(value.out) == contents(rise.out)


def test_no_more_goes_than_the_sparsity_given(pico: Pico, prune: Prune) -> None:
    report = prune(pico("llama", tied=False), sparsity=0.1)
    assert target_of(report)["sparsity"] == 0.1 and target_of(report)["met"]
    assert len(target_of(report)["looked_at"]) == SPLITS  # the most was within: one round


@pytest.mark.slow
def test_shares_of_an_allocation_come_on_top(pico: Pico, prune: Prune) -> None:
    settings = ["prune.allocation=owl", "prune.adopt=always"]
    report = prune(pico("llama", tied=False), method="wanda", settings=settings)
    even = prune(pico("llama", tied=False), "even", method="wanda")
    assert target_of(report)["sparsity"] == target_of(even)["sparsity"]
    assert report.data["verdict"]["adopted"]
    assert abs(report.sparsity - target_of(report)["sparsity"]) < 1e-3
    one, two = contents(report.out), contents(even.out)
    assert any(one[name] != two[name] for name in two if name.endswith(".safetensors"))


def test_units_that_are_zeroed_may_be_looked_for(pico: Pico, prune: Prune) -> None:
    settings = ["prune.form=masked"]
    wishes: dict[str, Any] = {"pattern": "ffn-channels", "sparsity": 0.5, "method": "wanda"}
    few = {"target": {"ppl": "+10%"}}
    report = prune(pico("llama", tied=False), settings=settings, **(wishes | few))
    target = target_of(report)
    assert 0 < target["sparsity"] < 0.5
    plain = prune(pico("llama", tied=False), "plain", settings=settings, target=None,
                  **(wishes | {"sparsity": target["sparsity"]}))  # fmt: skip
    assert contents(plain.out) == contents(report.out)


def test_hidden_states_on_disk_find_the_same(
    pico: Pico, prune: Prune, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = prune(pico("llama", tied=False), "host", method="sparsegpt")
    decide = planning.estimate
    monkeypatch.setattr(
        planning, "estimate", lambda *a, **k: replace(decide(*a, **k), place="disk")
    )
    disk = prune(pico("llama", tied=False), "disk", method="sparsegpt")
    assert target_of(disk) == target_of(host)
    assert contents(disk.out) == contents(host.out)


class Stop(Exception):
    """Stands for an interruption."""


def stop_at(patch: pytest.MonkeyPatch, owner: Any, name: str, nth: int) -> None:
    """Let the n-th call of a function be interrupted."""
    original, calls = getattr(owner, name), 0

    def stopping(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == nth:
            raise Stop
        return original(*args, **kwargs)

    patch.setattr(owner, name, stopping)


@pytest.mark.parametrize(
    ("owner", "name", "nth"), [(Prober, "_walk", 2), (cutting, "_decide", 2)], ids=["search", "cut"]
)
def test_an_interrupted_run_resumes_to_the_same_bytes(
    pico: Pico, prune: Prune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any,
    name: str, nth: int,
) -> None:  # fmt: skip
    walked: list[int] = []
    walk = Prober._walk

    def counted(self: Prober, candidates: Sequence[Candidate]) -> list[Measured]:
        found = walk(self, candidates)
        walked.append(len(candidates))
        return found

    monkeypatch.setattr(Prober, "_walk", counted)
    whole = prune(pico("llama", tied=False), "whole", method="wanda")
    total = sum(walked)
    walked.clear()
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, owner, name, nth)
        with pytest.raises(Stop):
            prune(pico("llama", tied=False), method="wanda")
    assert (tmp_path / "out.partial").is_dir()
    assert (sum(walked) == total) == (name == "_decide")
    resumed = prune(pico("llama", tied=False), method="wanda")
    assert sum(walked) == total  # nothing twice
    assert target_of(resumed) == target_of(whole)
    assert contents(resumed.out) == contents(whole.out)


@pytest.mark.parametrize(
    ("wishes", "words"),
    [
        ({"target": {"ppl": "little"}}, r"target: .*'little'.*--target ppl=\+5%"),
        ({"target": {"loss": "+5%"}}, r"target: .*'loss'.*--target ppl=\+5%"),
        ({"pattern": "2:4"}, r"target: pattern '2:4' fixes the sparsity.*Leave the target out"),
        ({"target": {"ppl": "1.5"}}, r"ppl=1\.5 allows 1\.5, the dense model has .* Allow more"),
        ({"pattern": "ffn-channels"}, r"prune\.target: ffn-channels .*prune\.form=masked"),
        (
            {"settings": ["evaluate.data=no.txt"]},
            r"prune\.target: there is no text.*--set evaluate.data=demo",
        ),
    ],
)
def test_a_target_that_cannot_be_is_refused_and_leaves_nothing(
    pico: Pico, prune: Prune, tmp_path: Path, wishes: dict[str, Any], words: str
) -> None:
    with pytest.raises(RecipeError, match=words):
        prune(pico("llama", tied=False), **wishes)
    assert list(tmp_path.iterdir()) == []


def test_a_model_in_memory_has_no_target(make_model: Callable[..., Any], tokens: Tensor) -> None:
    with pytest.raises(RecipeError, match=r"prune\.target: .* Give the folder .*--sparsity"):
        api.prune(make_model("llama"), target={"ppl": "+5%"}, calib=tokens, quiet=True)


@pytest.fixture
def command(
    pico: Pico, own_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run the command line on the llama; return its code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        fixed = [
            *("--model", pico("llama", tied=False), "--calib", own_text, "--num-samples", 8),
            *("--seq-len", LENGTH, "--set", f"evaluate.data={own_text}", "--out", tmp_path / "out"),
        ]
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main([str(argument) for argument in [*fixed, *arguments]])
        out, err = capsys.readouterr()
        return int(left.value.code or 0), out, err

    return run


def test_the_command_says_what_it_found_and_what_came(
    command: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    code, out, _ = command("--target", "ppl=+20%", "--method", "magnitude")
    assert code == 0
    data = json.loads((tmp_path / "out/llmprune/report.json").read_text())
    target = data["target"]
    line = next(line for line in out.splitlines() if line.startswith("target"))
    assert f"sparsity {target['sparsity']:.4f}" in line
    assert f"reached {target['reached']:.3f}" in line
    assert math.isclose(target["reached"], data["perplexity"]["pruned"]["value"])
    assert "already holds this result" in command("--target", "ppl=+20%", "--method",
                                                  "magnitude")[1]  # fmt: skip
    code, _, err = command("--target", "ppl=+10%", "--method", "magnitude")
    assert code == 2 and "ppl: '+20%' then, '+10%' now" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--target", "ppl=much"), "is no target"),
        (("--target", "ppl"), "ppl=+5%"),
        (("--target", "ppl=+5%", "--pattern", "2:4"), "fixes the sparsity"),
        (("--target", "ppl=1.5"), "Allow more"),
    ],
)
def test_the_command_ends_with_2_where_a_target_cannot_be(
    command: Callable[..., tuple[int, str, str]], tmp_path: Path, arguments: tuple[str, ...],
    words: str,
) -> None:  # fmt: skip
    code, out, err = command(*arguments)
    assert code == 2 and words in err
    assert "Traceback" not in out + err
    assert list(tmp_path.iterdir()) == []
