"""Results whose blocks differ: they load with their code, compute what zeros would, travel on."""

from __future__ import annotations

import ast
import copy
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, dynamic_module_utils

from llmprune import remote
from llmprune.arch.layout import BlockLayout, Layout
from llmprune.base.errors import WontLoad
from llmprune.delivery import trial
from llmprune.delivery.gate import pass_gate
from llmprune.delivery.heterogeneous import (
    heterogeneous_config,
    lowest_tier,
    parameter_shapes,
    why_not,
)
from llmprune.remote import modeling_decilm, modeling_llmprune

ISSUES = ("missing_keys", "unexpected_keys", "mismatched_keys")
F, H, G = "intermediate_size", "num_attention_heads", "num_key_value_heads"
SIZES = dict(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"tie_word_embeddings": True},
    "gemma3_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 6,
    },
    "mixtral": {"num_local_experts": 4},
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, "n_inner": 64},
}


def config_of(model_type: str, **sizes: Any) -> Any:
    shared = SIZES if model_type != "gpt2" else {k: v for k, v in SIZES.items() if "token" in k}
    own = {"vocab_size": 64, **shared, **OWN[model_type], **sizes}
    return AutoConfig.for_model(model_type, **own)


def layout_of(*blocks: tuple[dict[str, int], tuple[str, ...]]) -> Layout:
    return Layout(
        blocks=tuple(
            BlockLayout(source=index, sizes=sizes, without=without)
            for index, (sizes, without) in enumerate(blocks)
        )
    )


def mixed(ffn: str, *heads: dict[str, int]) -> Layout:
    """Blocks without attention (the first), with fewer heads, without FFN, and narrow."""
    first, whole = heads or ({}, {})
    return layout_of(
        ({ffn: 40}, ("attention",)), ({ffn: 64, **first}, ()), (whole, ("ffn",)),
        ({ffn: 24, **whole}, ()),
    )  # fmt: skip


PORTABLE = layout_of(({F: 512}, ()), ({F: 256}, ()), ({F: 512}, ("attention",)), ({F: 768}, ()))
GROUPED = mixed(F, {H: 2, G: 1}, {H: 4, G: 2})


@dataclass(frozen=True)
class Case:
    model_type: str
    tier: Any
    layout: Layout
    sizes: dict[str, int] = field(default_factory=dict)


CASES = {
    "E3-llama": Case("llama", "E3", mixed(F, {H: 3, G: 1}, {H: 4, G: 1}), {G: 1}),
    "E3-qwen3": Case("qwen3", "E3", GROUPED),
    "E3-mistral": Case("mistral", "E3", GROUPED),
    "E3-gemma3": Case("gemma3_text", "E3", GROUPED),
    "E3-mixtral": Case("mixtral", "E3", layout_of(({}, ("attention",)), ({}, ()), ({}, ("ffn",)),
                                                  ({H: 2, G: 1}, ()))),
    "E3-gpt2": Case("gpt2", "E3", mixed("n_inner")),
    "E2-llama": Case("llama", "E2", PORTABLE, {F: 768}),
    "E2-mistral": Case("mistral", "E2", PORTABLE, {F: 768}),
    "E2-qwen2": Case("qwen2", "E2", PORTABLE, {F: 768}),
}  # fmt: skip


def random_model(config: Any) -> Any:
    """Build a random model in float32 with biases, whose blocks have an effect."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("bias"):
                value.normal_(std=0.1)
            elif value.dim() > 1:
                value.mul_(5)
    return use_eager_experts(model)


def use_eager_experts(model: Any) -> Any:
    if hasattr(model.config, "_experts_implementation"):
        model.set_experts_implementation("eager")  # the others know no float64
    return model


def cut(model: Any, layout: Layout, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Return the last units of each of a model's parameters, and zero all others in the model."""
    kept = {}
    with torch.no_grad():
        for name, value in model.named_parameters(remove_duplicate=False):
            if name not in shapes:
                assert layout.blocks[int(re.findall(r"\d+", name)[0])].without, name
                value.mul_(0 if "layernorm" not in name else 1)
                continue
            part = tuple(slice(-size, None) for size in shapes[name])
            kept[name] = value[part].clone(memory_format=torch.contiguous_format)
            value.zero_()
            value[part] = kept[name]
    return kept


