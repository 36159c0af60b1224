"""The card says what the result is, in terms that the Hub and a shell understand."""

from __future__ import annotations

import copy
import json
import re
import shlex
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import ModelCard

from llmprune import cli
from llmprune.delivery.masks import MaskFiles
from llmprune.recipe import build
from llmprune.report.publishing import pack
from llmprune.report.reproduction import command_text
from tests.report.conftest import Result


def change(folder: Path, name: str, **changes: Any) -> None:
    """Change keys of one of a result's records."""
    path = folder / "llmprune" / name
    data = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps(data | changes), encoding="utf-8")


def facts_of(card: str) -> dict[str, Any]:
    return dict(ModelCard(card).data.to_dict())


def blocks_of(card: str, language: str) -> list[str]:
    """Return the code blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", card, re.DOTALL)


def from_hub(folder: Path) -> None:
    """Make a result look as if its source had been the Hub's owner/base."""
    run = json.loads((folder / "llmprune" / "run.json").read_text(encoding="utf-8"))
    source = run["source"] | {"name": "owner/base", "revision": "c" * 40}
    wish = run["wish"] | {"model": "owner/base"}
    change(folder, "run.json", source=source, origin=source, wish=wish)


def test_a_base_model_of_the_hub_is_named_and_pinned(result: Result) -> None:
    folder = result()
    from_hub(folder)
    card = pack(folder, "me/small").card
    facts = facts_of(card)
    assert facts["base_model"] == "owner/base"
    assert facts["base_model_relation"] == "finetune"
    assert "[owner/base](https://huggingface.co/owner/base)" in card
    (command,) = blocks_of(card, "bash")
    assert f"--model owner/base --revision {'c' * 40} --sparsity 0.5" in command


def test_a_local_base_model_is_not_named_unless_told(result: Result) -> None:
    folder = result()
    assert "base_model" not in facts_of(pack(folder, "me/small").card)
    card = pack(folder, "me/small", base_model="owner/base").card
    assert facts_of(card)["base_model"] == "owner/base"
    assert "--model owner/base" in blocks_of(card, "bash")[0]


def test_tags_and_numbers_of_a_shrunk_model(result: Result) -> None:
    card = pack(result(pattern="ffn-channels", sparsity=0.25, method="wanda"), "me/small").card
    assert facts_of(card)["tags"][2:] == ["pruned-structured", "wanda", "ffn-channels"]
    report = re.search(r"cut out: ([\d,]+) of ([\d,]+) parameters", card)
    assert report is not None
    after, before = (int(number.replace(",", "")) for number in report.groups())
    assert after < before
    assert "No speed was measured" in card


def test_perplexities_are_there_beside_each_other(result: Result) -> None:
    folder = result()
    sides = {
        name: {"value": value, "num_windows": 3, "seq_len": 16, "bos": False, "data": "demo"}
        for name, value in (("dense", 20.5), ("pruned", 25.25))
    }
    change(folder, "report.json", perplexity=sides)
    later = sides["pruned"] | {"value": 7.0, "data": "/home/me/own.txt", "bos": True}
    change(folder, "evaluations.json", perplexity=[later])
    card = pack(folder, "me/small").card
    line = "| perplexity of demo | 3 windows of 16 tokens, no BOS | 20.500 | 25.250 |"
    assert line in card
    results = ModelCard(card).data.eval_results
    assert [(r.metric_value, r.dataset_name) for r in results] == [
        (25.25, "demo"),
        (7.0, "own.txt"),
    ]
    assert results[0].metric_args == {"dense_base_model": 20.5}
    assert facts_of(card)["model-index"][0]["name"] == "small"


def test_task_scores_have_both_models_and_their_errors(result: Result) -> None:
    folder = result()
    score = {"task": "quiz", "metric": "acc", "filter": "none", "value": 0.5, "stderr": 0.01}
    change(
        folder,
        "evaluations.json",
        tasks=[
            {
                "scores": {"dense": [score | {"value": 0.625}], "pruned": [score]},
                "tasks": {
                    "quiz": {"version": 1, "num_fewshot": 2, "num_items": 9, "num_items_in_all": 10}
                },
                "settings": {"lm_eval": "0.4"},
            }
        ],
    )
    card = pack(folder, "me/small").card
    protocol = "lm-eval 0.4, version 1, 2-shot, 9 of 10 items"
    assert f"| quiz: acc | {protocol} | 0.6250 ± 0.0100 | 0.5000 ± 0.0100 |" in card
    (one,) = ModelCard(card).data.eval_results
    assert (one.metric_type, one.metric_value) == ("acc", 0.5)


def test_the_masks_can_be_read_as_the_card_says(
    result: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = result()
    card = pack(folder, "me/small").card
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, name: str(folder / name))
    scope: dict[str, Any] = {}
    exec(blocks_of(card, "python")[-1], scope)
    expected = MaskFiles(folder).of_block("model.layers.0.")[scope["name"]].numpy()
    assert scope["keep"].dtype == np.bool_
    assert np.array_equal(scope["keep"], expected)


def test_a_license_file_that_did_not_travel_is_linked_at_the_base_model(result: Result) -> None:
    folder = result()
    from_hub(folder)
    head = "---\nlicense: other\nlicense_link: LICENSE.md\nlanguage: no\npipeline_tag: x\n---\n"
    (folder / "README.md").write_text(head, encoding="utf-8")
    facts = facts_of(pack(folder, "me/small").card)
    assert facts["license_link"] == "https://huggingface.co/owner/base/blob/main/LICENSE.md"
    assert facts["language"] == "no"
    assert facts["pipeline_tag"] == "text-generation"


