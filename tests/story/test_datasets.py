"""Text from the Hub: the real client reads a local server, no more than it needs, or says why."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pytest
from pyarrow import parquet

from tests.story.dataset_hub import COMMIT, CONVERTED, DatasetHub

SECRET = "hf_" + "x" * 34
C4, WIKITEXT = "allenai/c4", "Salesforce/wikitext"
FINEWEB, ULTRACHAT = "HuggingFaceFW/fineweb-edu", "HuggingFaceH4/ultrachat_200k"

CONFIGS = """---
configs:
- config_name: small
  data_files: [{split: train, path: small/train.jsonl}, {split: test, path: small/test.jsonl}]
- config_name: large
  data_files: [{split: train, path: large/train.jsonl}]
---
"""

READ = """
import json, os, sys, urllib.request
from transformers import AutoTokenizer
from llmprune import cli
from llmprune.base.errors import LlmpruneError
from llmprune.calibration.heldout import evaluation_text
from llmprune.calibration.mix import read_windows
from llmprune.delivery import gate, stock
from llmprune.evaluation import samples
from llmprune.recipe import build

folder, calls, commands = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
tokenizer = AutoTokenizer.from_pretrained(folder)
tokenizer.chat_template = "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}{% endfor %}"

def read(call):
    if "evaluate" in call:
        return {"text": evaluation_text(call["evaluate"])}
    wish = {"num_samples": 4, "seq_len": 16, **call}
    steps = [{"prune": {"sparsity": 0.5}}]
    recipe = build({"model": "owner/name", "steps": steps, "calibration": wish})
    found = read_windows(recipe, tokenizer, seq_len=recipe.calibration.seq_len)
    rows = ["".join(tokenizer.convert_ids_to_tokens(row)) for row in found.tokens.tolist()]
    return {"rows": rows, "record": found.record}

answers = {}
for name, call in calls.items():
    try:
        answers[name] = read(call)
    except LlmpruneError as error:
        answers[name] = {"error": str(error)}

from huggingface_hub import snapshot_download
snapshot_download("Salesforce/wikitext", repo_type="dataset", allow_patterns=["*/validation*"])

def run_here(command, **options):
    stock.main(command[2])
    return gate.subprocess.CompletedProcess(command, 0, "", "")

gate.subprocess.run = run_here  # the same checks without the start of another Python
samples.PROMPTS = ()
codes = []
for number, arguments in enumerate(commands):
    if number == 1:
        urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/silent")
    print(f"== {number}", file=sys.stderr)
    try:
        cli.main(arguments)
    except SystemExit as left:
        codes.append(left.code)