def write(folder: Path, case: Case) -> Any:
    """Write a result, and return the stock model that computes the same with zeros."""
    model = random_model(config_of(case.model_type, **case.sizes))
    config, files = heterogeneous_config(model.config.to_diff_dict(), case.layout, case.tier)
    kept = cut(model, case.layout, parameter_shapes(config))
    if model.config.tie_word_embeddings:
        del kept["lm_head.weight"]
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    for file in files:
        shutil.copy(file, folder)
    return model


def load(folder: Path, **options: Any) -> Any:
    """Load a folder as its users do."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=True, **options
    )
    assert not any(info[issue] for issue in ISSUES), info
    return use_eager_experts(model)


Made = tuple[Path, Any]


@pytest.fixture(autouse=True, scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what transformers copies of our code out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        home = str(tmp_path_factory.mktemp("modules"))
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", home)
        patch.syspath_prepend(home)
        yield


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """Return the folder of a case and its stock twin, made once; never write into it."""
    home, made = tmp_path_factory.mktemp("results"), dict[str, Made]()

    def of(name: str) -> Made:
        if name not in made:
            made[name] = home / name, write(home / name, CASES[name])
        return made[name]

    return of


@pytest.fixture(params=CASES)
def result(request: pytest.FixtureRequest, make: Callable[[str], Made]) -> Made:
    return make(request.param)


def test_the_cases_fit_their_tiers(result: Made) -> None:
    case = CASES[result[0].name]
    config = config_of(case.model_type, **case.sizes).to_diff_dict()
    assert why_not(config, case.layout, case.tier) is None
    assert lowest_tier(config, case.layout)[0] == case.tier


def test_a_result_computes_what_its_source_does_with_zeros(result: Made, tokens: Tensor) -> None:
    folder, twin = result
    whole = random_model(config_of(CASES[folder.name].model_type, **CASES[folder.name].sizes))
    model = load(folder)
    with torch.no_grad():
        ours, zeros = model.double()(tokens).logits, copy.deepcopy(twin).double()(tokens).logits
        before = whole.double()(tokens).logits
    assert (ours - zeros).abs().max() < 1e-9
    assert (ours - before).abs().max() > 1e-3  # something was cut


@pytest.mark.parametrize("padded", [0, 5])
def test_generation_is_the_same_with_and_without_a_cache(
    result: Made, tokens: Tensor, padded: int
) -> None:
    folder, twin = result
    prompt_NT = tokens[:2, :14]
    mask_NT = torch.ones_like(prompt_NT)
    mask_NT[0, :padded] = 0
    settings: dict[str, Any] = dict(max_new_tokens=10, do_sample=False, eos_token_id=None,
                                    pad_token_id=0, attention_mask=mask_NT)  # fmt: skip
    expected = twin.generate(prompt_NT, use_cache=False, **settings)
    model = load(folder)
    assert torch.equal(model.generate(prompt_NT, use_cache=False, **settings), expected)
    assert torch.equal(model.generate(prompt_NT, **settings), expected)
    for chunks in ({}, {"prefill_chunk_size": 7}):  # prefilled by parts, it is allocated before
        static = model.generate(prompt_NT, cache_implementation="static", **settings, **chunks)
        assert torch.equal(static, expected)


def test_every_block_counts_the_tokens_so_that_a_cache_can_be_cropped(
    result: Made, tokens: Tensor
) -> None:
    with torch.no_grad():
        cache = load(result[0])(tokens[:, :5], use_cache=True).past_key_values
    assert [cache.get_seq_length(index) for index in range(4)] == [5, 5, 5, 5]
    cache.crop(-2)
    assert [cache.get_seq_length(index) for index in range(4)] == [3, 3, 3, 3]


@pytest.mark.parametrize("name", ["E2-llama", "E3-llama"])
def test_a_result_refuses_to_load_without_trust(
    name: str, make: Callable[[str], Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody(prompt: str) -> str:
        raise EOFError

    monkeypatch.setattr("builtins.input", nobody)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        AutoModelForCausalLM.from_pretrained(make(name)[0])


def test_a_result_saved_again_is_whole(result: Made, tokens: Tensor, tmp_path: Path) -> None:
    folder, _ = result
    model = load(folder)
    model.save_pretrained(tmp_path / "again")
    code = [path.name for path in folder.glob("*.py")]
    assert [path.name for path in (tmp_path / "again").glob("*.py")] == code
    again = load(tmp_path / "again")
    assert type(again).__name__ == type(model).__name__
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("name", ["E2-qwen2", "E3-llama", "E3-gpt2"])
def test_lora_trains_on_a_result_and_merges(name: str, make: Callable, tokens: Tensor) -> None:
    model = load(make(name)[0])
    with torch.no_grad():
        before = model(tokens).logits
    ranks = {r"(layers|h)\.1\..*": 2}
    lora = LoraConfig(r=4, target_modules="all-linear", rank_pattern=ranks, task_type="CAUSAL_LM")
    tuned = get_peft_model(model, lora)
    optimizer = torch.optim.SGD(tuned.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        loss = tuned(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with torch.no_grad():
        trained = tuned.eval()(tokens).logits
        merged = tuned.merge_and_unload()(tokens).logits
    assert torch.allclose(trained, merged, atol=1e-4)
    assert not torch.allclose(before, merged, atol=1e-3)


@pytest.mark.parametrize("name", ["E2-llama", "E3-gemma3", "E3-mixtral"])
def test_a_result_runs_with_its_weights_on_disk(
    name: str, make: Callable, tokens: Tensor, tmp_path: Path
) -> None:
    folder, twin = make(name)
    model = load(folder, device_map={"": "disk"}, offload_folder=tmp_path)
    with torch.no_grad():
        apart = (model(tokens, use_cache=False).logits - twin(tokens).logits).abs().max()
    assert apart < 1e-4


@pytest.mark.parametrize("name", ["E2-llama", "E3-gemma3", "E3-mixtral", "E3-llama"])
def test_a_result_passes_the_gate_and_leaves_no_copy_of_its_code(
    name: str, make: Callable, quick_gate: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    verdict = pass_gate(
        make(name)[0], device=torch.device("cpu"), dtype=torch.float32, trust_remote_code=True
    )
    assert verdict.agreement.passed
    assert not (tmp_path / "cache").exists()


def test_entries_read_for_all_blocks_are_those_of_the_widest(make: Callable) -> None:
    for name, width in (("E2-llama", 768), ("E3-llama", 64)):
        assert load(make(name)[0]).config.intermediate_size == width


def test_blocks_follow_when_the_implementation_of_attention_changes(make: Callable) -> None:
    model = load(make("E3-qwen3")[0])
    attention = model.model.layers[1].self_attn
    assert attention.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    assert attention.config._attn_implementation == "eager"
    assert (attention.config.num_attention_heads, attention.config.num_key_value_heads) == (2, 1)
    assert copy.deepcopy(model).model.layers[1].self_attn.config.num_attention_heads == 2


def test_aliases_of_an_entry_are_one_entry() -> None:
    config = config_of("mixtral")
    for name, alias in (("num_local_experts", "num_experts"), ("num_experts", "num_local_experts")):
        own = modeling_llmprune.BlockConfig(config, {name: 2})
        assert (getattr(own, alias), getattr(own, name), own.hidden_size) == (2, 2, 32)


def test_tensors_are_renamed_and_stacked_as_those_of_the_family(
    tokens: Tensor, tmp_path: Path
) -> None:
    stock = random_model(config_of("mixtral"))
    stock.save_pretrained(tmp_path / "stock")
    config, files = heterogeneous_config(
        stock.config.to_diff_dict(), layout_of(*[({}, ())] * 4), "E3"
    )
    shutil.copytree(tmp_path / "stock", tmp_path / "ours")
    (tmp_path / "ours/config.json").write_text(json.dumps(config))
    shutil.copy(files[0], tmp_path / "ours")
    model = load(tmp_path / "ours")
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, stock(tokens).logits)
    model.save_pretrained(tmp_path / "again")
    names = [
        load_file(tmp_path / folder / "model.safetensors").keys() for folder in ("again", "stock")
    ]
    assert names[0] == names[1]
    assert any("experts.0.w1" in name for name in names[0])


def test_training_from_scratch_starts_at_the_spread_of_the_family(make: Callable) -> None:
    config = AutoConfig.from_pretrained(make("E3-qwen3")[0], trust_remote_code=True)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    spread = model.model.layers[3].mlp.up_proj.weight.std().item()
    assert spread == pytest.approx(config.initializer_range, rel=0.2)


def test_no_stock_class_claims_a_result() -> None:
    config = config_of("llama").to_diff_dict()
    skipping = AutoConfig.for_model("llama", **SIZES, per_layer_config={1: {"skip": ["mlp"]}})
    stock = AutoModelForCausalLM.from_config(skipping)
    assert hasattr(stock.model.layers[1], "mlp")  # the trap: accepted, and silently ignored
    for tier in ("E2", "E3"):
        delivered, _ = heterogeneous_config(config, PORTABLE, tier)
        assert delivered["model_type"] not in CONFIG_MAPPING
        assert set(delivered["auto_map"]) == {"AutoConfig", "AutoModelForCausalLM"}


def test_only_what_differs_is_said_block_by_block() -> None:
    config = config_of("qwen3").to_diff_dict()
    before = copy.deepcopy(config)
    delivered, files = heterogeneous_config(config, GROUPED, "E3")
    assert config == before
    assert delivered["per_layer_config"] == {
        "0": {F: 40, "skip": ["attention"]}, "1": {H: 2, G: 1}, "2": {"skip": ["mlp"]},
        "3": {F: 24},
    }  # fmt: skip
    assert (delivered[F], delivered[H], delivered[G]) == (64, 4, 2)
    assert delivered["model_type"] == "llmprune_qwen3"
    assert delivered["architectures"] == ["LlmpruneQwen3ForCausalLM"]
    assert [file.name for file in files] == ["modeling_llmprune.py"]


def test_padded_and_uniform_results_are_stock() -> None:
    config = config_of("qwen3").to_diff_dict()
    padded, files = heterogeneous_config(config, GROUPED, "E1")
    assert padded == config and files == ()
    narrow, files = heterogeneous_config(config, layout_of(*[({F: 40}, ())] * 4), "E0")
    assert narrow == config | {F: 40} and files == ()


def test_parameters_of_halves_that_are_gone_are_not_asked_for() -> None:
    config = config_of("llama", **{F: 768}).to_diff_dict()
    for tier, norm in (("E2", False), ("E3", True)):
        shapes = parameter_shapes(heterogeneous_config(config, PORTABLE, tier)[0])
        names = {name for name in shapes if name.startswith("model.layers.2.")}
        assert not any("self_attn" in name for name in names)
        assert ("model.layers.2.input_layernorm.weight" in names) is norm
        assert shapes["model.layers.1.mlp.down_proj.weight"] == (32, 256)
        assert shapes["model.layers.1.mlp.down_proj.bias"] == (32,)


def test_entries_of_block_configs_are_attributes_and_json() -> None:
    config, files = heterogeneous_config(config_of("qwen2").to_diff_dict(), PORTABLE, "E2")
    stale = {"per_layer_config": {"9": {F: 1}}}
    read = modeling_decilm.DeciLMConfig.from_dict(config | stale)
    first, third = read.block_configs[0], read.block_configs[2]
    assert first.attention.n_heads_in_group == 2 and not first.attention.no_op
    assert third.attention.no_op and third.attention.n_heads_in_group is None
    assert not hasattr(first.ffn, "hidden_act") and hasattr(first.ffn, "ffn_mult")
    assert json.loads(read.to_json_string())["block_configs"] == config["block_configs"]
    assert (read.attention_bias, read.qkv_bias) == (False, True)  # qwen2: none at the output
    assert [view.intermediate_size for view in read.per_layer_config] == [512, 256, 512, 768]
    assert config["architectures"] == ["DeciLMForCausalLM"]
    assert [file.name for file in files] == ["modeling_decilm.py"]


def test_block_configs_of_another_depth_are_refused() -> None:
    config, _ = heterogeneous_config(config_of("llama").to_diff_dict(), PORTABLE, "E2")
    with pytest.raises(ValueError, match="describes 4 blocks, num_hidden_layers says 3"):
        modeling_decilm.DeciLMConfig.from_dict(config | {"num_hidden_layers": 3})


def width_in_runtimes(ffn_mult: float, hidden: int) -> int:
    """Return the FFN width that runtimes of DeciLM read: rounded down, then up to 256."""
    width = int(2 * ffn_mult * hidden / 3)
    return width if width % 256 == 0 else width + 256 - width % 256


@pytest.mark.parametrize("hidden", [2048, 2560, 3072, 4096, 5120, 6144, 8192])
def test_ffn_mult_gives_back_every_multiple_of_256(hidden: int) -> None:
    config = config_of("llama", hidden_size=hidden, num_attention_heads=hidden // 64, head_dim=64)
    widths = range(256, 32_769, 256)
    layout = layout_of(*[({F: width}, ()) for width in widths])
    delivered, _ = heterogeneous_config(config.to_diff_dict(), layout, "E2")
    found = [block["ffn"]["ffn_mult"] for block in delivered["block_configs"]]
    assert [width_in_runtimes(mult, hidden) for mult in found] == list(widths)
    if hidden == 4096:
        assert found[42] == 4.03125  # by hand, for 11008: 3 * 11008 / (2 * 4096)


@pytest.mark.parametrize(
    "model_type, tier, blocks, reason",
    [
        ("llama", "E0", [({F: 40}, ()), ({F: 48}, ())], "blocks differ in intermediate_size"),
        ("llama", "E0", [({}, ()), ({}, ("ffn",))], "FFN of block 1 is gone"),
        ("llama", "E0", [({H: 3, G: 1}, ())] * 2, "not a multiple of the number of attention"),
        ("llama", "E3", [({H: 3, G: 2}, ()), ({H: 4, G: 2}, ())], "do not divide its 3 heads"),
        ("gpt2", "E0", [({"n_head": 2}, ())] * 2, "stay as wide whatever n_head says"),
        ("gpt2", "E3", [({"n_head": 2}, ()), ({"n_head": 4}, ())], "stay as wide whatever n_head"),
        ("llama", "E2", [({F: 256}, ("attention",)), ({F: 256}, ())], "attention of block 0"),
        ("llama", "E2", [({F: 256}, ()), ({F: 256}, ("ffn",))], "FFN of block 1 is gone"),
        ("llama", "E2", [({F: 256}, ()), ({F: 320}, ())], "width 320 is no multiple of 256"),
        ("llama", "E2", [({F: 256, G: 1}, ()), ({F: 256, G: 2}, ())], "differ in their attention"),
        ("llama", "E2", [({F: 256, H: 2, G: 1}, ())] * 2, "2 heads of 8 values are not as wide"),
        ("qwen3", "E2", [({F: 256}, ()), ({F: 512}, ())], "family qwen3 computes other things"),
        ("gemma3_text", "E2", [({F: 256}, ())] * 2, "family gemma3_text computes other things"),
        ("llava", "E3", [({}, ())] * 2, "llava is no causal language model"),
    ],
)  # fmt: skip
def test_a_tier_says_what_does_not_fit(
    model_type: str, tier: Any, blocks: list[Any], reason: str
) -> None:
    if model_type == "llava":
        config: dict[str, Any] = {"model_type": "llava"}
    else:
        config = config_of(model_type).to_diff_dict()
    assert reason in str(why_not(config, layout_of(*blocks), tier))


def test_families_with_code_of_their_own_are_delivered_uniform() -> None:
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    narrow, unequal = layout_of(*[({F: 40}, ())] * 2), layout_of(({F: 40}, ()), ({F: 48}, ()))
    assert lowest_tier(config, narrow) == ("E0", [])
    assert why_not(config, unequal, "E0") == "blocks differ in intermediate_size"
    with pytest.raises(WontLoad, match="E3: own is no causal language model of transformers"):
        lowest_tier(config, unequal)


def test_blocks_that_differ_already_are_not_cut_again() -> None:
    stock = config_of("llama", **{F: 768}).to_diff_dict()
    for tier in ("E2", "E3"):
        result, _ = heterogeneous_config(stock, PORTABLE, tier)
        assert "differ before anything is pruned" in str(why_not(result, PORTABLE, "E3"))
        assert why_not(result, layout_of(*[({}, ())] * 4), "E0") is None  # nothing is cut


@pytest.mark.parametrize(
    "model_type, changes, reason",
    [
        ("llama", {"hidden_act": "gelu"}, "its FFN has gelu, not SiLU"),
        ("mistral", {"sliding_window": 16}, "attention sees only 16 tokens"),
        ("mistral", {"sliding_window": 64}, None),  # as many as there are positions
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
         "attention sees only 16 tokens"),
        ("llama", {}, None),
    ],
)  # fmt: skip
def test_what_is_no_llama_is_no_decilm(
    model_type: str, changes: dict[str, Any], reason: str | None
) -> None:
    assert why_not(config_of(model_type, **changes).to_diff_dict(), PORTABLE, "E2") == reason


def test_the_lowest_tier_says_why_none_below_it_fits() -> None:
    config = config_of("llama").to_diff_dict()
    assert lowest_tier(config, layout_of(*[({F: 40}, ())] * 4)) == ("E0", [])
    assert lowest_tier(config, PORTABLE)[0] == "E2"
    tier, unfit = lowest_tier(config, GROUPED)
    assert tier == "E3"
    assert unfit == [
        ("E0", "attention of block 0 is gone"),
        ("E2", "attention of block 0 is gone, which vLLM's class cannot run"),
    ]
    heads = layout_of(({"n_head": 2}, ()), ({"n_head": 4}, ()), ({}, ()), ({}, ()))
    with pytest.raises(WontLoad, match=r"gpt2.*E3: the blocks.*prune\.form=masked"):
        lowest_tier(config_of("gpt2").to_diff_dict(), heads)


@pytest.mark.parametrize("model_type", ["falcon", "bloom", "opt", "gpt_neox", "phi3", "gpt_oss"])
def test_other_families_can_do_without_halves(model_type: str) -> None:
    config = CONFIG_MAPPING[model_type]().to_diff_dict()
    assert trial.why_halves_stay(config, ["attention", "mlp"]) is None


def test_a_half_that_is_no_nothing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("llama").to_diff_dict() | {"rms_norm_eps": 1e-5}  # tried by no other test
    monkeypatch.setattr(modeling_llmprune.Nothing, "_count", lambda *_: None)
    assert "with a cache logits are" in str(trial.why_halves_stay(config, ["attention"]))
    monkeypatch.setattr(modeling_llmprune.Nothing, "forward", lambda self, hidden: hidden)
    assert "cannot run without their mlp (logits are" in str(trial.why_halves_stay(config, ["mlp"]))
    mamba = CONFIG_MAPPING["mamba"]().to_diff_dict()
    assert "no module of such a name" in str(trial.why_halves_stay(mamba, ["mlp"]))


def test_code_that_travels_stands_alone() -> None:
    files = sorted(Path(remote.__file__).parent.glob("modeling_*.py"))
    assert [file.stem for file in files] == ["modeling_decilm", "modeling_llmprune"]
    allowed = {"__future__", "collections", "inspect", "typing", "torch", "transformers"}
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert "Licensed under the Apache License, Version 2.0" in text
        assert len(text.splitlines()) < 250
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0 and str(node.module).partition(".")[0] in allowed
            elif isinstance(node, ast.Import):
                assert {alias.name.partition(".")[0] for alias in node.names} <= allowed