@pytest.mark.parametrize("head", ["", "---\n: [\n---\n", "no front matter", "---\n- a\n---\n"])
def test_a_card_without_facts_gives_none(head: str, result: Result) -> None:
    folder = result()
    (folder / "README.md").write_text(head, encoding="utf-8")
    assert "license" not in facts_of(pack(folder, "me/small").card)


WISHES: list[dict[str, Any]] = [
    {"steps": [{"prune": {"sparsity": 0.5}}, {"evaluate": {}}]},
    {"steps": [{"prune": {"pattern": "2:4", "method": "magnitude"}}, {"evaluate": {}}], "seed": 3},
    {
        "steps": [
            {"prune": {"sparsity": 0.3, "skip": ["*down_proj", "*'odd'*"]}},
            {"evaluate": {"num_windows": 4, "perplexity": True}},
        ],
        "calibration": {"num_samples": 8, "data": "some text.txt", "bos": True},
        "trust_remote_code": True,
        "attention": "eager",
    },
    {"steps": [{"prune": {"sparsity": 0.5}}, {"evaluate": {"perplexity": False}}]},
    {
        "steps": [{"prune": {"sparsity": 0.5}}, {"evaluate": {}}],
        "calibration": {"data": [{"data": "demo", "weight": 3}, {"data": "a.txt"}]},
    },
    *(
        {"steps": [{"prune": prune}, {"evaluate": {}}]}
        for prune in (
            {"effort": "best", "sparsity": 0.7},
            {"effort": "good", "method": "wanda", "sparsity": 0.6},
            {"effort": "best", "pattern": "2:4", "permute": False, "repair": "none"},
            {"target": {"ppl": "+10%"}, "options": {"spread": 0.1}, "allocation": "owl"},
            {"target": {"ppl": "12.5"}, "sparsity": 0.6, "effort": "good", "damp": "diag"},
            {"effort": "good", "sparsity": 0.5, "sparsities": {"*down_proj": 0.3}},
            {"effort": "best", "sparsity": 0.5, "method": "owl", "repair": "none"},
            {"effort": "best", "sparsity": 0.6, "propagate": "dense"},
        )
    ),
]


@pytest.mark.parametrize("wish", WISHES)
def test_the_command_asks_for_the_same_recipe(
    wish: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = build({"model": "owner/name", **copy.deepcopy(wish)})
    made: list[Any] = []

    def stop(found: dict[str, Any]) -> Any:
        made.append(real(found))
        raise KeyboardInterrupt

    real = cli.make
    monkeypatch.setattr(cli, "make", stop)
    with pytest.raises(SystemExit):
        cli.main(shlex.split(command_text(recipe.to_dict()))[1:])
    assert made == [recipe]


@pytest.mark.parametrize(
    ("more", "flags"),
    [
        ({}, ""),
        ({"method": "dsnot"}, " --method dsnot"),
        ({"sparsities": {"*q_proj": 0}}, " --set 'prune.sparsities={\"*q_proj\": 0.0}'"),
        ({"repair": "none"}, " --set 'prune.repair=\"none\"'"),
    ],
)
def test_an_effort_asks_for_its_parts_by_itself(more: dict[str, Any], flags: str) -> None:
    steps = [{"prune": {"effort": "best", "sparsity": 0.7} | more}, {"evaluate": {}}]
    command = command_text(build({"model": "demo", "steps": steps}).to_dict())
    words = shlex.split("llmprune --model demo --sparsity 0.7 --effort best" + flags)
    assert sorted(shlex.split(command)) == sorted(words)


def test_the_card_tells_what_became_of_the_weights_that_stay(result: Result) -> None:
    plain = pack(result(), "me/small").card
    assert "What became of the rest" not in plain and "It was not trained after" in plain
    folder = result("qwen2", method="free-lunch", settings=["evaluate.perplexity=false"])
    verdict = {"allocation": "owl", "kl": {"uniform": 0.2, "owl": 0.1}, "adopted": True}
    change(folder, "report.json", allocation="owl", verdict=verdict | {"sequences": 1})
    card = pack(folder, "me/small").card
    for words in (
        "Allocation `owl`: KL to the dense model 0.2 uniform, 0.1 owl, on 1 sequence",
        "updated by `least-squares`: ", "of rows kept their update", "After each stage: ",
        "by halves: held-out error ", "Its blocks were trained one at a time",
    ):  # fmt: skip
        assert words in card, words


def test_a_head_that_cannot_be_read_is_left_out(result: Result) -> None:
    folder = result()
    for head in ("released: 2024-13-45", "license: " + "[" * 5000, "license: [", "license: mit"):
        (folder / "README.md").write_text(f"---\n{head}\n---\n", encoding="utf-8")
        found = facts_of(pack(folder, "me/small").card)
        assert found.get("license") == ("mit" if "mit" in head else None)


def test_files_of_any_kind_are_said_not_to_travel(result: Result, tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_text(json.dumps(["some words to read " * 40]), encoding="utf-8")
    folders = [result(calib=str(path)), result("gpt2", calib="demo")]
    said = ["files are not part of this" in pack(each, "me/small").card for each in folders]
    assert said == [True, False]


def test_values_of_unequal_dtypes_do_not_stand_beside_each_other(result: Result) -> None:
    folder = result()
    one = {"value": 20.5, "num_windows": 3, "seq_len": 16, "bos": False, "data": "demo"}
    change(folder, "report.json", perplexity={"dense": one, "pruned": one | {"value": 25.25}})
    change(folder, "evaluations.json", perplexity=[one | {"value": 24.0, "dtype": "bfloat16"}])
    card = pack(folder, "me/small").card
    assert "| 3 windows of 16 tokens, no BOS | 20.500 | 25.250 |" in card
    assert "| 3 windows of 16 tokens, no BOS, bfloat16 |  | 24.000 |" in card
