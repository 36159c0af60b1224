"""Narrower streams and smaller vocabularies, from the command to a folder that loads stock."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import llmprune.steps
from llmprune.api import make_recipe, plan, prune
from llmprune.arch.probe import find_family
from llmprune.base.errors import LlmpruneError, RecipeError, UnsupportedModel
from llmprune.checkpoint.locate import open_source
from llmprune.checkpoint.source import read_json
from llmprune.engine import whole_run
from llmprune.evaluation.perplexity import loss_of_model
from llmprune.evaluation.windows import rolling_windows
from llmprune.hidden.narrowing import Narrowing
from llmprune.hidden.proof import masked, prove_narrowing
from llmprune.report.run import Report
from llmprune.vocabulary.contents import merges_of, model_tokens
from tests.story.test_resume import Child, at_call, contents, in_child

WORDS = 384
Pico = Callable[..., Path]
pytestmark = pytest.mark.usefixtures("quick_gate")


@pytest.fixture
def run(tmp_path: Path, text_file: Path) -> Callable[..., Report]:
    """Prune a folder into tmp_path/out on little text."""

    def prune_folder(
        folder: Path, method: str, pattern: str, sparsity: float | None, **wish: Any
    ) -> Report:
        usual: dict[str, Any] = {"out": tmp_path / "out", "num_samples": 4, "seq_len": 16}
        data = [f"evaluate.data={text_file}", "evaluate.num_windows=2", "evaluate.perplexity=true"]
        settings = [*data, *wish.pop("settings", ())]
        return prune(
            str(folder),
            method=method,
            pattern=pattern,
            sparsity=sparsity,
            calib=str(text_file),
            quiet=True,
            settings=settings,
            **usual | wish,
        )

    return prune_folder


@pytest.fixture(scope="session")
def with_words(pico: Pico, tmp_path_factory: pytest.TempPathFactory) -> Pico:
    """Return a pico model whose tokenizer is a byte-level BPE: the first words of the demo's."""

    def folder_of(model_type: str, *, tied: bool = True) -> Path:
        folder = tmp_path_factory.mktemp("words") / model_type
        shutil.copytree(pico(model_type, tied=tied), folder)
        data = read_json(open_source("demo").folder / "tokenizer.json")
        vocab = {token: index for token, index in model_tokens(data).items() if index < WORDS}
        merges = [pair for pair in merges_of(data) if "".join(pair) in vocab]
        vocab |= {f"<{index}>": index for index in set(range(WORDS)) - set(vocab.values())}
        inner = Tokenizer(models.BPE(vocab, merges))
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        names = {index: token for token, index in vocab.items()}
        PreTrainedTokenizerFast(
            tokenizer_object=inner, bos_token=names[0], eos_token=names[1]
        ).save_pretrained(folder)
        config = read_json(folder / "config.json") | {"vocab_size": WORDS}
        (folder / "config.json").write_text(json.dumps(config))
        tensors = load_file(folder / "model.safetensors")
        for seed, (name, value) in enumerate(sorted(tensors.items())):
            if name.endswith(("wte.weight", "embed_tokens.weight", "lm_head.weight")):
                draw = torch.Generator().manual_seed(seed)
                tensors[name] = torch.randn(WORDS, value.shape[1], generator=draw)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return folder_of


