"""Experts and their channels cut out: the result loads stock, and computes what it should."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM

from llmprune.arch.anatomy import Anatomy, anatomy_of, is_router
from llmprune.arch.couplings import EXPERT_CHANNELS, EXPERTS
from llmprune.arch.experts import (
    MULTIPLE,
    expert_couplings,
    fewest_experts,
    mixture_of,
)
from llmprune.arch.miniature import miniature_config
from llmprune.arch.table import expert_taps, row_of, stacked
from llmprune.arch.types import Coupling, Family, Mixture
from llmprune.checkpoint.shrink_experts import cut_expert_channels, cut_experts

MakeModel = Callable[..., Any]
MIXTURES = (
    "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "gpt_oss", "jamba",
)  # fmt: skip
COUNT_KEYS = {
    "qwen2_moe": "num_experts",
    "olmoe": "num_experts",
    "jamba": "num_experts",
    "deepseek_v2": "n_routed_experts",
    "deepseek_v3": "n_routed_experts",
}
SEPARATE = ("qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3")


class Wide(TorchFunctionMode):
    """Computes in float64 also where a model asks for float32, as routers and norms do."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()
        wide = [torch.float64 if one is torch.float32 else one for one in args]
        named = {
            key: torch.float64 if one is torch.float32 else one
            for key, one in (kwargs or {}).items()
        }
        return func(*wide, **named)


class Banned(Wide):
    """Gives banned experts the router logit -inf."""

    def __init__(self, banned: Mapping[int, list[int]]) -> None:
        super().__init__()
        self.banned = banned

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs)
        if func is torch.nn.functional.linear and args[1].data_ptr() in self.banned:
            result[..., self.banned[args[1].data_ptr()]] = -torch.inf
        return result


def blocks_of(model: Any) -> Any:
    return model.get_submodule(row_of(model.config.model_type).blocks)


def look(model: Any, block: Any) -> tuple[Anatomy, tuple[Coupling, ...], dict[str, str]]:
    """Return a block's anatomy and what is found of its experts."""
    shapes = {name: tuple(value.shape) for name, value in block.named_parameters()}
    anatomy = anatomy_of(row_of(model.config.model_type), shapes)
    routers = [name for name in shapes if is_router(name, shapes)]
    couplings, lacks = expert_couplings(mixture_of(model.config), anatomy.linears, shapes, routers)
    return anatomy, couplings, lacks


def params_of(block: Any) -> dict[str, Tensor]:
    """Return a block's parameters and buffers."""
    found = dict(block.named_parameters()) | dict(block.named_buffers())
    return {name: value.detach() for name, value in found.items()}


def wide_model(make_model: MakeModel, model_type: str, **keys: int) -> Any:
    """Return a random model in float64 whose correction biases are not zero."""
    if keys:
        config = AutoConfig.for_model(model_type)
        config = miniature_config(config)
        for key, value in keys.items():
            setattr(config, key, value)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
        with torch.no_grad():
            for value in model.parameters():
                value.mul_(5 if value.dim() > 1 else 1)
    else:
        model = make_model(model_type).double()
    for name, value in model.named_buffers():
        if "correction_bias" in name:
            value.copy_(0.05 * torch.randn(value.shape))
    model.set_experts_implementation("eager")
    return model


def rebuilt(model: Any, cut: Callable[[Any], Mapping[str, Tensor]], **keys: int) -> Any:
    """Return a stock model of the changed config that holds the cut blocks."""
    config = copy.deepcopy(model.config)
    for key, value in keys.items():
        setattr(config, key, value)
    state = {k: v for k, v in model.state_dict().items()}
    prefix = row_of(config.model_type).blocks
    for index, block in enumerate(blocks_of(model)):
        state |= {f"{prefix}.{index}.{name}": value for name, value in cut(block).items()}
    small = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    buffers = {name for name, _ in small.named_buffers()}
    missing, unexpected = small.load_state_dict(state, strict=False)
    assert set(missing) <= buffers - state.keys(), missing
    assert set(unexpected) <= {name for name, _ in model.named_buffers()}, unexpected
    small.tie_weights()
    return small


def reloaded(model: Any, folder: Path) -> Any:
    """Return a model as it comes back from disk, the stock way."""
    model.save_pretrained(folder)
    found, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, output_loading_info=True, experts_implementation="eager"
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return found.eval()


@torch.no_grad()
def logits_of(model: Any, tokens_NT: Tensor, mode: TorchFunctionMode | None = None) -> Tensor:
    with mode or Wide():
        found: Tensor = model(input_ids=tokens_NT, use_cache=False).logits
    assert found.dtype == torch.float64
    return found


