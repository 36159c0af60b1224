"""A GGUF file holds the checkpoint bit for bit, in llama.cpp's words, or there is none."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llmprune import cli
from llmprune.base.errors import CheckpointError, RecipeError, UnsupportedModel
from llmprune.checkpoint.locate import open_source
from llmprune.delivery import gguf_file
from llmprune.delivery.gguf_contents import describe
from llmprune.delivery.gguf_file import export_gguf, permute, prove, unpermute
from llmprune.delivery.gguf_model import rope_factors
from llmprune.delivery.gguf_vocabulary import PRE_TOKENIZERS, vocabulary_fields

NUM_VOCAB = 96
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama with heads narrower than the model": ("llama", {"head_dim": 6}),
    "llama, tied, with every bias": (
        "llama",
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "llama 3": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "mistral": ("mistral", {"head_dim": 6, "sliding_window": None}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2 with heads narrower than the model": ("qwen2", {"head_dim": 6}),
    "qwen3": ("qwen3", {"head_dim": 6}),
}
HALVES = {"q": 4, "k": 2}  # heads

Make = Callable[..., Path]


def byte_level(text: str, pre: Any = None, *, whole_words: bool = False) -> Tokenizer:
    """Train a byte-level BPE of 90 tokens that begins a text with <s>."""
    inner = Tokenizer(models.BPE(ignore_merges=whole_words))
    inner.pre_tokenizer = pre or pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(vocab_size=90, special_tokens=["<s>", "</s>"], show_progress=False)
    inner.train_from_iterator([text], trainer)
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    return inner


def save_tokenizer(inner: Tokenizer, folder: Path, **special: str) -> Path:
    special = special or {"bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Make:
    """Return what writes a pico checkpoint whose vectors and biases are all away from 0 and 1."""

    def folder_of(model_type: str, dtype: torch.dtype = torch.float32, **keys: Any) -> Path:
        sizes = {"vocab_size": NUM_VOCAB, "hidden_size": 32, "intermediate_size": 40}
        sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        sizes |= {"max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 1}
        keys = {"tie_word_embeddings": False} | sizes | keys
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **keys))
        with torch.no_grad():
            for value in model.parameters():
                noise = torch.randn_like(value)
                value.copy_(0.2 * noise if value.dim() > 1 else 1 + 0.1 * noise)
        folder = tmp_path_factory.mktemp("model") / model_type
        model.to(dtype).save_pretrained(folder)
        return save_tokenizer(byte_level(text_file.read_text()), folder)

    return folder_of


@pytest.fixture(scope="module")
def plain(make: Make) -> Path:
    """A llama in bfloat16, tied; never write into it."""
    return make("llama", torch.bfloat16, tie_word_embeddings=True)


def slow_permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Move row by row: what turned with row i of the lower half follows it."""
    rows = weight.shape[0] // heads
    out = torch.empty_like(weight)
    for head in range(heads):
        for i in range(rows // 2):
            out[head * rows + 2 * i] = weight[head * rows + i]
            out[head * rows + 2 * i + 1] = weight[head * rows + rows // 2 + i]
    return out


NAMES = {
    "embed_tokens": "token_embd", "lm_head": "output", "norm": "output_norm",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}  # fmt: skip


def name_by_hand(name: str) -> str:
    """Translate a name of transformers by rules written again."""
    block = re.match(r"model\.layers\.(\d+)\.", name)
    stem, _, leaf = (name[block.end() :] if block else name.removeprefix("model.")).rpartition(".")
    ours = NAMES.get(stem) or re.sub(
        r"(self_attn|mlp)\.(\w+)_proj",
        lambda m: {"mlp": "ffn", "self_attn": "attn"}[m[1]] + "_" + m[2],
        stem,
    )
    return f"blk.{block[1]}.{ours}.{leaf}" if block else f"{ours}.{leaf}"


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a GGUF file."""
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        data = np.array(tensor.data)
        if tensor.tensor_type.name == "BF16":
            found[tensor.name] = torch.from_numpy(data.view(np.int16)).view(torch.bfloat16)
        else:
            found[tensor.name] = torch.from_numpy(data)
    return found


def fields_of(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def test_rows_of_a_head_change_places_as_in_the_slow_version() -> None:
    weight_OI = torch.arange(24.0).reshape(12, 2)
    assert permute(weight_OI[:, 0], 2).tolist() == [0, 6, 2, 8, 4, 10, 12, 18, 14, 20, 16, 22]
    for heads in (1, 2, 3):
        there = permute(weight_OI, heads)
        assert torch.equal(there, slow_permuted(weight_OI, heads))
        assert torch.equal(unpermute(there, heads), weight_OI)
    assert not torch.equal(permute(weight_OI, 2), weight_OI)


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_is_the_checkpoint_s_bit_for_bit(
    case: str, make: Make, tmp_path: Path
) -> None:
    model_type, keys = CASES[case]
    folder, out = make(model_type, **keys), tmp_path / "x.gguf"
    done = export_gguf(str(folder), out)
    narrow = "narrower" in case
    assert done.architecture == (
        "llama" if model_type == "mistral" or (model_type == "qwen2" and narrow) else model_type
    )
    moved = [note for note in done.notes if "written as llama" in note]
    assert len(moved) == (model_type == "qwen2" and narrow)
    wanted = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        turned = re.search(r"self_attn\.([qk])_proj", name)
        heads = HALVES[turned[1]] if turned and done.architecture == "llama" else 0
        wanted[name_by_hand(name)] = slow_permuted(weight, heads) if heads else weight
    found = tensors_of(out)
    factors = found.pop("rope_freqs.weight", None)
    assert (factors is not None) == (case == "llama 3")
    assert found.keys() == wanted.keys()
    assert ("output.weight" in found) == ("tied" not in case)
    for name, weight in wanted.items():
        assert found[name].dtype == weight.dtype == torch.float32
        assert torch.equal(found[name], weight), name
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"]


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_transformers_reads_the_file_as_the_same_model(
    model_type: str, make: Make, tmp_path: Path, tokens: torch.Tensor, stock: Callable[[Path], Any]
) -> None:
    """Its own GGUF reader knows neither biases of llama nor rope factors, so only these two."""
    folder = make(model_type, **({"head_dim": 6} if model_type == "llama" else {}))
    export_gguf(str(folder), tmp_path / "x.gguf")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="x.gguf", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, stock(folder)(tokens).logits)


@pytest.mark.parametrize(("dtype", "number"), [(torch.bfloat16, 32), (torch.float16, 1)])
def test_matrices_keep_their_dtype_and_vectors_are_float32(
    dtype: torch.dtype, number: int, make: Make, tmp_path: Path
) -> None:
    export_gguf(str(make("qwen2", dtype)), tmp_path / "x.gguf")
    for name, value in tensors_of(tmp_path / "x.gguf").items():
        assert value.dtype == (dtype if value.dim() > 1 else torch.float32), name
    assert fields_of(tmp_path / "x.gguf")["general.file_type"] == number


def test_fields_say_what_the_config_says(make: Make, tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}
    folder = make("llama", head_dim=6, rms_norm_eps=1e-5, rope_parameters=rope)
    export_gguf(str(folder), tmp_path / "x.gguf")
    fields = fields_of(tmp_path / "x.gguf")
    found = {key: value for key, value in fields.items() if key.startswith(("llama.", "general."))}
    assert found.pop("llama.attention.layer_norm_rms_epsilon") == pytest.approx(1e-5, rel=1e-6)
    assert found == {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "llama",
        "general.file_type": 0,
        "llama.vocab_size": NUM_VOCAB,
        "llama.context_length": 128,
        "llama.embedding_length": 32,
        "llama.block_count": 2,
        "llama.feed_forward_length": 40,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 6,
        "llama.attention.value_length": 6,
        "llama.rope.dimension_count": 6,
        "llama.rope.freq_base": 5000.0,
        "llama.rope.scaling.type": "linear",
        "llama.rope.scaling.factor": 4.0,
    }


def test_fields_hold_the_tokenizer(plain: Path, tmp_path: Path) -> None:
    export_gguf(str(plain), tmp_path / "x.gguf")
    fields = fields_of(tmp_path / "x.gguf")
    stored = json.loads((plain / "tokenizer.json").read_text(encoding="utf-8"))
    tokens = fields["tokenizer.ggml.tokens"]
    vocab = stored["model"]["vocab"]
    size = len(vocab)
    assert {token: tokens.index(token) for token in vocab} == vocab
    assert tokens[size:] == [f"[PAD{index}]" for index in range(size, NUM_VOCAB)]
    types = fields["tokenizer.ggml.token_type"]
    assert types == [3, 3] + [1] * (size - 2) + [5] * (NUM_VOCAB - size)
    merges = [" ".join(pair) for pair in stored["model"]["merges"]]
    assert fields["tokenizer.ggml.merges"] == merges
    assert merges
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert fields["tokenizer.ggml.bos_token_id"] == 0
    assert fields["tokenizer.ggml.eos_token_id"] == 1
    assert fields["tokenizer.ggml.add_bos_token"] is True
    assert fields["tokenizer.ggml.add_eos_token"] is False
    assert "tokenizer.chat_template" not in fields


def test_a_chat_template_goes_along(text_file: Path, tmp_path: Path) -> None:
    save_tokenizer(byte_level(text_file.read_text()), tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    fields, notes = vocabulary_fields(tmp_path, NUM_VOCAB)
    assert fields["tokenizer.chat_template"] == "{{ messages[0].content }}"
    assert not notes


def steps_of(splits: tuple[str, ...]) -> Any:
    """Build the pre-tokenizer of a row of the table."""
    *rules, last = splits
    plain = last == "what ByteLevel splits"
    steps = [
        pre_tokenizers.Digits(individual_digits=True)
        if rule == "single digits"
        else pre_tokenizers.Split(Regex(rule), "isolated")
        for rule in (rules if plain else splits)
    ]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=plain))
    return pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]


@pytest.mark.parametrize(("rules", "name"), PRE_TOKENIZERS.items())
def test_a_pre_tokenizer_is_known_by_its_rules(
    rules: tuple[tuple[str, ...], bool], name: str, text_file: Path, tmp_path: Path
) -> None:
    splits, whole_words = rules
    inner = byte_level(text_file.read_text(), steps_of(splits), whole_words=whole_words)
    inner.normalizer = normalizers.NFC()
    fields, notes = vocabulary_fields(save_tokenizer(inner, tmp_path), NUM_VOCAB)
    assert fields["tokenizer.ggml.pre"] == name
    assert len(notes) == 1
    assert "NFC" in notes[0]


def test_a_tokenizer_that_llama_cpp_cannot_follow_is_refused(
    text_file: Path, tmp_path: Path
) -> None:
    text = text_file.read_text()

    def reason(inner: Tokenizer, num_vocab: int = NUM_VOCAB) -> str:
        with pytest.raises(UnsupportedModel, match="no equal in llama") as caught:
            vocabulary_fields(save_tokenizer(inner, tmp_path), num_vocab)
        return str(caught.value)

    assert "splits text by" in reason(byte_level(text, steps_of((r"\p{L}+|\s+",))))
    prefixed = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert "not in plain ByteLevel" in reason(byte_level(text, prefixed))
    assert "whole words first" in reason(byte_level(text, whole_words=True))
    lower = byte_level(text)
    lower.normalizer = normalizers.Lowercase()
    assert "normalises text with Lowercase" in reason(lower)
    assert "only 60" in reason(byte_level(text), 60)
    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2}, unk_token="</s>"))
    assert "WordLevel, not BPE" in reason(words)
    ended = byte_level(text)
    ended.post_processor = processors.TemplateProcessing(
        single="</s> $A", pair="</s> $A $B", special_tokens=[("</s>", 1)]
    )
    assert "adds tokens [1]" in reason(ended)


def sentencepiece(merges: list[tuple[str, str]], *, first: bool = False) -> Tokenizer:
    """Build a SentencePiece BPE: three specials, bytes, pieces in the order of their scores."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += dict.fromkeys(left + right for left, right in merges)
    pieces += sorted({char for pair in merges for piece in pair for char in piece})
    vocab = {piece: index for index, piece in enumerate(pieces)}
    inner = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    )
    if first:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        inner.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    inner.add_special_tokens(["<unk>", "<s>", "</s>"])
    return inner


SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
MERGES = [("▁", "a"), ("b", "a"), ("▁", "ba"), ("▁b", "a"), ("▁", "b")]


def test_sentencepiece_scores_are_the_ranks_of_merges(tmp_path: Path) -> None:
    for first in (False, True):
        inner = sentencepiece(MERGES, first=first)
        fields, notes = vocabulary_fields(save_tokenizer(inner, tmp_path, **SPECIAL), 270)
        named = {key.removeprefix("tokenizer.ggml."): value for key, value in fields.items()}
        tokens, scores = named["tokens"], named["scores"]
        assert (named["model"], named["pre"]) == ("llama", "default")
        found = {piece: scores[tokens.index(piece)] for piece in ("▁a", "ba", "▁ba", "▁b")}
        assert found == {"▁a": 0, "ba": -1, "▁ba": -2, "▁b": -4}
        types = [named["token_type"][i] for i in (0, 1, 2, 3, 258, 259, 269)]
        assert types == [2, 3, 3, 6, 6, 1, 5]
        assert named["add_space_prefix"] is True
        assert named["unknown_token_id"] == 0
        assert named["add_bos_token"] is False
        assert bool(notes) == first


def test_merges_that_are_no_scores_are_refused(tmp_path: Path) -> None:
    apart = [*MERGES[:3], ("▁", "b"), ("▁b", "a")]  # two ranks for one piece, another between
    lacking = [*MERGES[:3], ("▁", "b")]  # SentencePiece would also join ▁b and a
    for merges in (apart, lacking):
        folder = save_tokenizer(sentencepiece(merges), tmp_path, **SPECIAL)
        with pytest.raises(UnsupportedModel, match="SentencePiece ranks as one"):
            vocabulary_fields(folder, 270)


def test_rope_factors_are_those_of_transformers() -> None:
    config = AutoConfig.for_model("llama", head_dim=16, rope_parameters=LLAMA3_ROPE)
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    dense_R = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
    factors_R = rope_factors(config)
    assert factors_R is not None
    assert torch.allclose(dense_R / factors_R, theirs, rtol=1e-6, atol=0)


def test_rope_factors_by_hand() -> None:
    """64 tokens hold 64 / 2 pi = 10.2 turns of the first pair, and 1.59 of the second.

    10.2 >= 4: kept. 1.59: smooth = (1.59155 - 1) / 3 = 0.197183, which gives
    1 / (0.802817 / 8 + 0.197183) = 3.360949.
    """
    rope = LLAMA3_ROPE | {"rope_theta": 40.96}
    config = AutoConfig.for_model("llama", head_dim=4, rope_parameters=rope)
    assert 64 / (2 * torch.pi * 40.96**0.5) == pytest.approx(1.591549)
    factors_R = rope_factors(config)
    assert factors_R is not None
    assert factors_R.tolist() == pytest.approx([1.0, 3.360949], rel=1e-5)


def edited(folder: Path, target: Path, **keys: Any) -> str:
    """Copy a checkpoint with other entries in its config."""
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text()) | keys
    (target / "config.json").write_text(json.dumps(config))
    return str(target)


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"block_configs": [{"ffn": {}}]}, "has block_configs: its blocks are of different widths"),
        (
            {"model_type": "nemotron-nas", "block_configs": [{"ffn": {}}]},
            "has block_configs: its blocks",
        ),
        ({"model_type": "llmprune_llama"}, "is of type llmprune_llama: its blocks"),
        ({"model_type": "gpt2"}, "is of type 'gpt2'. GGUF is written for llama, mistral, qwen2"),
        ({"auto_map": {"AutoModelForCausalLM": "m.M"}}, "brings its own Python code"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type 'dynamic'",
        ),
    ],
)
def test_what_llama_cpp_cannot_compute_is_refused_before_writing(
    keys: dict[str, Any], reason: str, plain: Path, tmp_path: Path
) -> None:
    folder = edited(plain, tmp_path / "model", **keys)
    with pytest.raises(UnsupportedModel, match=re.escape(reason)):
        export_gguf(folder, tmp_path / "out" / "x.gguf")
    assert not (tmp_path / "out").exists()