@pytest.mark.parametrize(
    ("model_type", "tied", "method"),
    [
        ("llama", True, "hidden-channels"),
        ("llama", False, "slicegpt"),
        ("qwen3", False, "hidden-channels"),
        ("qwen3", False, "slicegpt"),
        ("mixtral", False, "slicegpt"),
        ("mixtral", True, "hidden-channels"),
    ],
)
def test_a_narrower_stream_loads_stock_as_planned(
    model_type: str, tied: bool, method: str, pico: Pico, run: Any, stock: Any, tmp_path: Path
) -> None:
    folder = pico(model_type, tied=tied)
    decided = plan(make_recipe(str(folder), method=method, pattern="hidden", sparsity=0.2))
    assert decided.config_changes["hidden_size"] == 24
    report = run(folder, method, "hidden", 0.2)
    small = stock(tmp_path / "out")
    assert small.config.hidden_size == 24
    assert sum(value.numel() for value in small.parameters()) == report.data["parameters_after"]
    assert decided.shipment is not None
    assert report.data["parameters_after"] == decided.shipment.num_params == _of(decided)
    assert report.sparsity == decided.sparsity >= 0.2
    assert report.perplexity is not None and report.data["gate"]["generation"].startswith(
        "the same"
    )
    facts = read_json(tmp_path / "out" / "llmprune_manifest.json")
    assert (facts["shared"], facts["tier"]) == ({"hidden": 24}, "E0")


def _of(decided: Any) -> int:
    found: int = decided.whole.num_params
    return found


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_kept_channels_are_recorded_and_compute_what_zeros_would(
    model_type: str, pico: Pico, run: Any, stock: Any, tokens: Tensor, tmp_path: Path
) -> None:
    folder = pico(model_type)
    run(folder, "hidden-channels", "hidden", 0.25)
    kept_K = load_file(tmp_path / "out" / "llmprune" / "units.safetensors")["hidden"].long()
    assert len(kept_K) == 24
    large = stock(folder)
    zeros = masked(large, find_family(large.config), prove_narrowing(large.config), kept_K)
    with torch.no_grad():
        expected = zeros(input_ids=tokens, use_cache=False).logits
        found = stock(tmp_path / "out")(input_ids=tokens, use_cache=False).logits
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_rotation_parts_tied_embeddings_and_says_what_that_costs(
    pico: Pico, with_words: Pico, tmp_path: Path
) -> None:
    wish: dict[str, Any] = {"method": "slicegpt", "pattern": "hidden", "out": tmp_path / "out"}
    decided = plan(make_recipe(str(pico("llama")), sparsity=0.25, **wish))
    assert "become two tensors: 1,536 parameters" in repr(decided)
    assert decided.whole is not None and decided.whole.num_params < decided.num_params
    with pytest.raises(RecipeError, match=r"where the source has .* hidden-channels, which keeps"):
        plan(make_recipe(str(with_words("llama")), sparsity=0.01, **wish))


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_smaller_vocabulary_says_the_same_with_fewer_tokens(
    model_type: str, with_words: Pico, run: Any, stock: Any, text_file: Path, tmp_path: Path
) -> None:
    folder, out = with_words(model_type), tmp_path / "out"
    report = run(folder, "vocabulary", "vocabulary", 0.15)
    assert report.data["form"] == "shrunk" and report.sparsity == pytest.approx(1 / 6)
    small, large = stock(out), stock(folder)
    kept_K = load_file(out / "llmprune" / "units.safetensors")["vocabulary"].long()
    assert small.config.vocab_size == len(kept_K) == 320
    old, new = (AutoTokenizer.from_pretrained(path) for path in (folder, out))
    text = text_file.read_text(encoding="utf-8")[:300]
    assert new.decode(new(text)["input_ids"]) == text
    assert new.convert_ids_to_tokens(list(range(320))) == old.convert_ids_to_tokens(kept_K.tolist())
    ids_NT = torch.tensor([new(text)["input_ids"][:24]])
    with torch.no_grad():
        expected = large(input_ids=kept_K[ids_NT], use_cache=False).logits[..., kept_K]
        found = small(input_ids=ids_NT, use_cache=False).logits
    assert torch.allclose(found, expected, atol=1e-5 * float(expected.abs().max()))
    rolling = report.data["rolling"]
    assert report.perplexity is None and "per byte" in repr(report)
    assert rolling["dense"]["num_bytes"] == rolling["pruned"]["num_bytes"]
    assert rolling["dense"]["num_tokens"] <= rolling["pruned"]["num_tokens"]
    whole = text_file.read_text(encoding="utf-8")
    part = whole[: len(whole) * 32 // len(old(whole)["input_ids"])]
    windows = rolling_windows(new(part)["input_ids"], 16, new.bos_token_id)
    nats, _ = loss_of_model(small, *windows)
    assert rolling["pruned"]["byte_perplexity"] == pytest.approx(math.exp(nats / len(part)))


def test_the_tokens_that_stay_are_those_of_the_text(
    with_words: Pico, run: Any, tmp_path: Path
) -> None:
    folder = with_words("llama")
    words = AutoTokenizer.from_pretrained(folder)
    token = words.convert_ids_to_tokens(WORDS - 1)  # of the last merge: the first to go else
    told = torch.full((4, 16), WORDS - 1)
    prune(
        str(folder), method="vocabulary", pattern="vocabulary", sparsity=0.15, calib=told,
        out=tmp_path / "out", quiet=True, settings=["evaluate.perplexity=false"],
    )  # fmt: skip
    assert token in AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    run(folder, "vocabulary", "vocabulary", 0.15, out=tmp_path / "other")
    assert token not in AutoTokenizer.from_pretrained(tmp_path / "other").get_vocab()


def test_masks_of_an_earlier_pruning_outlive_a_smaller_vocabulary(
    with_words: Pico, run: Any, tmp_path: Path
) -> None:
    run(with_words("llama"), "magnitude", "unstructured", 0.5, out=tmp_path / "first")
    report = run(tmp_path / "first", "vocabulary", "vocabulary", 0.15)
    assert report.data["gate"]["masked_linears"] == 14
    with pytest.raises(RecipeError, match=r"whose zeros a narrower .* prune.regrow=true"):
        run(tmp_path / "first", "hidden-channels", "hidden", 0.25, out=tmp_path / "third")


# Killed and started again.


def arguments(folder: Path, method: str, sparsity: float, text: Path, out: Path) -> list[object]:
    return [
        *("--model", folder, "--method", method, "--sparsity", sparsity, "--calib", text),
        *("--num-samples", 4, "--seq-len", 16, "--no-eval", "--out", out),
    ]


Wish = Callable[[Path], list[object]]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Wish], Any]:
    """Return what carries out a wish once from beginning to end, and tells the result's bytes."""
    home, known = tmp_path_factory.mktemp("undisturbed"), dict[str, Any]()

    def result(name: str, wish: Wish) -> Any:
        if name not in known:
            assert in_child(home, wish(home / name)).code == 0
            known[name] = contents(home / name)
        return dict(known[name])

    return result