@contextmanager
def without_choice(model: Any, experts: list[int]) -> Iterator[Banned]:
    """Ban experts from every router: by logit, and by what corrects its choice."""
    banned = {}
    for block in blocks_of(model):
        for name, value in params_of(block).items():
            if "correction_bias" in name:
                value[experts] = -torch.inf
            elif name.endswith(("gate.weight", "router.weight")) and len(value) == 4:
                banned[value.data_ptr()] = experts
    assert banned
    yield Banned(banned)


@pytest.mark.parametrize("model_type", MIXTURES)
def test_without_an_expert_a_model_computes_as_if_it_could_not_be_chosen(
    make_model: MakeModel, tokens: Tensor, tmp_path: Path, model_type: str
) -> None:
    model = wide_model(make_model, model_type)
    kept_K = torch.tensor([0, 1, 3])

    def cut(block: Any) -> Mapping[str, Tensor]:
        anatomy, couplings, lacks = look(model, block)
        assert not lacks
        if not couplings:
            return {}
        assert couplings[0].name == EXPERTS
        return cut_experts(params_of(block), couplings[0], kept_K, anatomy.linears)

    key = mixture_of(model.config).count_key
    assert key == COUNT_KEYS.get(model_type, "num_local_experts")
    assert key in model.config.to_dict()
    found = logits_of(reloaded(rebuilt(model, cut, **{key: 3}), tmp_path), tokens)
    whole = logits_of(model, tokens)
    with without_choice(model, [2]) as banned:
        expected = logits_of(model, tokens, banned)
    assert float((found - expected).abs().max()) < 1e-9
    assert float((whole - expected).abs().max()) > 1e-3


@pytest.mark.parametrize("model_type", MIXTURES)
def test_narrower_experts_compute_as_with_channels_that_are_zero(
    make_model: MakeModel, tokens: Tensor, tmp_path: Path, model_type: str
) -> None:
    model = wide_model(make_model, model_type)
    generator = torch.Generator().manual_seed(5)
    masked = copy.deepcopy(model)
    width = 24 if model_type in SEPARATE else 64
    key = "moe_intermediate_size" if model_type in SEPARATE else "intermediate_size"
    lost = 8

    def cut(block: Any, twin: Any) -> Mapping[str, Tensor]:
        anatomy, couplings, _ = look(model, block)
        channels = [one for one in couplings if one.kind == EXPERT_CHANNELS]
        if not channels and key == "intermediate_size":  # a dense FFN, which the entry counts too
            return dense(block, twin)
        if not channels:
            return {}
        assert len(channels) == (5 if "deepseek" in model_type else 4)
        kept = []
        for coupling in channels:
            assert (coupling.num_units, coupling.config_keys) == (width, ((key, 1),))
            order_U = torch.randperm(width, generator=generator)
            kept.append(order_U[lost:])
            linear = anatomy.linears[coupling.spans[-1].linear]
            weight_DF = linear.view(twin.get_parameter(linear.param).data)
            weight_DF[:, order_U[:lost]] = 0
        return cut_expert_channels(params_of(block), channels, kept, anatomy.linears)

    def dense(block: Any, twin: Any) -> Mapping[str, Tensor]:
        half = twin.feed_forward
        half.down_proj.weight.data[:, :lost] = 0
        return {
            "feed_forward.gate_proj.weight": block.feed_forward.gate_proj.weight[lost:],
            "feed_forward.up_proj.weight": block.feed_forward.up_proj.weight[lost:],
            "feed_forward.down_proj.weight": block.feed_forward.down_proj.weight[:, lost:],
        }

    twins = dict(zip(blocks_of(model), blocks_of(masked), strict=True))
    small = rebuilt(model, lambda block: cut(block, twins[block]), **{key: width - lost})
    found = logits_of(reloaded(small, tmp_path), tokens)
    expected = logits_of(masked, tokens)
    assert float((found - expected).abs().max()) < 1e-9
    assert float((logits_of(model, tokens) - expected).abs().max()) > 1e-3


