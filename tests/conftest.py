"""Shared fixtures: pico models of every family on disk, their tokenizer, and text to run on."""

from __future__ import annotations

import gc
import os
import random
import shutil
import string
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="llmprune-tests-")  # not the user's
os.environ["LLMPRUNE_CACHE"] = tempfile.mkdtemp(prefix="llmprune-tests-")
if "PYTEST_XDIST_WORKER" in os.environ:  # one thread each: several would wait for one another
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from hypothesis import settings
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.initialization import TORCH_INIT_FUNCTIONS
from transformers.utils import logging

from llmprune import api, recovering, resident_steps, steps
from llmprune.arch.miniature import miniature_model
from llmprune.checkpoint.locate import open_source
from llmprune.checkpoint.skeleton import Skeleton, build_skeleton, read_config
from llmprune.delivery import gate
from llmprune.delivery import stock as stock_script
from llmprune.delivery.agreement import Agreement
from llmprune.delivery.copied_code import code_in_scratch
from llmprune.engine import opening, pace, planning
from llmprune.evaluation import samples
from llmprune.walk.streamed import Streamed, stream

gc.disable()  # until all tests are collected: nothing of torch or transformers is garbage

# A busy machine must not fail a property, and CI looks at the same examples every time.
settings.register_profile(
    "llmprune", deadline=None, derandomize="CI" in os.environ, max_examples=50
)
settings.load_profile("llmprune")
logging.disable_progress_bar()
logging.set_verbosity_error()

Pico = Callable[..., Path]

FAMILY_NAMES = ("llama", "qwen3", "gpt2", "gemma3_text", "mixtral")
SYMBOLS = ["<unk>", "</s>", *string.ascii_letters, *" .,;!?'\n-:"]


def pytest_collection_finish() -> None:
    """Let garbage be collected again, but never search what was imported for any."""
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    """Remove what transformers has copied of code that lies beside models."""
    shutil.rmtree(os.environ["HF_MODULES_CACHE"], ignore_errors=True)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run every test that takes a `model_type` once per family, unless it names its own."""
    marked = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    if "model_type" in metafunc.fixturenames and not any("model_type" in names for names in marked):
        metafunc.parametrize("model_type", FAMILY_NAMES)


def pico_model(model_type: str, *, tied: bool = True, seed: int = 0) -> Any:
    """Build a random miniature of a family in float32, with every bias away from zero."""
    grouped = {"num_key_value_heads": 8} if model_type in ("llama", "qwen3") else {}
    config = AutoConfig.for_model(model_type, tie_word_embeddings=tied, **grouped)
    model = miniature_model(config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith(".bias"):
                value.copy_(0.1 * torch.randn(value.shape, generator=generator))
            elif value.dim() > 1:
                value.mul_(5)  # the default spread of 0.02 leaves blocks almost without effect
    return model


def pico_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer of single characters, 64 in all."""
    vocab = {symbol: index for index, symbol in enumerate(SYMBOLS)}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return pico_tokenizer()


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Any]:
    """Return what builds a random pico model in memory: `make_model(model_type, tied=, seed=)`."""
    return pico_model


@pytest.fixture(scope="session")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Pico:
    """Return the folder of a pico model with its tokenizer, written once; never write into it."""
    home = tmp_path_factory.mktemp("pico")

    def folder_of(model_type: str, *, tied: bool = True, sharded: bool = False) -> Path:
        ties, form = "tied" if tied else "untied", "sharded" if sharded else "single"
        folder = home / f"{model_type}-{ties}-{form}"
        if not folder.exists():
            size = "60KB" if sharded else "50GB"
            pico_model(model_type, tied=tied).save_pretrained(folder, max_shard_size=size)
            pico_tokenizer().save_pretrained(folder)
        return folder

    return folder_of


@pytest.fixture(scope="session")
def stock() -> Callable[[Path], Any]:
    """Return a folder's model as transformers loads it, in float32 and evaluation mode."""

    def load(folder: Path) -> Any:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        return model.eval()

    return load


@pytest.fixture(scope="session")
def skeleton_of() -> Callable[[Path], Skeleton]:
    return lambda folder: build_skeleton(read_config(folder), dtype=torch.float32)


@pytest.fixture(scope="session")
def streamed() -> Callable[..., Streamed]:
    """Open a folder for walking in float32 on the CPU."""

    def open_folder(folder: Path, *, dtype: torch.dtype | None = torch.float32) -> Streamed:
        skeleton = build_skeleton(read_config(folder), dtype=torch.float32)
        return stream(open_source(str(folder)), skeleton, device=torch.device("cpu"), dtype=dtype)

    return open_folder