def killed_then_resumed(
    wish: Wish, home: Path, install: Callable[[], None], expected: Any
) -> tuple[Child, Child]:
    """Run killed and started again; the bytes are those of a run that nothing disturbed."""
    first = in_child(home, wish(home / "out"), install)
    assert first.killed and not (home / "out").exists(), first.output
    second = in_child(home, wish(home / "out"))
    assert second.code == 0, second.output
    found = contents(home / "out")
    own = "llmprune/run.json"  # names the folder
    assert found.pop(own) and expected.pop(own) and found == expected
    return first, second


@pytest.mark.parametrize(
    ("owner", "name", "nth", "finished"),
    [
        (whole_run, "survey_residual", 1, []),
        (Narrowing, "commit", 1, []),
        (Narrowing, "commit", 2, [0]),
        (Narrowing, "commit_trunk", 1, [0, 1]),
        (llmprune.steps, "pass_gate", 1, [0, 1]),
    ],
)
def test_a_killed_slicing_resumes_to_the_same_bytes(
    owner: Any, name: str, nth: int, finished: list[int], pico: Pico, text_file: Path,
    tmp_path: Path, undisturbed: Callable[[str, Wish], Any],
) -> None:  # fmt: skip
    folder = pico("mixtral", tied=False)

    def wish(out: Path) -> list[object]:
        return arguments(folder, "slicegpt", 0.2, text_file, out)

    expected = undisturbed("slicegpt", wish)
    first, second = killed_then_resumed(wish, tmp_path, lambda: at_call(owner, name, nth), expected)
    assert first.finished == finished
    assert second.finished == [index for index in (0, 1) if index not in finished]