def test_a_grouped_router_loses_equally_many_of_each_group(
    make_model: MakeModel, tokens: Tensor, tmp_path: Path
) -> None:
    sizes = {"n_routed_experts": 8, "n_group": 2, "topk_group": 1}
    model = wide_model(make_model, "deepseek_v3", **sizes)
    mixture = mixture_of(model.config)
    assert (mixture.num_groups, mixture.top_groups, mixture.least) == (2, 1, 2)
    kept_K = torch.tensor([0, 2, 3, 5, 6, 7])
    block = blocks_of(model)[1]
    anatomy, couplings, _ = look(model, block)
    assert couplings[0].num_groups == 2
    with pytest.raises(ValueError, match=r"would keep \[4, 2\] experts"):
        cut_experts(params_of(block), couplings[0], torch.arange(6), anatomy.linears)

    def cut(one: Any) -> Mapping[str, Tensor]:
        whole = one is block
        return cut_experts(params_of(one), couplings[0], kept_K, anatomy.linears) if whole else {}

    small = reloaded(rebuilt(model, cut, n_routed_experts=6), tmp_path)
    block.mlp.gate.e_score_correction_bias[[1, 4]] = -torch.inf
    expected = logits_of(model, tokens, Banned({block.mlp.gate.weight.data_ptr(): [1, 4]}))
    assert float((logits_of(small, tokens) - expected).abs().max()) < 1e-9


def test_a_unit_of_two_shared_experts_is_two_channels(
    make_model: MakeModel, tokens: Tensor, tmp_path: Path
) -> None:
    model = wide_model(make_model, "deepseek_v3", n_shared_experts=2)
    block = blocks_of(model)[1]
    anatomy, couplings, _ = look(model, block)
    channels = [one for one in couplings if one.kind == EXPERT_CHANNELS]
    assert [(one.num_units, one.spans[-1].width) for one in channels] == [(24, 1)] * 4 + [(24, 2)]
    kept_K = torch.arange(1, 24)

    def cut(one: Any) -> Mapping[str, Tensor]:
        if one is not block:
            return {}
        return cut_expert_channels(params_of(one), channels, [kept_K] * 5, anatomy.linears)

    small = reloaded(rebuilt(model, cut, moe_intermediate_size=23), tmp_path)
    assert small.model.layers[1].mlp.shared_experts.down_proj.weight.shape == (32, 46)
    block.mlp.experts.down_proj.data[:, :, 0] = 0
    block.mlp.shared_experts.down_proj.weight.data[:, :2] = 0
    difference = logits_of(small, tokens) - logits_of(model, tokens)
    assert float(difference.abs().max()) < 1e-9


@pytest.mark.parametrize("model_type", MIXTURES)
def test_what_goes_with_experts_is_their_stacks_and_their_router(
    make_model: MakeModel, model_type: str
) -> None:
    model = make_model(model_type)
    block = blocks_of(model)[1]
    anatomy, couplings, _ = look(model, block)
    params = params_of(block)
    cut = cut_experts(params, couplings[0], torch.tensor([3, 1]), anatomy.linears)
    assert cut.keys() == params.keys()
    changed = {name for name, value in cut.items() if value is not params[name]}
    owner = "feed_forward" if model_type == "jamba" else "mlp"
    router = "router" if model_type in ("jamba", "gpt_oss") else "gate"
    expected = {"experts.gate_up_proj", "experts.down_proj", f"{router}.weight"}
    if model_type == "gpt_oss":
        expected |= {"experts.gate_up_proj_bias", "experts.down_proj_bias", "router.bias"}
    if model_type == "deepseek_v3":
        expected |= {"gate.e_score_correction_bias"}
    assert changed == {f"{owner}.{name}" for name in expected}
    for name in changed:
        assert torch.equal(cut[name], params[name][[1, 3]])
    assert {span.unit for span in couplings[0].spans} == {0, 1, 2, 3}
    assert len(couplings[0].spans) == 12 and {span.axis for span in couplings[0].spans} == {"all"}


def test_module_sizes_are_those_that_count_experts_and_channels(make_model: MakeModel) -> None:
    for model_type in MIXTURES:
        block = blocks_of(model := make_model(model_type))[1]
        _, couplings, _ = look(model, block)
        counts = {
            path: getattr(block.get_submodule(path), key)
            for path, key, _ in couplings[0].module_sizes
            if hasattr(block.get_submodule(path), key)
        }
        routers = {path for path in counts if path.endswith(("gate", "router"))}
        assert routers and set(counts.values()) == {4}, model_type
        sizes = {
            getattr(block.get_submodule(path), key)
            for path, key, _ in couplings[1].module_sizes
            if hasattr(block.get_submodule(path), key)
        }
        assert sizes == {couplings[1].num_units}, model_type


@pytest.mark.parametrize("model_type", ["jamba", "deepseek_v3"])
def test_a_dense_block_has_no_experts(make_model: MakeModel, model_type: str) -> None:
    model = make_model(model_type)
    _, couplings, lacks = look(model, blocks_of(model)[0])
    assert couplings == () and lacks == {}


