"""The data sets that people calibrate and evaluate with, under their present names on the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Files of one repository on the Hub, and how the papers read them.

    `files` are globs by split. `columns` hold a text, or a chat, or an instruction and its answer.
    Rows are documents, or the `lines` of one text. For evaluation the first `num_documents` of the
    split `evaluation` are put together with `joint`, and at most `num_windows` windows are scored.
    """

    repo: str
    reader: Literal["json", "parquet"]
    files: Mapping[str, tuple[str, ...]]
    columns: tuple[str, ...]
    split: str = "train"
    evaluation: str | None = None
    lines: bool = False
    joint: str = "\n\n"
    num_documents: int | None = None
    num_windows: int | None = field(default=None)
    licence: str
    remark: str


PRESETS: Mapping[str, Preset] = {
    "c4": Preset(
        repo="allenai/c4",
        reader="json",
        files={
            "train": ("en/c4-train.00000-of-01024.json.gz",),
            "validation": ("en/c4-validation.00000-of-00008.json.gz",),
        },
        columns=("text",),
        evaluation="validation",
        joint=" ",
        num_documents=1100,
        num_windows=256,
        licence="ODC-BY",
        remark="web pages in English; what the pruning papers calibrate with",
    ),
    "wikitext2": Preset(
        repo="Salesforce/wikitext",
        reader="parquet",
        files={
            split: (f"wikitext-2-raw-v1/{split}-00000-of-00001.parquet",)
            for split in ("train", "validation", "test")
        },
        columns=("text",),
        evaluation="test",
        lines=True,
        licence="CC BY-SA 3.0 and GFDL",
        remark="Wikipedia articles; what the pruning papers measure perplexity on",
    ),
    "fineweb-edu": Preset(
        repo="HuggingFaceFW/fineweb-edu",
        reader="parquet",
        files={"train": ("sample/10BT/000_00000.parquet",)},
        columns=("text",),
        licence="ODC-BY",
        remark="web pages chosen for teaching something",
    ),
    "open-platypus": Preset(
        repo="garage-bAInd/Open-Platypus",
        reader="parquet",
        files={"train": ("data/train-*.parquet",)},
        columns=("instruction", "output"),
        licence="various, see the data set's page",
        remark="questions that need reasoning, with answers; as a chat where there is a template",
    ),
    "ultrachat": Preset(
        repo="HuggingFaceH4/ultrachat_200k",
        reader="parquet",
        files={
            "train_sft": ("data/train_sft-*.parquet",),
            "test_sft": ("data/test_sft-*.parquet",),
        },
        columns=("messages",),
        split="train_sft",
        evaluation="test_sft",
        num_documents=1100,
        licence="MIT",
        remark="conversations of several turns, through the chat template",
    ),
}