answers["from the cache"] = read({"data": "wikitext2", "split": "validation"})
print("\\n" + json.dumps([answers, codes]))
"""

CALLS: dict[str, dict[str, Any]] = {
    "c4": {"data": "c4"},
    "fineweb-edu": {"data": "fineweb-edu"},
    "wikitext2": {"data": "wikitext2"},
    "open-platypus": {"data": "open-platypus"},
    "ultrachat": {"data": "ultrachat"},
    "mix": {"data": "c4:3,ultrachat:1", "num_samples": 8},
    "by name": {"data": "owner/parts", "config": "small"},
    "by name, split": {"data": "hub:owner/parts", "config": "small", "split": "test"},
    "by name, column": {"data": "owner/table", "column": "answer"},
    "converted": {"data": "owner/scripted", "revision": "refs/convert/parquet"},
    "no config": {"data": "owner/parts"},
    "other config": {"data": "owner/parts", "config": "smal"},
    "other split": {"data": "owner/parts", "config": "small", "split": "tset"},
    "other split of a preset": {"data": "c4", "split": "valid"},
    "config of a preset": {"data": "c4", "config": "realnewslike"},
    "other column": {"data": "owner/table", "column": "answr"},
    "unclear column": {"data": "owner/table"},
    "other revision": {"data": "owner/table", "revision": "v9"},
    "script": {"data": "owner/scripted"},
    "gated": {"data": "owner/gated"},
    "missing": {"data": "owner/missing"},
    "no data": {"data": "owner/empty"},
    "evaluate wikitext2": {"evaluate": "wikitext2"},
    "evaluate c4": {"evaluate": "c4"},
    "evaluate by name": {"evaluate": "owner/texts"},
    "evaluate fineweb-edu": {"evaluate": "fineweb-edu"},
}


def table(rows: list[dict[str, Any]], *, group: int = 500) -> bytes:
    """Return a Parquet file, as it is stored when nothing in it can be compressed."""
    file = io.BytesIO()
    options = {"row_group_size": group, "use_dictionary": False, "compression": "none"}
    parquet.write_table(pa.Table.from_pylist(rows), file, **options)
    return file.getvalue()


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def chat(number: int) -> list[dict[str, str]]:
    words = f"say {'abcdefghij'[number % 10] * 9}"
    return [{"role": "user", "content": words}, {"role": "assistant", "content": words}]


def repositories() -> dict[str, dict[str, bytes] | None]:
    """Return data sets in the layouts of the real ones, two of them large."""
    draw = random.Random(0)
    pages = [{"text": draw.randbytes(1000).hex(), "url": "u"} for _ in range(1100)]
    text = [{"text": f"{index} of the pages."} for index in range(1200)]
    return {
        C4: {
            "en/c4-train.00000-of-01024.json.gz": gzip.compress(lines(pages), 1) * 30,
            "en/c4-validation.00000-of-00008.json.gz": gzip.compress(lines(text)),
        },
        FINEWEB: {"sample/10BT/000_00000.parquet": table(pages * 15)},
        WIKITEXT: {
            f"wikitext-2-raw-v1/{split}-00000-of-00001.parquet": table(
                [{"text": line} for line in ("", " = Title = \n", "", f" Words of {split} . \n")]
                * (1 if split == "test" else 40)
            )
            for split in ("train", "validation", "test")
        },
        "garage-bAInd/Open-Platypus": {
            "data/train-00000-of-00001-4fe2df04669d1669.parquet": table(
                [{"input": "", "output": "b" * 30, "instruction": "a" * 30, "source": "s"}] * 20
            )
        },
        ULTRACHAT: {
            f"data/train_sft-0000{shard}-of-00002-a3ecf92756993583.parquet": table(
                [{"prompt": "p", "prompt_id": "i", "messages": chat(i)} for i in range(40)]
            )
            for shard in range(2)
        },
        "owner/parts": {
            "README.md": CONFIGS.encode(),
            "small/train.jsonl": lines([{"text": "small train " * 40}]),
            "small/test.jsonl": lines([{"text": "small test " * 40}]),
            "large/train.jsonl": lines([{"text": "large train " * 40}]),
        },
        "owner/table": {"train.jsonl": lines([{"question": "q" * 90, "answer": "a" * 90}] * 9)},
        "owner/texts": {
            "train.jsonl": lines([{"text": "to learn"}]),
            "test.jsonl": lines([{"text": "to test"}, {"text": "more"}]),
        },
        "owner/scripted": {"scripted.py": b"raise SystemExit", "README.md": b""},
        "owner/scripted@refs/convert/parquet": {
            "default/train/0000.parquet": table([{"text": "was a script " * 40}])
        },
        "owner/gated": None,
        "owner/empty": {"README.md": b"nothing else"},
    }


@pytest.fixture(scope="module")
def hub() -> Iterator[DatasetHub]:
    server = DatasetHub(repositories())
    server.start()
    yield server
    server.stop()


def environment(home: Path, address: str) -> dict[str, str]:
    return os.environ | {
        "HF_ENDPOINT": address,
        "HF_HOME": str(home),
        "HF_TOKEN": SECRET,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.getcwd(),
    }


class Story(NamedTuple):
    """What every call gave; exit codes of the commands, and what each wrote to stderr."""

    answers: dict[str, dict[str, Any]]
    codes: list[int]
    out: str
    err: list[str]
    home: Path


@pytest.fixture(scope="module")
def story(
    hub: DatasetHub, source: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Story:
    """In one process: read every text; run on c4; then without the Hub again, anew, on a file."""
    home = tmp_path_factory.mktemp("story")
    usual = ["--model", source, "--sparsity", 0.5, "--seq-len", 16]
    small = ["--num-samples", 4, "--set", "evaluate.num_windows=2"]
    commands = [
        [*usual, *small, "--set", "evaluate.perplexity=true", "--out", "out"],
        [*usual, *small, "--set", "evaluate.perplexity=true", "--out", "out"],
        [*usual, *small, "--out", "other"],
        [*usual, "--calib", text_file, "--set", "evaluate.num_windows=1", "--out", "file"],
    ]
    texts = [[str(argument) for argument in command] for command in commands]
    done = subprocess.run(
        [sys.executable, "-c", READ, str(source), json.dumps(CALLS), json.dumps(texts)],
        capture_output=True,
        text=True,
        env=environment(home / "cache", hub.address),
        cwd=home,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers, codes = json.loads(done.stdout.splitlines()[-1])
    return Story(answers, codes, done.stdout, re.split(r"== \d\n", done.stderr), home)


@pytest.fixture
def answers(story: Story) -> dict[str, dict[str, Any]]:
    return story.answers


def rows_of(answers: dict[str, dict[str, Any]], name: str) -> list[str]:
    assert "rows" in answers[name], answers[name]
    rows: list[str] = answers[name]["rows"]
    return rows


@pytest.mark.parametrize("name", ["c4", "fineweb-edu"])
def test_a_few_windows_fetch_a_small_part_of_a_large_file(
    name: str, answers: dict[str, dict[str, Any]], hub: DatasetHub
) -> None:
    repo, pattern = {"c4": (C4, "en/c4-train*"), "fineweb-edu": (FINEWEB, "*.parquet")}[name]
    (size,) = [len(data) for file, data in (hub.repos[repo] or {}).items() if "valid" not in file]
    assert len(rows_of(answers, name)) == 4
    assert size > 30_000_000
    # c4 is read for the mix as well, each time two blocks of the client's buffer
    assert 0 < hub.bytes_of(pattern, repo) < (0.4 if name == "c4" else 0.2) * size


def test_a_report_names_repository_commit_split_and_files(
    answers: dict[str, dict[str, Any]],
) -> None:
    record = answers["c4"]["record"]
    (text,) = record["texts"]
    assert record["data"] == text["data"] == "c4"
    assert (text["repo"], text["commit"], text["split"]) == (C4, COMMIT, "train")
    assert text["files"] == ["en/c4-train.00000-of-01024.json.gz"]
    assert (record["num_windows"], record["seq_len"]) == (4, 16)
    assert answers["converted"]["record"]["texts"][0]["commit"] == CONVERTED


def test_lines_of_wikitext_are_one_text(answers: dict[str, dict[str, Any]]) -> None:
    assert any("\n\n" in row for row in rows_of(answers, "wikitext2"))
    assert not any("</s>" in row for row in rows_of(answers, "wikitext2"))


def test_chats_and_instructions_go_through_the_template(answers: dict[str, dict[str, Any]]) -> None:
    for name, sign in {"ultrachat": "say", "open-platypus": "aaa"}.items():
        text = "".join(rows_of(answers, name)).replace("<unk>", "<")
        assert re.search(rf"<u.{sign}|<a.{sign}|u.{sign}", text), text


def test_a_mix_has_its_shares(answers: dict[str, dict[str, Any]]) -> None:
    record = answers["mix"]["record"]
    shares = {text["data"]: text["num_windows"] for text in record["texts"]}
    assert shares == {"c4": 6, "ultrachat": 2}
    assert record["data"] == "c4:3,ultrachat:1"
    assert sum("say" in row or "aaa" in row for row in rows_of(answers, "mix")) <= 2


def test_any_data_set_is_read_by_config_split_and_column(
    answers: dict[str, dict[str, Any]],
) -> None:
    assert "train" in "".join(rows_of(answers, "by name"))
    assert "large" not in "".join(rows_of(answers, "by name"))
    assert "test" in "".join(rows_of(answers, "by name, split"))
    assert set("".join(rows_of(answers, "by name, column")).replace("</s>", "")) == {"a"}
    assert "script" in "".join(rows_of(answers, "converted"))


@pytest.mark.parametrize(
    ("name", "says"),
    {
        "no config": (r"calibration\.config: owner/parts has several parts: .*small", "Type"),
        "other config": (r"^calibration\.config: 'smal' .*Did you mean 'small'",),
        "other split": (r"^calibration\.split: 'tset' .*Did you mean 'test'",),
        "other split of a preset": (r"^calibration\.split: 'valid' .*'validation'",),
        "config of a preset": (r"^calibration\.config: .*`allenai/c4`",),
        "other column": (r"^calibration\.column: 'answr' .*Did you mean 'answer'",),
        "unclear column": (r"^calibration\.data: .*columns: question, answer.*column=NAME",),
        "other revision": (r"owner/table has no such revision.*`calibration\.revision`",),
        "script": ("made by a script", r"`calibration\.revision=refs/convert/parquet`"),
        "gated": ("owner/gated is gated", "Accept its terms", "hf auth login"),
        "missing": ("owner/missing is neither a file", "spelling", "c4", "hf auth login"),
        "no data": ("owner/empty", "no data files"),
        "evaluate fineweb-edu": (r"^evaluate\.data: fineweb-edu has no text", "wikitext2"),
    }.items(),
)
def test_what_cannot_be_read_is_explained(
    name: str, says: tuple[str, ...], answers: dict[str, dict[str, Any]]
) -> None:
    message = answers[name].get("error", answers[name])
    for part in says:
        assert re.search(part, str(message)), message
    assert "Traceback" not in str(message)


def test_a_file_in_the_cache_needs_no_hub(answers: dict[str, dict[str, Any]]) -> None:
    (text,) = answers["from the cache"]["record"]["texts"]
    assert (text["commit"], text["split"]) == (COMMIT, "validation")
    assert text["files"] == ["wikitext-2-raw-v1/validation-00000-of-00001.parquet"]
    assert "Words of" in "".join(rows_of(answers, "from the cache"))


def test_evaluation_text_is_joined_as_in_the_papers(
    answers: dict[str, dict[str, Any]], hub: DatasetHub
) -> None:
    found = {name: answers[name] for name in CALLS if name.startswith("evaluate")}
    wikitext = found["evaluate wikitext2"]["text"]
    assert wikitext == "\n\n".join(["", " = Title = \n", "", " Words of test . \n"])
    pages = [f"{index} of the pages." for index in range(1100)]
    assert found["evaluate c4"]["text"] == " ".join(pages)
    assert found["evaluate by name"]["text"] == "to test\n\nmore"


def test_the_token_is_sent_and_never_printed(story: Story, hub: DatasetHub) -> None:
    assert f"Bearer {SECRET}" in hub.authorization
    assert SECRET not in story.out + "".join(story.err)


def test_the_default_text_is_c4_and_the_report_says_so(story: Story) -> None:
    assert story.codes[0] == 0, story.err[1]
    report = json.loads((story.home / "out/llmprune/report.json").read_text(encoding="utf-8"))
    assert report["calibration"]["texts"][0]["commit"] == COMMIT
    assert report["calibration"]["tokens"] == report["run"]["tokens"]
    assert report["calibration"]["leak"] is None  # of windows too short to tell
    assert report["perplexity"]["dense"]["data"] == "wikitext2"
    assert not list((story.home / "out").rglob("tokens.safetensors"))


def test_a_finished_result_is_recognised_without_the_hub(story: Story) -> None:
    assert story.codes[1] == 0, story.err[2]
    assert "already holds this result" in story.out


def test_a_hub_that_is_down_is_an_error_and_never_another_text(story: Story) -> None:
    assert story.codes[2] == 2, story.err[3]
    (message,) = [line for line in story.err[3].splitlines() if line.startswith("error: ")]
    for part in ("calibration.data", "c4", "cannot be reached", "--calib demo", "--calib FILE"):
        assert part in message
    assert "Traceback" not in story.err[3]


def test_evaluation_text_out_of_reach_costs_the_perplexity_only(story: Story) -> None:
    assert story.codes[3] == 0, story.err[4]
    (warning,) = [line for line in story.err[4].splitlines() if line.startswith("warning: ")]
    for part in ("perplexity is not measured", "wikitext2", "--set evaluate.data=demo"):
        assert part in warning
    report = json.loads((story.home / "file/llmprune/report.json").read_text(encoding="utf-8"))
    assert report["perplexity"] is None
    assert {path.name for path in story.home.iterdir()} <= {"cache", "out", "file"}