def test_a_bias_without_a_place_is_refused(make: Make, tmp_path: Path) -> None:
    folder = make("qwen3", attention_bias=True)
    with pytest.raises(UnsupportedModel, match=r"no place for model\.layers\.0\.self_attn\.o_proj"):
        export_gguf(str(folder), tmp_path / "x.gguf")


def test_a_dtype_without_a_place_is_refused(plain: Path, tmp_path: Path) -> None:
    folder = edited(plain, tmp_path / "model")
    file = Path(folder) / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].double()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UnsupportedModel, match=r"model\.norm\.weight is stored as F64"):
        export_gguf(folder, tmp_path / "x.gguf")


def test_a_config_that_does_not_fit_the_tensors_is_an_error(plain: Path, tmp_path: Path) -> None:
    folder = edited(plain, tmp_path / "narrow", intermediate_size=24)
    with pytest.raises(CheckpointError, match=r"shape \[40, 32\], and its config says \[24, 32\]"):
        export_gguf(folder, tmp_path / "x.gguf")
    folder = edited(plain, tmp_path / "untied", tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"no tensor lm_head\.weight"):
        export_gguf(folder, tmp_path / "x.gguf")


def test_a_sliding_window_bounds_the_context(make: Make, tmp_path: Path) -> None:
    done = export_gguf(str(make("mistral", sliding_window=48)), tmp_path / "x.gguf")
    assert fields_of(tmp_path / "x.gguf")["llama.context_length"] == 48
    assert "context length 48 instead of 128" in done.notes[0]


