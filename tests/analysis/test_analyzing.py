"""`analyze`: a result beside its dense model, what is written of it, and what does not apply."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import llmprune
from llmprune import api, cli
from llmprune.analyzing import TITLES, chosen, default_folder
from llmprune.base.errors import RecipeError, UnknownName
from llmprune.pages.analysis_result import Analysis, check_folder

Make = Callable[..., Path]
SMALL: dict[str, Any] = {"num_windows": 2, "seq_len": 24}


class _Verdict:
    """Stands in for what the gate says, which has tests of its own."""

    def to_dict(self) -> dict[str, Any]:
        return {"folder": ""}


@pytest.fixture(scope="session")
def pruned(
    pico: Callable[..., Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Make:
    """Return what prunes a pico model: `pruned("name", **wishes)`, once for each name."""
    home = tmp_path_factory.mktemp("pruned")

    def make(name: str, **wishes: Any) -> Path:
        out = home / name
        wishes = {"sparsity": 0.5, "method": "magnitude", **wishes}
        more = wishes.pop("settings", [])
        if out.exists():
            return out
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("llmprune.steps.pass_gate", lambda *args, **kwargs: _Verdict())
            api.prune(
                pico("llama"),
                **wishes,
                out=out,
                calib=str(text_file),
                num_samples=2,
                seq_len=16,
                settings=[f"evaluate.data={text_file}", "evaluate.perplexity=false", *more],
                quiet=True,
            )
        return out

    return make


@pytest.fixture(scope="session")
def masked(pruned: Make) -> Path:
    return pruned("masked")


@pytest.fixture(scope="session")
def found(masked: Path, text_file: Path) -> Analysis:
    return llmprune.analyze(masked, data=text_file, **SMALL)


def test_all_that_applies_is_found(found: Analysis, masked: Path) -> None:
    assert list(found.findings) == [name for name in TITLES if name != "between"]
    assert not any(finding.is_empty for finding in found.findings.values())
    assert found.model == str(masked)
    for finding in found.findings.values():
        assert all(len(row) == len(finding.columns) for row in finding.rows), finding.name
        assert finding.title in repr(found) and finding.means[0] in repr(found)
    assert "<details" in found._repr_html_()


def test_numbers_agree_with_other_measurements(
    found: Analysis, masked: Path, pico: Any, text_file: Path
) -> None:
    numbers = found.findings["kl"].numbers
    for side, folder in (("pruned", masked), ("dense", pico("llama"))):
        asked = api.perplexity(folder, data=text_file, **SMALL)
        assert numbers[f"{side} perplexity"] == pytest.approx(asked.value, rel=1e-4)
    assert found.findings["robustness"].numbers["clean"] == pytest.approx(
        numbers["pruned perplexity"], rel=1e-4
    )
    shares = [row[-1] for row in found.findings["pq"].rows]
    assert all(share == pytest.approx(0.5, abs=0.01) for share in shares)


def test_a_model_beside_itself_has_not_moved(pico: Any, text_file: Path) -> None:
    folder = pico("llama")
    only = ["cka", "kl", "influence"]
    same = llmprune.analyze(folder, against=folder, only=only, data=text_file, **SMALL)
    assert all(row[1] == pytest.approx(1) for row in same.findings["cka"].rows)
    assert same.findings["kl"].numbers["kl"] == pytest.approx(0, abs=1e-6)
    assert same.findings["kl"].numbers["same token"] == 1
    assert all(row[1] == row[2] for row in same.findings["influence"].rows)


def test_without_the_dense_model_what_needs_it_says_so(pico: Any, text_file: Path) -> None:
    alone = llmprune.analyze(pico("llama"), data=text_file, **SMALL)
    for name in ("cka", "kl", "worst"):
        assert alone.findings[name].is_empty and "--against" in alone.findings[name].means[0]
    assert not alone.findings["outliers"].is_empty
    assert alone.findings["pq"].rows[0][2] is None
    with pytest.raises(UnknownName, match="plot"):
        alone.plot("cka")


def test_channels_that_are_gone_and_blocks_that_are_gone(pruned: Make, text_file: Path) -> None:
    narrow = pruned("narrow", method="magnitude-struct", pattern="ffn-channels", sparsity=0.25)
    found = llmprune.analyze(narrow, data=text_file, only=["cka", "pq", "dead"], **SMALL)
    assert all(row[1] < 1 for row in found.findings["cka"].rows)
    assert {row[-1] for row in found.findings["pq"].rows} > {0.0}
    ends = ["prune.options.first=0", "prune.options.last=0"]
    short = pruned("short", method="shortgpt", pattern="blocks", sparsity=0.5, settings=ends)
    found = llmprune.analyze(short, data=text_file, only=["cka", "influence"], **SMALL)
    left = [row[2] for row in found.findings["cka"].rows]
    assert "no" in left and "yes" in left
    assert sum(row[2] is None for row in found.findings["influence"].rows) == left.count("no")


def test_blocks_that_differ_come_with_code_that_is_ours(pruned: Make, text_file: Path) -> None:
    mixed = pruned("mixed", method="flap", sparsity=0.3)
    assert list(mixed.glob("*.py"))
    found = llmprune.analyze(mixed, data=text_file, only=["cka", "dead", "kl"], **SMALL)
    assert not any(finding.is_empty for finding in found.findings.values())
    assert found.findings["kl"].numbers["kl"] > 0


def test_another_vocabulary_has_no_tokens_to_compare(
    masked: Path, tmp_path: Path, text_file: Path, make_model: Any, tokenizer: Any
) -> None:
    other = tmp_path / "other"
    model = make_model("llama")
    model.resize_token_embeddings(72)
    model.save_pretrained(other)
    tokenizer.save_pretrained(other)
    only = ["cka", "kl", "worst"]
    found = llmprune.analyze(masked, against=other, data=text_file, only=only, **SMALL)
    assert not found.findings["cka"].is_empty
    assert "64 and 72 entries" in found.findings["kl"].means[0]
    assert found.findings["worst"].is_empty


def test_the_line_between_two_results(
    masked: Path, pruned: Make, pico: Any, text_file: Path
) -> None:
    def line(other: Path) -> Any:
        asked: dict[str, Any] = {"between": other, "only": ["between"], "data": text_file}
        return llmprune.analyze(masked, **asked, **SMALL).findings["between"]

    itself = line(masked)
    assert itself.numbers["barrier"] == pytest.approx(0, abs=1e-6)
    assert itself.numbers["shared"] == 1
    more = line(pruned("more", sparsity=0.6))
    assert more.numbers["shared"] == pytest.approx(5 / 6, abs=0.02)
    assert more.rows[0][1] == itself.rows[0][1] != more.rows[-1][1]
    assert "only one of the two" in line(pico("gpt2")).means[0]


def test_what_is_written_can_be_read(found: Analysis, tmp_path: Path) -> None:
    few = {name: found.findings[name] for name in ("pq", "kl", "worst")}  # pictures take long
    found = replace(found, findings=few)
    out = found.save(tmp_path / "deep" / "analysis")
    names = {path.name for path in out.iterdir()}
    assert {"analysis.json", "analysis.html"} <= names
    content = json.loads((out / "analysis.json").read_text(encoding="utf-8"))
    for name, finding in found.findings.items():
        assert {f"{name}.csv", f"{name}.png"} <= names
        with (out / f"{name}.csv").open(encoding="utf-8", newline="") as file:
            head, *rows = csv.reader(file)
        assert tuple(head) == finding.columns and len(rows) == len(finding.rows)
        assert content["findings"][name]["means"] == list(finding.means)
    page = (out / "analysis.html").read_text(encoding="utf-8")
    assert page.count("<section") == len(found.findings) + 1 and "<svg" in page
    found.save(out)  # an earlier analysis is replaced
    assert {path.name for path in out.parent.iterdir()} == {"analysis"}


def test_a_folder_of_other_things_is_left_alone(found: Analysis, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(RecipeError, match="no earlier analysis"):
        found.save(tmp_path)
    with pytest.raises(RecipeError, match="--out"):
        check_folder(tmp_path / "mine.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_names_that_are_not_there_and_numbers_that_measure_nothing(masked: Path) -> None:
    with pytest.raises(UnknownName, match="Did you mean 'cka'"):
        chosen(["cak"])
    assert chosen("pq, dead") == {"pq", "dead"}
    with pytest.raises(RecipeError, match="num_windows: 0"):
        llmprune.analyze(masked, num_windows=0)
    with pytest.raises(RecipeError, match="seq_len"):
        llmprune.analyze(masked, seq_len=10**7)


def test_the_command_writes_beside_the_result(
    masked: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["analyze", str(masked), "--data", str(text_file), "--num-windows", "2"]
    with pytest.raises(SystemExit) as ended:
        cli.main([*asked, "--seq-len", "24", "--only", "pq,cka", "--json"])
    assert not ended.value.code
    said = json.loads(capsys.readouterr().out)
    assert list(said["findings"]) == ["pq", "cka"]
    assert "--only pq,cka" in said["command"]
    assert default_folder(masked) == masked / "llmprune" / "analysis"
    assert (default_folder(masked) / "cka.csv").exists()
    with pytest.raises(SystemExit) as ended:
        cli.main([*asked, "--only", "kll"])
    assert ended.value.code == 2 and "Did you mean 'kl'" in capsys.readouterr().err
