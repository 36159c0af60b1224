"""Tasks are found by name, glob and file from anywhere, and what is wrong with one is said."""

from __future__ import annotations

import json
import logging
import runpy
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from llmprune.base.errors import RecipeError, UnknownName
from llmprune.evaluation.tasks import OFFLINE, hushed, open_tasks
from tests.evaluation.conftest import TASKS

YAML = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: choices
doc_to_target: label
metric_list: [{{metric: acc}}]
"""
ROWS = [{"context": "a", "choices": ["b", "c"], "label": 0}] * 3


def task_file(folder: Path, name: str, *, data: str = "rows.jsonl", more: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)) + "\n")
    path = folder / f"{name}.yaml"
    path.write_text(YAML.format(name=name, data=data) + more)
    return path


def test_a_file_finds_its_data_from_any_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = task_file(tmp_path / "mine", "own")
    (tmp_path / "elsewhere").mkdir()
    for here, name in ((tmp_path / "elsewhere", str(path)), (tmp_path, "mine/own.yaml")):
        monkeypatch.chdir(here)
        task = open_tasks([name])["tasks"]["own"]
        assert len(task.eval_docs) == 3 and Path.cwd() == here


def test_data_in_the_working_directory_are_found_as_lm_eval_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = task_file(tmp_path / "mine", "own", data="data/rows.jsonl")
    (tmp_path / "data").mkdir()
    (tmp_path / "mine" / "rows.jsonl").rename(tmp_path / "data" / "rows.jsonl")
    monkeypatch.chdir(tmp_path)
    assert len(open_tasks([str(path)])["tasks"]["own"].eval_docs) == 3


def test_names_and_globs_of_an_own_folder_need_no_other_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.tasks import TaskManager

    def small(**options: Any) -> Any:
        assert options["include_defaults"] is False
        return TaskManager(**options)

    task_file(tmp_path / "mine", "own_a")
    task_file(tmp_path / "mine", "own_b")
    monkeypatch.setattr("lm_eval.tasks.TaskManager", small)
    assert list(open_tasks(["own_*"], include_path=tmp_path / "mine")["tasks"]) == [
        "own_a",
        "own_b",
    ]
    assert list(open_tasks(["own_b"], include_path=tmp_path / "mine")["tasks"]) == ["own_b"]


def test_an_unknown_name_has_its_near_match(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tasks that lm_eval brings are left out here: reading them takes seconds."""
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(
        "lm_eval.tasks.TaskManager",
        lambda **options: TaskManager(**(options | {"include_defaults": False})),
    )
    with pytest.raises(UnknownName, match=r"'demo_close' is no task.*Did you mean 'demo_cloze'"):
        open_tasks(["demo_close"], include_path=TASKS)


@pytest.mark.parametrize(
    ("name", "said"),
    [("missing.yaml", "there is no file missing.yaml"), (None, "tasks: none. Name one")],
)
def test_what_is_not_there_is_named(name: str | None, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        open_tasks([] if name is None else [name])
    with pytest.raises(RecipeError, match="include_path: nowhere is no folder"):
        open_tasks(["x"], include_path="nowhere")


def test_data_that_cannot_be_read_lead_to_the_offline_task(tmp_path: Path) -> None:
    path = task_file(tmp_path / "mine", "own", data="gone.jsonl")
    with pytest.raises(
        RecipeError, match=r"own.yaml or its data cannot be read.*demo_cloze,demo_sent"
    ):
        open_tasks([str(path)])


def test_a_task_that_runs_written_code_is_refused(tmp_path: Path) -> None:
    path = task_file(tmp_path / "mine", "own", more="unsafe_code: true\n")
    with pytest.raises(RecipeError, match="own runs the code that the model writes"):
        open_tasks([str(path)])


def test_worked_examples_are_set_unless_the_task_wants_none(tmp_path: Path) -> None:
    free = task_file(tmp_path / "mine", "free")
    fixed = task_file(tmp_path / "mine", "fixed", more="num_fewshot: 0\n")
    loaded = open_tasks([str(free), str(fixed)], num_fewshot=2)["tasks"]
    assert [task.get_config("num_fewshot") for task in loaded.values()] == [2, 0]
    assert open_tasks([str(free)])["tasks"]["free"].get_config("num_fewshot") == 0


def test_the_harness_is_quiet_and_its_log_comes_back(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("lm_eval")
    before = list(logger.handlers), logger.level, logger.propagate
    with hushed() as said:
        print("to people")
        print("to people", file=sys.stderr)
        logging.getLogger("lm_eval.models").warning("careful: %d", 7)
        logging.getLogger("lm_eval.models").info("chatter")
    assert said == ["careful: 7"]
    assert capsys.readouterr() == ("", "")
    assert (list(logger.handlers), logger.level, logger.propagate) == before


def test_the_items_are_what_their_script_makes() -> None:
    """Every right answer is a wrong one three times, so answers alone say nothing."""
    made = runpy.run_path(str(TASKS / "make_demo_tasks.py"))
    found = made["items"](made["TEXT"].read_text(encoding="utf-8"))
    assert set(found) == set(OFFLINE)
    for name, items in found.items():
        lines = (TASKS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == items
    for name in ("demo_cloze", "demo_sentences"):
        items = found[name]
        right = Counter(item["choices"][item["label"]] for item in items)
        shown = Counter(choice for item in items for choice in item["choices"])
        assert all(len(set(item["choices"])) == 4 for item in items)
        assert shown == {answer: 4 * count for answer, count in right.items()}
    for item in found["demo_last_word"]:
        assert item["word"] in item["context"] and not item["context"].endswith(item["word"])


def test_the_tasks_that_come_along_are_known_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tasks = open_tasks(list(OFFLINE))["tasks"]
    assert {name: len(task.eval_docs) for name, task in tasks.items()} == {
        "demo_cloze": 200,
        "demo_sentences": 200,
        "demo_last_word": 161,
    }


def test_a_file_that_is_no_text_is_told(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match=r"own.yaml or its data cannot be read"):
        open_tasks([str(path)])
