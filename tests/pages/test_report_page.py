"""The page of a result shows what its report holds; what is measured later renews it."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llmprune
from llmprune import Report
from llmprune.base.errors import CheckpointError
from llmprune.base.progress import Progress
from llmprune.measuring import store_measurement
from llmprune.pages.distributions import merged
from llmprune.pages.result import report_page, write_page
from llmprune.recipe import build
from llmprune.report.kinds import by_kind
from llmprune.report.reproduction import command_text, wish_of
from llmprune.runs import run_recipe
from tests.conftest import Pico
from tests.pages.conftest import Reader
from tests.report.conftest import Result

MEASURE = ["evaluate.perplexity=true", "evaluate.num_windows=2", 'evaluate.prompts=["Hello"]']
ALWAYS = ["Summary", "How to make it again", "Where weights went", "Allocation against uniform"]
HOSTILE = "<script>alert(1)</script>\"'&"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pages")


@pytest.fixture
def folder(home: Path, result: Result, text_file: Path, tmp_path: Path) -> Path:
    """A copy of a result that was measured and wrote samples, made once."""
    made, copy_of_it = home / "result", tmp_path / "copy"
    if not made.exists():
        settings = [*MEASURE, f"evaluate.data={text_file}", "evaluate.new_tokens=4"]
        result("llama", settings=settings).rename(made)
    shutil.copytree(made, copy_of_it)
    return copy_of_it


def page_of(folder: Path) -> Reader:
    return Reader((folder / "llmprune" / "report.html").read_text(encoding="utf-8"))


def test_a_run_leaves_a_page_of_what_its_report_holds(folder: Path) -> None:
    reader, data = page_of(folder), Report.read(folder).data
    assert reader.of("h2") == [
        *ALWAYS, "Error by block", "Scores and activations", "Perplexity", "Samples",
        "What was left alone", "Warnings", "Text, versions and hashes",
    ]  # fmt: skip
    assert command_text(wish_of(data["run"])) in reader.of("pre")
    for kind in by_kind(data):
        assert kind.name in reader.of("th")
        assert f"{kind.sparsity:.4f}" in reader.of("td")
    for side in ("dense", "pruned"):
        assert f"{data['perplexity'][side]['value']:.3f}" in reader.of("td")
        (sample,) = data["samples"]["texts"]
        assert sample[side].strip() in reader.text
    for block in data["blocks"]:
        assert f"{block['error']:.4f}" in reader.of("td")
    assert data["run"]["tokens"] in reader.of("td")
    assert data["run"]["source"]["fingerprint"] in reader.of("td")
    assert data["run"]["versions"]["torch"] in reader.of("td")
    for row in data["skipped"]:
        assert row["reason"] in reader.of("td")


def test_the_same_report_gives_the_same_page(folder: Path, tmp_path: Path) -> None:
    first = (folder / "llmprune" / "report.html").read_bytes()
    assert write_page(folder, tmp_path / "new" / "page.html").read_bytes() == first


def test_a_later_measurement_renews_the_page(folder: Path, text_file: Path) -> None:
    assert page_of(folder).text.count("windows of 8 tokens") == 0
    store_measurement(folder, llmprune.perplexity(folder, data=text_file, seq_len=8, num_windows=3))
    assert "3 windows of 8 tokens, no BOS" in page_of(folder).of("td")
    (folder / "llmprune" / "report.html").unlink()
    store_measurement(folder, llmprune.perplexity(folder, data=text_file, seq_len=8, num_windows=4))
    assert not (folder / "llmprune" / "report.html").exists()


def test_names_prompts_and_warnings_cannot_smuggle_markup(folder: Path) -> None:
    data: dict[str, Any] = copy.deepcopy(dict(Report.read(folder).data))
    data |= {"out": f"x/{HOSTILE}", "warnings": [HOSTILE], "model": HOSTILE, "allocation": HOSTILE}
    data["run"]["source"]["name"] = data["run"]["wish"]["model"] = HOSTILE
    data["run"]["origin"]["name"] = HOSTILE
    data["run"]["versions"][HOSTILE] = HOSTILE
    data["samples"]["texts"][0] |= {"prompt": HOSTILE, "pruned": HOSTILE}
    data["skipped"].append({"what": HOSTILE, "num_params": 1, "reason": HOSTILE})
    data["files"][HOSTILE] = HOSTILE
    for block in data["blocks"]:
        for row in block["sites"]:
            row |= {"site": row["site"] + HOSTILE, "fallback": HOSTILE}
        block["spreads"]["activations"] = {HOSTILE: block["spreads"]["activations"]["attn_in"]}
    reader = Reader(report_page(data))
    assert reader.of("h3") == [HOSTILE]
    assert HOSTILE in reader.of("li")
    assert HOSTILE in reader.of("td")


def test_an_analysis_is_told_and_its_page_linked(folder: Path) -> None:
    data = Report.read(folder).data
    finding = {"title": "Alike", "means": [f"Block 1 moved furthest {HOSTILE}."]}
    analysis = {"findings": {"cka": finding, "pq": {"title": "Nothing", "means": []}}}
    reader = Reader(report_page(data, {}, analysis))
    assert "Analysis" in reader.of("h2")
    assert f"Alike: Block 1 moved furthest {HOSTILE}." in reader.of("li")
    assert "All tables and charts" in reader.of("a")
    assert not any("Nothing" in text for text in reader.of("li"))
    assert "Analysis" not in Reader(report_page(data)).of("h2")


def test_tasks_and_speed_stand_beside_the_dense_model(folder: Path) -> None:
    spread = {"median": 20.0, "low": 19.0, "high": 21.0, "values": [20.0]}
    speed = {"batch": 1, "prefill": spread, "decode": spread, "first_token": spread, "memory": 1000}
    model = {"name": HOSTILE, "dtype": "float32", "device": "cpu", "speeds": [speed]}
    score = {"task": "arc", "metric": "acc", "filter": "none", "value": 0.25, "stderr": 0.01}
    facts = {"version": 1, "num_fewshot": 0, "num_items": 5, "num_items_in_all": 9}
    tasks = {
        "scores": {"dense": [score | {"value": 0.5}], "pruned": [score]},
        "tasks": {"arc": facts},
        "settings": {"lm_eval": "0.4"},
    }
    bench = {"model": model, "against": None, "prompt": 8, "new": 4, "repeat": 1}
    data = Report.read(folder).data
    reader = Reader(report_page(data, {"tasks": [tasks], "speed": [bench]}))
    assert {"Tasks", "Speed"} < set(reader.of("h2"))
    assert {"0.5000 ± 0.0100", "0.2500 ± 0.0100", "-50.0 %", "20.0"} < set(reader.of("td"))
    assert HOSTILE in reader.of("th")


def test_an_allocation_is_told_apart_from_equal_shares(folder: Path) -> None:
    data: dict[str, Any] = copy.deepcopy(dict(Report.read(folder).data))
    assert "uniform: every block lost the same share." in Reader(report_page(data)).of("p")
    data["blocks"][0]["sparsity"] += 0.125
    told = Reader(report_page(data | {"allocation": "owl"})).of("p")
    assert "owl: blocks are up to 0.125 from the share that uniform gives to all." in told


def test_spreads_of_all_blocks_add_up(folder: Path) -> None:
    data = Report.read(folder).data
    for kind in by_kind(data):
        counts = merged(data, "scores")[kind.name]
        assert sum(counts["removed"].values()) == kind.removed
        assert sum(counts["kept"].values()) == kind.weights - kind.removed


def test_reports_of_many_blocks_and_of_experts_have_pages(
    result: Result, many_blocks: Callable[[Report, int], Report]
) -> None:
    report = many_blocks(Report.read(result("mixtral")), 80)
    reader = Reader(report_page(report.data))
    assert "mlp.experts.*.up_proj" in reader.of("th")
    assert "There are none: none was asked for." in reader.of("p")
    assert "None was measured. This measures it:" in reader.of("p")


def test_a_report_without_what_later_versions_count_has_a_page(folder: Path) -> None:
    data: dict[str, Any] = copy.deepcopy(dict(Report.read(folder).data))
    for key in ("samples", "calibration", "sizes", "facts", "gate"):
        del data[key]
    for block in data["blocks"]:
        del block["spreads"]
    assert "Scores and activations" not in Reader(report_page(data)).of("h2")


def test_a_model_in_memory_has_a_page(make_model: Callable[..., Any], tokens: Any) -> None:
    report = llmprune.prune(make_model("llama"), sparsity=0.5, calib=tokens, quiet=True)
    assert Reader(report_page(report.data)).of("h1") == ["a model in memory"]


@pytest.mark.parametrize("data", [{}, {"blocks": []}, {"blocks": 3, "out": None}])
def test_what_is_no_report_is_refused(data: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="prune again with --overwrite"):
        report_page(data)


def test_a_recovered_result_has_its_losses(
    pico: Pico, text_file: Path, tmp_path: Path, quick_gate: None
) -> None:
    train = {"steps": 2, "batch": 2, "seq_len": 16, "data": str(text_file)}
    steps = [{"prune": {"method": "magnitude", "sparsity": 0.5}}, {"recover": train}]
    steps.append({"evaluate": {"perplexity": False, "prompts": ["Hi"], "new_tokens": 2}})
    out = tmp_path / "out"
    wish = {"model": str(pico("llama")), "out": str(out), "steps": steps}
    run_recipe(build(wish), Progress("quiet"))
    reader = page_of(out)
    assert "Training" in reader.of("h2")
    assert reader.of("h3") == ["Hi"]
    assert "before" in reader.of("p")
    assert any("recover:" in text for text in reader.of("pre"))
    assert "llmprune --recipe recipe.yaml" in reader.of("pre")


def test_show_says_where_the_page_lies(folder: Path, command: Any, tmp_path: Path) -> None:
    own = folder / "llmprune" / "report.html"
    own.unlink()
    assert command("show", folder).out.splitlines()[-1] == f"page: {own}"
    assert own.exists()
    other = tmp_path / "there" / "page.html"
    assert f"page: {other}" in command("show", folder, "--html", other).out
    assert other.read_bytes() == own.read_bytes()
    (tmp_path / "file").write_text("")
    for wrong in (tmp_path, tmp_path / "file" / "page.html"):
        ended = command("show", folder, "--html", wrong)
        assert ended.code == 2
        assert "Traceback" not in ended.err


def test_a_page_that_cannot_be_written_costs_no_result(
    result: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llmprune.pages.result.settle", fail)
    folder = result("llama")
    assert Report.read(folder).sparsity == pytest.approx(0.5, abs=1e-3)
    assert not list((folder / "llmprune").glob("*report.html*"))
    events = (folder / "llmprune" / "events.jsonl").read_text().splitlines()
    assert any("report.html was not written" in json.dumps(json.loads(line)) for line in events)
