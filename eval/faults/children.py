"""Pico models, and commands in forked children that may be killed, starved or watched.

Children are forked after all imports, so that a run of a pico model takes a second; the parent
computes nothing and has one thread. The gate runs in the child itself: the same checks, without a
fresh Python.
"""

from __future__ import annotations

import importlib
import os
import random
import signal
import string
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures.thread import _python_exit
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llmprune import cli
from llmprune.base import memory
from llmprune.delivery import gate, stock
from llmprune.engine import cost

USED = (
    *("llmprune.steps", "llmprune.runs", "llmprune.recovering", "llmprune.pages.making", "peft"),
    *("accelerate", "rich.progress", "rich.table", "transformers.models.auto.modeling_auto"),
)
OWN = {"llmprune/report.json", "llmprune/report.html", "llmprune/events.jsonl"}
SYMBOLS = ["<unk>", "</s>", *string.ascii_letters, *" .,;!?'\n-:"]


class Child(NamedTuple):
    """How a child ended: exit code, or minus the signal; what it printed; whether it hung."""

    code: int
    output: str
    hung: bool = False


def warm() -> None:
    """Import what a run imports, so that children need not."""
    for name in USED:
        importlib.import_module(name)
    torch.set_num_threads(1)


def write_model(folder: Path, *, blocks: int = 3) -> Path:
    """Write a random bfloat16 Llama in several shards, with a tokenizer of single characters."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for value in model.parameters():
            if value.dim() > 1:
                value.mul_(5)
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="40KB")
    vocab = {symbol: index for index, symbol in enumerate(SYMBOLS)}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>")
    tokenizer.save_pretrained(folder)
    return folder


def write_text(path: Path) -> Path:
    """Write 6000 characters in words drawn from a few dozen."""
    draw = random.Random(0)
    words = ["".join(draw.choices(string.ascii_lowercase, k=draw.randint(2, 9))) for _ in range(50)]
    text = ""
    while len(text) < 6000:
        text += " ".join(draw.choices(words, k=8)).capitalize() + ".\n"
    path.write_text(text, encoding="utf-8")
    return path


def in_child(
    log: Path,
    arguments: Sequence[object],
    prepare: Callable[[], None] = lambda: None,
    *,
    after: tuple[float, int] | None = None,
    limit: float = 120,
) -> Child:
    """Run a command in a forked child; `prepare` may break something there first.

    `after` are seconds and the signal that is then sent. A child that is there after `limit`
    seconds is killed, and has hung.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    log.write_text("")
    pid = os.fork()
    if pid == 0:
        _be_child(log, arguments, prepare)
    began = time.monotonic()
    sent = hung = False
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return Child(os.waitstatus_to_exitcode(status), log.read_text(errors="replace"), hung)
        passed = time.monotonic() - began
        if after is not None and not sent and passed >= after[0]:
            os.kill(pid, after[1])
            sent = True
        if passed > limit:
            os.kill(pid, signal.SIGKILL)
            hung = True
        time.sleep(0.002)


def _be_child(log: Path, arguments: Sequence[object], prepare: Callable[[], None]) -> None:
    """Run the command and leave, as a process of its own would."""
    code = 1
    try:
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # noqa: SIM115
        torch.set_num_threads(1)
        at_home()
        prepare()
        cli.main([str(argument) for argument in arguments])
    except SystemExit as left:
        code = int(left.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        _python_exit()
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                code = code or 1
        os._exit(code)


def at_home() -> None:
    """Split the text into several micro-batches, and let the gate run in this process."""
    cost.ACTIVATIONS = 1
    gate.subprocess.run = gate_here  # type: ignore[assignment]


def gate_here(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Do what the gate's script does, in this process."""
    try:
        stock.main(command[2])
    except Exception as error:
        return subprocess.CompletedProcess(command, 1, "", f"{type(error).__name__}: {error}")
    return subprocess.CompletedProcess(command, 0, "", "")


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file and folder of a result, without what tells of the run itself."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"a folder"
        for path in sorted(folder.rglob("*"))
        if str(path.relative_to(folder)) not in OWN
    }


def peak_memory() -> int:
    """Return the bytes that this process has of its own."""
    return memory.anonymous_bytes()