def test_experts_that_the_config_does_not_count_are_kept(make_model: MakeModel) -> None:
    model = make_model("mixtral")
    model.config.num_local_experts = 5
    _, couplings, lacks = look(model, blocks_of(model)[0])
    assert couplings == ()
    assert lacks[EXPERTS] == "it has 4 experts where its config counts 5 of them"


def test_a_tensor_that_may_belong_to_experts_is_not_left_behind(make_model: MakeModel) -> None:
    model = make_model("mixtral")
    block = blocks_of(model)[0]
    anatomy, couplings, _ = look(model, block)
    params = params_of(block)
    tables = {"mlp.table": torch.zeros(7, 4), "mlp.expert_bias": torch.arange(4.0)}
    with pytest.raises(ValueError, match=r"mlp.table \[7, 4\] may have an entry for each"):
        cut_experts(params | tables, couplings[0], torch.arange(3), anatomy.linears)
    del tables["mlp.table"]
    cut = cut_experts(params | tables, couplings[0], torch.tensor([1, 2]), anatomy.linears)
    assert cut["mlp.expert_bias"].tolist() == [1, 2]
    with pytest.raises(ValueError, match="may have an entry for each of 64 channels"):
        channels = [one for one in couplings if one.kind == EXPERT_CHANNELS]
        odd = params | {"mlp.experts.inner_scale": torch.ones(4, 64)}
        cut_expert_channels(odd, channels, [torch.arange(3)] * 4, anatomy.linears)


def test_experts_of_one_stack_stay_equally_wide(make_model: MakeModel) -> None:
    model = make_model("mixtral")
    block = blocks_of(model)[0]
    anatomy, couplings, _ = look(model, block)
    channels = [one for one in couplings if one.kind == EXPERT_CHANNELS]
    kept = [torch.arange(3), torch.arange(4), torch.arange(3), torch.arange(3)]
    with pytest.raises(ValueError, match=r"\[3, 4\] channels would be left"):
        cut_expert_channels(params_of(block), channels, kept, anatomy.linears)
    with pytest.raises(ValueError, match="stacks 4 experts, of which 1 would be cut"):
        cut_expert_channels(params_of(block), channels[:1], kept[:1], anatomy.linears)


def test_experts_in_a_list_are_numbered_anew() -> None:
    shapes = {"moe.gate.weight": (3, 6), "moe.norm.weight": (6,)}
    for expert in range(3):
        for name, shape in (("gate_proj", (5, 6)), ("up_proj", (5, 6)), ("down_proj", (6, 5))):
            shapes[f"moe.experts.{expert}.{name}.weight"] = shape
        shapes[f"moe.experts.{expert}.up_proj.bias"] = (5,)
    params = {name: torch.randn(shape) for name, shape in shapes.items()}
    family = Family(model_types=("listed",), blocks="blocks", taps=expert_taps("moe.experts"))
    anatomy = anatomy_of(family, shapes)
    mixture = Mixture(
        num_experts=3, count_key="num_experts", active=1, widths=(("moe_intermediate_size", 5),)
    )
    couplings, lacks = expert_couplings(mixture, anatomy.linears, shapes, ["moe.gate.weight"])
    assert not lacks and [row.kind for row in couplings] == [EXPERTS, *[EXPERT_CHANNELS] * 3]
    cut = cut_experts(params, couplings[0], torch.tensor([0, 2]), anatomy.linears)
    assert len(cut) == len(params) - 4
    assert torch.equal(cut["moe.gate.weight"], params["moe.gate.weight"][[0, 2]])
    assert cut["moe.norm.weight"] is params["moe.norm.weight"]
    for name in ("gate_proj.weight", "up_proj.weight", "up_proj.bias", "down_proj.weight"):
        assert cut[f"moe.experts.1.{name}"] is params[f"moe.experts.2.{name}"]
    kept = [torch.tensor(one) for one in ([0, 1], [2, 4], [3, 1])]
    narrow = cut_expert_channels(params, couplings[1:], kept, anatomy.linears)
    assert torch.equal(
        narrow["moe.experts.2.down_proj.weight"],
        params["moe.experts.2.down_proj.weight"][:, [1, 3]],
    )
    assert torch.equal(
        narrow["moe.experts.1.up_proj.bias"], params["moe.experts.1.up_proj.bias"][[2, 4]]
    )


def mixture(**keys: int) -> Mixture:
    return Mixture(num_experts=16, count_key="n_routed_experts", widths=(), **keys)