def test_the_proof_sees_a_single_changed_bit(plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.gguf"
    export_gguf(str(plain), out)
    source = open_source(str(plain))
    contents = describe(source)
    prove(out, contents, source)
    reader = gguf.GGUFReader(out)
    whole = out.read_bytes()
    for tensor in reader.tensors:
        changed = bytearray(whole)
        changed[tensor.data_offset + tensor.n_bytes - 1] ^= 1
        out.write_bytes(changed)
        with pytest.raises(CheckpointError, match=f"tensor {re.escape(tensor.name)} read back"):
            prove(out, contents, source)
    for key in ("llama.block_count", "llama.rope.freq_base", "tokenizer.ggml.tokens"):
        changed = bytearray(whole)
        field = reader.fields[key]
        place = field.offset + sum(part.nbytes for part in field.parts) - 1
        changed[place] ^= 1
        out.write_bytes(changed)
        with pytest.raises(CheckpointError, match=f"field {key} read back"):
            prove(out, contents, source)


def test_a_file_that_fails_its_proof_is_not_kept(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_file, "unpermute", lambda weight, heads: weight)
    with pytest.raises(CheckpointError, match="attn_q"):
        export_gguf(str(plain), tmp_path / "x.gguf")
    assert not list(tmp_path.iterdir())


def test_an_existing_file_is_replaced_only_when_asked(plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.gguf"
    out.write_text("mine")
    with pytest.raises(RecipeError, match="add --overwrite"):
        export_gguf(str(plain), out)
    assert out.read_text() == "mine"
    export_gguf(str(plain), out, overwrite=True)
    assert out.read_bytes()[:4] == b"GGUF"
    with pytest.raises(RecipeError, match=r"Type --out x\.bin\.gguf"):
        export_gguf(str(plain), tmp_path / "x.bin")


def test_two_exports_are_the_same_bytes(plain: Path, tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        export_gguf(str(plain), tmp_path / name)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_the_command_names_the_file_after_the_folder(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as done:
        cli.main(["export", str(plain), "--to", "gguf", "--json"])
    assert done.value.code == 0
    told = json.loads(capsys.readouterr().out)
    assert told["file"] == "llama.gguf"
    assert told["num_bytes"] == (tmp_path / "llama.gguf").stat().st_size
    with pytest.raises(SystemExit) as done:
        cli.main(["export", str(plain), "--to", "onnx"])
    assert done.value.code == 2
    assert "to: 'onnx' is no format" in capsys.readouterr().err


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_what_transformers_does(
    case: str, make: Make, tmp_path: Path, stock: Callable[[Path], Any]
) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    model_type, keys = CASES[case]
    folder = make(model_type, **keys)
    export_gguf(str(folder), tmp_path / "x.gguf")
    options: dict[str, Any] = {"n_ctx": 128, "n_threads": 1, "type_k": 0, "type_v": 0}
    theirs = llama_cpp.Llama(str(tmp_path / "x.gguf"), verbose=False, logits_all=True, **options)
    ids = list(range(2, 90))
    theirs.eval(ids)
    with torch.no_grad():
        ours_TV = stock(folder)(torch.tensor([ids])).logits[0]
    apart_TV = torch.from_numpy(theirs.scores[: len(ids)].copy()) - ours_TV
    theirs.close()
    assert float(apart_TV.abs().max()) < 1e-5 * float(ours_TV.abs().max())


def test_llama_cpp_writes_on_as_transformers_does(
    tmp_path: Path, stock: Callable[[Path], Any]
) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    from transformers import AutoTokenizer

    export_gguf("demo", tmp_path / "demo.gguf")
    folder = open_source("demo").folder
    model, tokenizer = stock(folder), AutoTokenizer.from_pretrained(folder)
    theirs = llama_cpp.Llama(
        str(tmp_path / "demo.gguf"), verbose=False, n_ctx=128, n_threads=1, logits_all=True
    )
    for prompt in ("Once upon a time there was", "He said: \"I don't", "The  ship,\n\nin 1842,"):
        ids = tokenizer(prompt)["input_ids"]
        assert theirs.tokenize(prompt.encode()) == ids
        row = torch.tensor([ids])
        wanted = model.generate(
            row, attention_mask=torch.ones_like(row), max_new_tokens=32, do_sample=False
        )[0, len(ids) :].tolist()
        theirs.reset()
        theirs.eval(ids)
        found: list[int] = []
        while len(found) < len(wanted):
            found.append(int(np.argmax(theirs.scores[theirs.n_tokens - 1])))
            theirs.eval(found[-1:])
        assert found == wanted
    theirs.close()
