"""Task scores of a result and its dense model, side by side, in Python and on the command line."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmprune import cli, measuring
from llmprune.api import evaluate, perplexity, rolling_perplexity, store_measurement
from llmprune.base.errors import RecipeError, TooLarge
from llmprune.evaluation.scores import Evaluation, Score, TaskFacts
from tests.evaluation.conftest import TASKS

CLOZE = str(TASKS / "demo_cloze.yaml")
FEW: dict[str, Any] = {"limit": 24, "batch_size": 8, "device": "cpu"}


@pytest.fixture(scope="module")
def both(result: Path) -> Evaluation:
    return evaluate(result, CLOZE, **FEW)


def test_a_result_stands_beside_the_model_it_came_from(both: Evaluation, result: Path) -> None:
    assert both.models == {"dense": "demo", "pruned": str(result)}
    for metric in ("acc", "acc_norm"):
        assert both.value("demo_cloze", metric, "dense") > both.value(
            "demo_cloze", metric, "pruned"
        )
    assert all(score.stderr and score.higher_is_better for score in both.scores["dense"])
    assert both.tasks["demo_cloze"] == TaskFacts(
        version="2.0", num_fewshot=0, num_items=24, num_items_in_all=200
    )
    assert both.notes == ()
    head, first, *_ = str(both).splitlines()
    assert head.split() == ["task", "metric", "dense", "pruned", "difference"]
    assert first.startswith("demo_cloze") and "±" in first and first.split()[-1].startswith("-")
    with pytest.raises(KeyError, match="no f1 of demo_cloze"):
        both.value("demo_cloze", "f1", "dense")


def test_the_numbers_are_those_of_the_harness_alone(both: Evaluation, result: Path) -> None:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    lm = HFLM(pretrained=str(result), device="cpu", dtype="float32", batch_size=8)
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(TASKS)
        tasks = manager.load(["demo_cloze"])
    found = lm_eval.evaluate(lm, tasks, limit=24, log_samples=False)["results"]["demo_cloze"]
    for score in both.scores["pruned"]:
        assert score.value == found[f"{score.metric},none"]
        assert score.stderr == pytest.approx(found[f"{score.metric}_stderr,none"])


def test_scores_are_looked_up_where_nothing_changed(
    result: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "result"
    shutil.copytree(result, folder)
    few: dict[str, Any] = {**FEW, "limit": 2, "baseline": None}
    first = evaluate(folder, CLOZE, **few)
    runs: list[int] = []
    real = measuring.run_tasks
    monkeypatch.setattr(
        measuring, "run_tasks", lambda *args, **more: runs.append(1) or real(*args, **more)
    )
    again = evaluate(folder, CLOZE, **few)
    assert again.scores == first.scores and again.tasks == first.tasks and not runs
    assert "measured before" in str(again) and "measured before" not in str(first)
    evaluate(folder, CLOZE, cache=False, **few)
    evaluate(folder, CLOZE, **few | {"limit": 3})
    assert len(runs) == 2
    shard = next(folder.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1  # one bit of one weight
    shard.write_bytes(data)
    evaluate(folder, CLOZE, **few)
    assert len(runs) == 3
    (tmp_path / "cache" / "scores").rename(tmp_path / "kept")
    for path in (tmp_path / "kept").iterdir():
        path.write_text("{}")
    (tmp_path / "kept").rename(tmp_path / "cache" / "scores")
    evaluate(folder, CLOZE, **few)  # what cannot be read is measured anew
    assert len(runs) == 4


def test_equal_models_see_equal_examples(result: Path) -> None:
    """Requests that the model cannot hold are cut, which is said."""
    options: dict[str, Any] = {"limit": 2, "num_fewshot": 14, "device": "cpu"}
    found = evaluate(result, [CLOZE], baseline=result, **options)
    assert [score.value for score in found.scores["dense"]] == [
        score.value for score in found.scores["pruned"]
    ]
    assert "demo_cloze: version 2.0, 2 of 200 items, 14-shot" in str(found)
    (note,) = found.notes
    assert "longer than the model takes" in note


def test_a_model_without_records_stands_alone(
    pico: Callable[..., Path], stock: Callable[[Path], Any], tokenizer: Any, tmp_path: Path
) -> None:
    folder = pico("llama")
    own = tmp_path / "task.yaml"
    (tmp_path / "rows.jsonl").write_text(
        '{"context": "ab", "choices": ["cd", "ef"], "label": 1}\n' * 3
    )
    own.write_text(Path(CLOZE).read_text().replace("demo_cloze.jsonl", "rows.jsonl"))
    named = evaluate(str(folder), str(own), device="cpu")
    model = stock(folder).train()
    held = evaluate(model, own, tokenizer)
    assert named.models == {"model": str(folder)} and held.models == {"model": "in memory"}
    assert named.scores == held.scores
    assert model.training and tokenizer.pad_token is None
    with pytest.raises(RecipeError, match="pass the model's tokenizer"):
        evaluate(model, str(own))
    (tmp_path / "rows.jsonl").write_text(
        '{"context": "ab", "choices": ["cd"], "label": 0}\n'
        '{"context": "ab", "choices": [], "label": 0}\n'
    )
    with pytest.raises(RecipeError, match=r"^tasks: lm_eval stopped .*An item may lack"):
        evaluate(model, own, tokenizer)
    assert model.training


def test_a_dense_model_that_is_gone_or_changed_is_said(result: Path, tmp_path: Path) -> None:
    folder = tmp_path / "result"
    shutil.copytree(result, folder)
    record = folder / "llmprune" / "run.json"
    run = json.loads(record.read_text())
    few = FEW | {"limit": 2}
    run["origin"]["fingerprint"] = "another"
    record.write_text(json.dumps(run))
    (note,) = evaluate(folder, CLOZE, **few).notes
    assert "demo is not what it was" in note
    run["origin"] = {"name": "/nowhere/model", "folder": "/nowhere/model", "revision": None}
    record.write_text(json.dumps(run))
    found = evaluate(folder, CLOZE, **few)
    assert list(found.scores) == ["pruned"] and "difference" not in str(found)
    assert "the dense model is not measured" in found.notes[0]
    assert evaluate(folder, CLOZE, baseline=None, **few).notes == ()


def test_what_does_not_fit_into_memory_is_refused_before_it_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory = SimpleNamespace(available=1_000_000)
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    with pytest.raises(TooLarge, match=r"need 0.02 GB, and of memory 0.00 GB are free"):
        evaluate("demo", CLOZE, device="cpu")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"limit": 0}, "limit: 0 measures nothing"),
        ({"batch_size": 0}, "batch_size: 0 measures nothing"),
        ({"num_fewshot": -1}, "num_fewshot: -1 examples cannot be shown"),
        ({"limit": 1, "num_fewshot": 500}, "lm_eval stopped .*--num-fewshot"),
        ({"limit": 1, "apply_chat_template": True}, "this tokenizer has no chat template"),
    ],
)
def test_wishes_that_cannot_be_met_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        evaluate("demo", CLOZE, device="cpu", **options)


def test_measurements_of_a_result_are_kept(both: Evaluation, result: Path, book: Path) -> None:
    options: dict[str, Any] = {"data": str(book), "seq_len": 64, "device": "cpu"}
    tokens, words = perplexity(result, **options), rolling_perplexity(result, **options)
    for found in (tokens, words, both, both):
        assert store_measurement(result, found)
    kept = json.loads((result / "llmprune" / "evaluations.json").read_text())
    assert {kind: len(rows) for kind, rows in kept.items()} == {
        "perplexity": 1,
        "rolling": 1,
        "tasks": 2,
    }
    assert kept["tasks"][0] == both.to_dict()
    assert kept["tasks"][0]["settings"]["limit"] == 24
    assert not store_measurement("demo", tokens) and not store_measurement(book.parent, tokens)


def test_the_command_prints_tables_and_json(
    result: Path, book: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            cli.main(["eval", *map(str, arguments), "--device", "cpu"])
        return int(left.value.code or 0), *capsys.readouterr()

    few = ("--tasks", CLOZE, "--limit", 2, "--baseline", "none")
    code, out, err = run(result, *few)
    assert (code, err) == (0, "") and "perplexity" not in out
    assert out.startswith("task        metric             pruned\ndemo_cloze  acc")
    code, out, _ = run(result, *few, "--perplexity", book, "--seq-len", 64, "--json")
    text, tasks = map(json.loads, out.splitlines())
    assert (code, text["seq_len"], tasks["tasks"]["demo_cloze"]["num_items"]) == (0, 64, 2)
    code, out, _ = run(result, "--perplexity", book, "--rolling", "--seq-len", 64)
    assert code == 0 and "by word" in out
    code, _, err = run("demo", "--rolling", "--stride", 3)
    assert code == 2 and "rolling: scores the whole text" in err
    code, _, err = run("demo", "--perplexity", "")
    assert code == 2 and "perplexity: '' names no text" in err
    code, _, err = run("demo", "--bos", "maybe", "--num-windows", 1)
    assert code == 2 and "auto, true, false" in err


@pytest.mark.slow
def test_last_words_tell_the_dense_demo_from_chance_and_not_the_pruned_one(result: Path) -> None:
    path = TASKS / "demo_last_word.jsonl"
    items = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    said = [
        {word for word in re.findall(r"[^\W_]+", item["context"]) if len(word) > 3}
        for item in items
    ]
    chance = sum(1 / len({word for word in words if word.islower()}) for words in said) / len(said)
    found = evaluate(result, "demo_last_word", batch_size=16, device="cpu")
    scores = {
        role: next(score for score in found.scores[role] if score.metric == "acc")
        for role in ("dense", "pruned")
    }
    dense, pruned = scores["dense"], scores["pruned"]
    assert dense.stderr and dense.value >= chance + 4 * dense.stderr
    assert pruned.value <= chance + 2 * (pruned.stderr or 0)


@pytest.mark.slow
def test_the_dense_demo_is_far_above_chance_and_the_pruned_one_below_it(result: Path) -> None:
    found = evaluate(result, CLOZE, batch_size=16, device="cpu")
    for metric in ("acc", "acc_norm"):
        dense, pruned = (found.value("demo_cloze", metric, of) for of in ("dense", "pruned"))
        assert dense >= 0.25 + 4 * (dense * (1 - dense) / 200) ** 0.5
        assert pruned < dense


def test_scores_without_an_error_and_with_a_filter_are_printed() -> None:
    score = Score(
        task="t", metric="match", filter="strict", value=3.0, stderr=None, higher_is_better=None
    )
    found = Evaluation(
        models={"model": "x"},
        scores={"model": (score,)},
        tasks={},
        settings={"lm_eval": "0", "seed": 0, "computed": {"model": "float32 on cpu"}},
    )
    assert found.table() == "task  metric          model\nt     match (strict)      3"