def test_the_fewest_experts_fill_every_group_and_every_choice() -> None:
    assert fewest_experts(mixture(active=6)) == 6
    assert fewest_experts(mixture(active=6, num_groups=4, top_groups=2, least=2)) == 12
    assert fewest_experts(mixture(active=2, num_groups=4, top_groups=2, least=2)) == 8
    assert fewest_experts(mixture(active=1, least=2)) == 2


def test_what_configs_say_of_their_mixtures() -> None:
    config = AutoConfig.for_model
    assert mixture_of(config("llama")) is None
    v3 = mixture_of(config("deepseek_v3"))
    assert (v3.num_experts, v3.active, v3.num_shared) == (256, 8, 1)
    assert (v3.num_groups, v3.top_groups, fewest_experts(v3)) == (8, 4, 16)
    assert v3.widths[0] == ("moe_intermediate_size", 2048)
    greedy = mixture_of(config("deepseek_v2", n_group=8, topk_group=3, topk_method="greedy"))
    assert greedy.num_groups == 1
    limited = mixture_of(
        config("deepseek_v2", n_group=8, topk_group=3, topk_method="group_limited_greedy")
    )
    assert (limited.num_groups, limited.least) == (8, 1)
    assert not v3.apart and mixture_of(config("qwen2_moe")).apart


def test_what_a_router_holds_beside_its_rows_goes_as_well() -> None:
    shapes: dict[str, tuple[int, ...]] = {
        "router.proj.weight": (3, 6),
        "router.per_expert_scale": (3,),
        "router.scale": (6,),
        "attention.norm.weight": (3,),
        "experts.gate_up_proj": (3, 10, 6),
        "experts.down_proj": (3, 6, 5),
    }
    family = Family(
        model_types=("flat",),
        blocks="blocks",
        taps=expert_taps("experts"),
        unfuse=stacked("experts"),
    )
    anatomy = anatomy_of(family, shapes)
    counted = Mixture(num_experts=3, count_key="num_experts", active=1, widths=())
    routers = [name for name in shapes if is_router(name, shapes)]
    (coupling,), _ = expert_couplings(counted, anatomy.linears, shapes, routers)
    assert dict(coupling.vectors) == {"router.proj.weight": 1, "router.per_expert_scale": 1}
    params = {name: torch.zeros(shape) for name, shape in shapes.items()}
    cut = cut_experts(params, coupling, torch.tensor([0, 2]), anatomy.linears)
    changed = {name for name, value in cut.items() if value is not params[name]}
    assert changed == {name for name, shape in shapes.items() if shape[0] == 3} - {
        "attention.norm.weight"
    }


def test_experts_of_two_mixtures_are_kept() -> None:
    shapes: dict[str, tuple[int, ...]] = {"moe.router.weight": (3, 6)}
    for path in ("moe", "attention"):
        shapes |= {
            f"{path}.experts.gate_up_proj": (3, 10, 6),
            f"{path}.experts.down_proj": (3, 6, 5),
        }
    rows = [stacked(f"{path}.experts") for path in ("moe", "attention")]
    family = Family(
        model_types=("twice",),
        blocks="blocks",
        taps=(*expert_taps("moe.experts"), *expert_taps("attention.experts")),
        unfuse=(*rows[0], *rows[1]),
    )
    anatomy = anatomy_of(family, shapes)
    counted = Mixture(num_experts=3, count_key="num_experts", active=1, widths=())
    couplings, lacks = expert_couplings(counted, anatomy.linears, shapes, ["moe.router.weight"])
    assert couplings == ()
    assert lacks[EXPERTS].endswith("more than one mixture: attention, moe")


def test_shared_experts_whose_width_nothing_counts_keep_channels_in_place(
    make_model: MakeModel,
) -> None:
    model = make_model("deepseek_v3")
    model.config.n_shared_experts = 2
    _, couplings, lacks = look(model, blocks_of(model)[1])
    assert [one.name for one in couplings] == [EXPERTS]
    assert "24 channels, which is not 2 times the 24" in lacks[EXPERT_CHANNELS]


def test_widths_are_those_that_grouped_products_can_take(tokens: Tensor) -> None:
    for width in (16, 24):
        assert width % MULTIPLE == 0
        config = miniature_config(AutoConfig.for_model("qwen3_moe"))
        config.moe_intermediate_size = width
        for dtype in (torch.float32, torch.bfloat16):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
            assert model.config._experts_implementation == "grouped_mm"
            assert model(input_ids=tokens, use_cache=False).logits.isfinite().all()