@pytest.fixture(scope="session")
def tokens() -> torch.Tensor:
    """Six rows of 24 token ids (N, T), longer than any pico model's sliding window."""
    return torch.randint(0, 64, (6, 24), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 6000 characters in words drawn from a few dozen."""
    draw = random.Random(0)
    words = ["".join(draw.choices(string.ascii_lowercase, k=draw.randint(2, 9))) for _ in range(50)]
    text = ""
    while len(text) < 6000:
        text += " ".join(draw.choices(words, k=8)).capitalize() + ".\n"
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(autouse=True, scope="session")
def once() -> Iterator[None]:
    """Do once per process what has the same answer in every run, and leave disks their own pace.

    These are the speed of this machine, and whether blocks of one config can be walked. No test
    cuts the power, so none needs to wait until what was written has arrived on the disk; and no
    numbers are drawn for tensors that hold none.
    """
    walkable: set[object] = set()
    check_walk = opening.check_walk

    def check_once(config: Any, family: Any, *, trust_remote_code: bool = False) -> None:
        said = type(config), config.to_json_string(use_diff=False), config._attn_implementation
        key = (*said, family.blocks, family.returns, trust_remote_code, opening.check_replay)
        if key not in walkable:
            check_walk(config, family, trust_remote_code=trust_remote_code)
            walkable.add(key)

    def for_real(draw: Any) -> Callable[..., Any]:
        def drawn(tensor: torch.Tensor, *how: Any, **named: Any) -> Any:
            return tensor if tensor.is_meta else draw(tensor, *how, **named)

        return drawn

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "measure_rate", cache(planning.measure_rate))
        for module in (opening, resident_steps, api):
            patch.setattr(module, "check_walk", check_once)
        patch.setattr(os, "fsync", lambda descriptor: None)
        patch.setitem(TORCH_INIT_FUNCTIONS, "normal_", for_real(TORCH_INIT_FUNCTIONS["normal_"]))
        for name in ("kaiming_uniform_", "uniform_", "normal_"):
            patch.setattr(torch.nn.init, name, for_real(getattr(torch.nn.init, name)))
        yield


class Clock:
    """Stands in for measured latencies: seconds of a block that follow from its sizes."""

    def __init__(self) -> None:
        self.fixed, self.ffn, self.heads, self.trunk = 1.0, 5.0, 4.0, 2.0
        self.measured: list[dict[str, int]] = []

    def block(self, config: Any, sizes: Mapping[str, int]) -> float:
        wide = sizes.get("intermediate_size", config.intermediate_size) / config.intermediate_size
        key = "num_attention_heads"
        heads = sizes.get(key, config.num_attention_heads) / config.num_attention_heads
        return self.fixed + self.ffn * wide + self.heads * heads

    def table(self, config: Any, candidates: Sequence[Mapping[str, int]], **_: Any) -> list[float]:
        self.measured += [dict(sizes) for sizes in candidates]
        return [self.block(config, sizes) for sizes in candidates]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Let targets of latency be met on a clock that a busy machine does not disturb."""
    steady = Clock()
    monkeypatch.setattr(pace, "latency_table", lambda *args, **rest: steady.table(*args, **rest))
    monkeypatch.setattr(pace, "trunk_latency", lambda *args, **rest: steady.trunk)
    return steady


@pytest.fixture(autouse=True)
def no_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no model write texts, which takes a while, but where a test asks for some."""
    monkeypatch.setattr(samples, "PROMPTS", ())


@pytest.fixture(autouse=True)
def no_page(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let runs write no page for browsers, but in the rooms whose tests look at pages."""
    if request.path.parent.name not in ("faults", "pages", "report", "story"):
        for module in (steps, recovering):
            monkeypatch.setattr(module, "write_last", lambda folder, progress: None)


@contextmanager
def gate_here() -> Iterator[None]:
    """Let the gate run its script in this process: the same checks without the start of Python."""

    def run_here(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        assert Path(command[1]).name == "stock.py"
        try:
            with code_in_scratch():
                stock_script.main(command[2])
        except Exception as error:
            return subprocess.CompletedProcess(command, 1, "", f"{type(error).__name__}: {error}")
        return subprocess.CompletedProcess(command, 0, "", "")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate.subprocess, "run", run_here)
        yield


@pytest.fixture
def no_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let runs publish what the gate has not seen, where results are only compared with others.

    Their reports say that it did not pass.
    """

    def unproven(folder: Path, **options: Any) -> gate.Verdict:
        return gate.Verdict(
            folder=str(folder),
            num_tensors=0,
            dtype="float32",
            agreement=Agreement(passed=False, relative=1.0, kl=1.0, same_argmax=0.0, exact=False),
            masked_linears=0,
            natural_zeros=0,
            untouched_equal=None,
        )

    for module in (steps, recovering):
        monkeypatch.setattr(module, "pass_gate", unproven)


@pytest.fixture
def quick_gate() -> Iterator[None]:
    """Let gates of a test run as in `gate_here`."""
    with gate_here():
        yield