@pytest.mark.parametrize(
    ("owner", "name", "finished"),
    [(whole_run, "prune_vocabulary", []), (llmprune.steps, "pass_gate", [-1])],
)
def test_a_killed_cut_of_the_vocabulary_resumes_to_the_same_bytes(
    owner: Any, name: str, finished: list[int], with_words: Pico, text_file: Path, tmp_path: Path,
    undisturbed: Callable[[str, Wish], Any],
) -> None:  # fmt: skip
    folder = with_words("llama")

    def wish(out: Path) -> list[object]:
        return arguments(folder, "vocabulary", 0.15, text_file, out)

    expected = undisturbed(folder.parent.name, wish)
    first, second = killed_then_resumed(wish, tmp_path, lambda: at_call(owner, name, 1), expected)
    assert (first.finished, second.finished) == (finished, [] if finished else [-1])


# What cannot be done.


@pytest.mark.parametrize(
    ("method", "pattern", "settings", "message"),
    [
        ("slicegpt", "vocabulary", (), r"slicegpt has no rule for vocabulary.*--pattern hidden"),
        ("slicegpt", "ffn-channels", (), r"slicegpt has no rule for ffn-channels"),
        ("flap", "hidden", (), r"flap has no rule for hidden.*slicegpt, hidden-channels"),
        ("slicegpt", "unstructured", (), r"no rule for unstructured"),
        ("slicegpt", "hidden", ("prune.form=masked",), r"prune.form: masked cannot hold"),
        ("slicegpt", "hidden", ("prune.tier=E2",), r"prune.tier: E2 cannot hold"),
        ("slicegpt", "hidden", ("prune.solver=least-squares",), r"prune.solver: 'least-squares'"),
        ("slicegpt", "hidden", ("prune.skip=['*down_proj']",), r"prune.skip: .*Leave it out"),
        ("slicegpt", "hidden", ("prune.allocation=owl",), r"prune.allocation: owl"),
        ("slicegpt", "hidden", ("prune.target={ppl: '+5%'}",), r"prune.target: ppl"),
        ("slicegpt", "hidden", ("prune.options={alpha: 1}",), r"prune.options: SliceGPT has none"),
        ("slicegpt", "hidden", ("prune.sparsity=0.99",), r"hidden size|none of 32 units"),
        ("vocabulary", "vocabulary", ("prune.sparsity=0.9",), r"ids are too few|none of 64"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_written(
    method: str, pattern: str, settings: tuple[str, ...], message: str, pico: Pico, run: Any,
    tmp_path: Path,
) -> None:  # fmt: skip
    with pytest.raises(LlmpruneError, match=message):
        run(pico("llama", tied=False), method, pattern, 0.25, settings=settings)
    assert not list(tmp_path.iterdir())


def test_layer_norms_are_refused(pico: Pico, run: Any, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"hidden size cannot be cut.*--pattern"):
        run(pico("gpt2"), "slicegpt", "hidden", 0.25)
    assert not list(tmp_path.iterdir())


def test_a_model_in_memory_is_refused(make_model: Any, tokens: Tensor) -> None:
    with pytest.raises(RecipeError, match=r"model in memory.*save_pretrained"):
        prune(make_model("llama"), method="slicegpt", pattern="hidden", sparsity=0.25, calib=tokens)


@pytest.mark.parametrize(("key", "amount"), [("params", "0.8x"), ("size", "0.8x")])
def test_a_size_may_be_asked_for(key: str, amount: str, pico: Pico, tmp_path: Path) -> None:
    for method, pattern in (("hidden-channels", "hidden"), ("slicegpt", "hidden")):
        wish: dict[str, Any] = {"method": method, "pattern": pattern, "out": tmp_path / "out"}
        decided = plan(make_recipe(str(pico("qwen3", tied=False)), target={key: amount}, **wish))
        assert decided.whole is not None
        assert decided.whole.num_params <= 0.8 * decided.num_params
