"""Mixtures lose experts, or channels of them: the result is stock, and computes as told."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM

import llmprune
from llmprune.arch.anatomy import anatomy_of
from llmprune.arch.experts import mixture_of
from llmprune.arch.miniature import miniature_config
from llmprune.arch.table import expert_taps
from llmprune.arch.types import Family, Mixture
from llmprune.base.errors import RecipeError, WontLoad
from llmprune.delivery import gate
from llmprune.walk.block import Block
from llmprune.walk.rewriting import Rewriting

Make = Callable[..., Path]
KINDS = ("mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss")
SPARSITY = {"deepseek_v3": 0.3}  # its first block is dense, so half would be nearly all experts
WIDTHS = {"mixtral": 24, "qwen3_moe": 8, "olmoe": 24, "deepseek_v3": 8, "gpt_oss": 24}
COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")


def build(kind: str, **keys: int) -> Any:
    """Return a random mixture of eight experts whose correction biases are not zero."""
    config = miniature_config(AutoConfig.for_model(kind))
    for key in [key for key in COUNTS if key in config.to_dict()]:
        setattr(config, key, 8)
    for key, value in keys.items():
        setattr(config, key, value)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for name, value in (*model.named_parameters(), *model.named_buffers()):
                if "correction_bias" in name or name.endswith("_bias"):
                    value.copy_(0.05 * torch.randn(value.shape))
                elif value.dim() > 1:
                    value.mul_(5)
    return model


@pytest.fixture(scope="session")
def mixture(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Make:
    """Return the folder of a mixture; never write into it."""
    home = tmp_path_factory.mktemp("mixtures")

    def folder_of(kind: str) -> Path:
        if not (home / kind).exists():
            build(kind).save_pretrained(home / kind)
            tokenizer.save_pretrained(home / kind)
        return home / kind

    return folder_of


@pytest.fixture
def cut(tmp_path: Path, text_file: Path, quick_gate: None) -> Callable[..., tuple[Path, Any]]:
    """Return what prunes a model into a new folder, and gives that and the report."""

    def run(model: Path | Any, name: str = "out", **wishes: Any) -> tuple[Path, Any]:
        asked = {"num_samples": 6, "seq_len": 24, "calib": str(text_file), "device": "cpu"}
        asked |= {"out": tmp_path / name} | wishes
        return tmp_path / name, llmprune.prune(str(model), quiet=True, **asked)

    return run


def kept_of(folder: Path) -> dict[str, list[int]]:
    """Return the units kept by site."""
    found: dict[str, list[int]] = {}
    for path in sorted((folder / "llmprune").glob("masks-*.safetensors")):
        with safe_open(str(path), "pt") as handle:
            for key in handle.keys():  # noqa: SIM118
                found[key] = handle.get_tensor(key).tolist()
    return found


class Banned(TorchFunctionMode):
    """Gives experts the router logit -inf, by the address of the router's weight."""

    def __init__(self, banned: Mapping[int, list[int]]) -> None:
        super().__init__()
        self.banned = banned

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.nn.functional.linear and args[1].data_ptr() in self.banned:
            result[..., self.banned[args[1].data_ptr()]] = -torch.inf
        return result


def without_choice(model: Any, kept: Mapping[str, list[int]]) -> Banned:
    """Ban the experts that were not kept: by logit, and by what corrects the router's choice."""
    banned: dict[int, list[int]] = {}
    for site, experts in kept.items():
        block = model.get_submodule(site.removesuffix(".experts"))
        gone = sorted(set(range(8)) - set(experts))
        for name, value in (*block.named_parameters(), *block.named_buffers()):
            if "correction_bias" in name:
                value[gone] = -torch.inf
            elif name.endswith(("gate.weight", "router.weight")) and len(value) == 8:
                banned[value.data_ptr()] = gone
    assert len(banned) == len(kept)
    return Banned(banned)


@torch.no_grad()
def logits_of(model: Any, tokens_NT: Tensor) -> Tensor:
    found: Tensor = model(input_ids=tokens_NT, use_cache=False).logits
    return found


def near(one: Tensor, other: Tensor) -> bool:
    return float((one - other).abs().max()) <= 1e-5 * float(other.abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixture_computes_as_if_experts_that_went_could_not_be_chosen(
    kind: str, mixture: Make, cut: Any, stock: Any, tokens: Tensor
) -> None:
    source = mixture(kind)
    out, report = cut(source, method="reap", sparsity=SPARSITY.get(kind, 0.5))
    key = mixture_of(stock(source).config).count_key  # type: ignore[union-attr]
    config = json.loads((out / "config.json").read_text())
    assert config[key] == 3
    gate = report.data["gate"]
    assert gate["agreement"]["passed"] and gate["generation"] == "the same with a cache as without"
    kept = kept_of(out)
    assert kept and all(len(set(experts)) == 3 for experts in kept.values())
    dense, small = stock(source), stock(out)
    assert small.config._experts_implementation != "eager"
    whole = logits_of(dense, tokens)
    dense.set_experts_implementation("eager")
    with without_choice(dense, kept):
        expected = logits_of(dense, tokens)
    assert near(logits_of(small, tokens), expected)
    assert not near(whole, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_narrower_experts_compute_as_with_channels_that_are_zero(
    kind: str, mixture: Make, cut: Any, stock: Any, tokens: Tensor
) -> None:
    source = mixture(kind)
    wish = {"method": "wanda", "pattern": "expert-channels", "sparsity": SPARSITY.get(kind, 0.5)}
    out, report = cut(source, **wish)
    config = json.loads((out / "config.json").read_text())
    separate = kind in ("qwen3_moe", "deepseek_v3")
    assert config["moe_intermediate_size" if separate else "intermediate_size"] == WIDTHS[kind]
    assert report.data["gate"]["agreement"]["passed"] and report.data["gate"]["masked"]["passed"]
    dense, kept = stock(source), kept_of(out)
    for site, channels in kept.items():
        assert len(set(channels)) == WIDTHS[kind]
        block, _, expert = site.partition(".expert-channels.")
        half = dense.get_submodule(f"{block}.mlp")
        if expert == "shared":
            weight_DF = half.shared_experts.down_proj.weight.data
        else:
            weight_DF = half.experts.down_proj.data[int(expert)]
            weight_DF = weight_DF.T if kind == "gpt_oss" else weight_DF
        gone_F = torch.ones(weight_DF.shape[1], dtype=torch.bool)
        gone_F[channels] = False
        weight_DF[:, gone_F] = 0
    assert near(logits_of(stock(out), tokens), logits_of(dense, tokens))
    masked, _ = cut(source, "masked", settings=["prune.form=masked"], **wish)
    assert near(logits_of(stock(masked), tokens), logits_of(dense, tokens))


@pytest.mark.parametrize("kind", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_a_mixture_in_memory_becomes_what_is_written(
    kind: str, mixture: Make, cut: Any, stock: Any, tokens: Tensor
) -> None:
    source = mixture(kind)
    for method, pattern in (("reap", "experts"), ("wanda", "expert-channels")):
        wish = {"method": method, "pattern": pattern, "sparsity": SPARSITY.get(kind, 0.5)}
        out, _ = cut(source, pattern, calib=tokens, **wish)
        model = stock(source)
        llmprune.prune(model, calib=tokens, quiet=True, **wish)
        small = stock(out)
        assert {k: v.shape for k, v in model.state_dict().items()} == {
            k: v.shape for k, v in small.state_dict().items()
        }
        assert model.config._experts_implementation == small.config._experts_implementation
        assert near(logits_of(model, tokens), logits_of(small, tokens))
        model.generate(tokens[:1, :4], max_new_tokens=3, do_sample=False)
        attributes = [dict(counts_in(each)) for each in (model, small)]
        assert attributes[0] == attributes[1] and attributes[0]


def counts_in(model: Any) -> list[tuple[str, int]]:
    """Return the sizes that a model's modules hold of its mixtures."""
    names = ("num_experts", "num_local_experts", "n_routed_experts", "intermediate_size",
             "intermediate_dim", "in_features", "out_features", "expert_dim")  # fmt: skip
    return [
        (f"{path}.{name}", value)
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if name in names
    ]


@pytest.mark.parametrize("method", ["reap", "ean", "weighted-ean"])
def test_an_expert_that_answers_nothing_goes_first(
    method: str, cut: Any, tokenizer: Any, tmp_path: Path
) -> None:
    model = build("qwen3_moe")
    for block, expert in enumerate((5, 2)):
        model.model.layers[block].mlp.experts.down_proj.data[expert] = 0
    model.save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    out, report = cut(tmp_path / "source", method=method, sparsity=0.1)
    kept = kept_of(out)
    assert kept["model.layers.0.experts"] == [0, 1, 2, 3, 4, 6, 7]
    assert kept["model.layers.1.experts"] == [0, 1, 3, 4, 5, 6, 7]
    assert report.data["blocks"][0]["sites"][0]["removed"] == 1


def test_an_interrupted_run_goes_on_to_the_same_bytes(
    mixture: Make, cut: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = mixture("deepseek_v3")
    for method, pattern in (("reap", "experts"), ("wanda", "expert-channels")):
        wish = {"method": method, "pattern": pattern, "sparsity": 0.3}
        whole, _ = cut(source, f"{pattern}-whole", **wish)
        commit = Rewriting.commit

        def killed(self: Any, block: Any, *args: Any, commit: Any = commit) -> Any:
            if block.index == 1:
                raise KeyboardInterrupt
            return commit(self, block, *args)

        with monkeypatch.context() as patch:
            patch.setattr(Rewriting, "commit", killed)
            with pytest.raises(KeyboardInterrupt):
                cut(source, f"{pattern}-killed", **wish)
        resumed, report = cut(source, f"{pattern}-killed", **wish)
        assert report.data["resumed_after"] == 0
        assert bytes_of(resumed) == bytes_of(whole)


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Return weights, index, config and masks."""
    paths = [*folder.glob("*.safetensors*"), folder / "config.json"]
    paths += folder.glob("llmprune/masks*")
    return {path.name: path.read_bytes() for path in paths}


def test_masks_of_an_earlier_pruning_follow_their_experts(
    mixture: Make, cut: Any, stock: Any
) -> None:
    sparse, _ = cut(mixture("mixtral"), "sparse", method="magnitude", sparsity=0.5)
    out, report = cut(sparse, method="reap", sparsity=0.4)
    before, after = stock(sparse).state_dict(), stock(out).state_dict()
    for site, experts in kept_of(out).items():
        if site.endswith(".experts"):
            name = f"{site.removesuffix('experts')}mlp.experts.down_proj"
            assert torch.equal(after[name], before[name][experts])
    assert report.data["gate"]["masked_linears"] == 2 * (4 + 4 * 3)


def test_what_one_entry_counts_in_dense_blocks_and_experts_stays_equal(
    mixture: Make, cut: Any, stock: Any
) -> None:
    for pattern in ("expert-channels", "ffn-channels"):
        out, report = cut(mixture("jamba"), pattern, method="wanda", pattern=pattern, sparsity=0.4)
        config = json.loads((out / "config.json").read_text())
        assert config["intermediate_size"] % 8 == 0 and config["intermediate_size"] < 64
        assert report.data["gate"]["masked"]["passed"]
        assert {len(kept) for kept in kept_of(out).values()} == {config["intermediate_size"]}
    with pytest.raises(RecipeError, match="one entry of the config speaks for all blocks"):
        cut(mixture("jamba"), method="flap", pattern="ffn-channels", sparsity=0.2)


def test_what_reads_channels_is_fitted_expert_by_expert(mixture: Make, cut: Any) -> None:
    _, report = cut(
        *(mixture("mixtral"),),
        method="wanda",
        pattern="expert-channels",
        sparsity=0.4,
        settings=["prune.solver=least-squares"],
    )
    assert report.data["gate"]["masked"]["passed"]
    sites = [site for block in report.data["blocks"] for site in block["sites"]]
    assert len(sites) == 16
    stages = [site["stages"] for site in sites if "stages" in site]
    assert stages and all(each["updated"] <= each["masked"] for each in stages)
    assert any(each["updated"] < 0.9 * each["masked"] for each in stages)


def test_an_entry_of_the_config_keeps_its_own_name(
    cut: Any, tokenizer: Any, tmp_path: Path
) -> None:
    build("qwen3_moe").save_pretrained(source := tmp_path / "source")
    tokenizer.save_pretrained(source)
    config = json.loads((source / "config.json").read_text())
    config["num_experts"] = config.pop("num_local_experts")
    (source / "config.json").write_text(json.dumps(config))
    out, _ = cut(source, method="reap", sparsity=0.3)
    changed = json.loads((out / "config.json").read_text())
    assert changed["num_experts"] == 5 and "num_local_experts" not in changed


def test_more_than_a_router_can_do_without_is_refused(mixture: Make, cut: Any) -> None:
    with pytest.raises(
        RecipeError, match=r"2 of 8 stay in every mixture, so at most 0\.70\d can go\. Type --spars"
    ):
        cut(mixture("mixtral"), method="reap", sparsity=0.8)
    out, _ = cut(mixture("mixtral"), method="reap", sparsity=0.705)
    assert json.loads((out / "config.json").read_text())["num_local_experts"] == 2


@pytest.mark.parametrize(
    "wish, error, reason",
    [
        ({"settings": ["prune.form=masked"]}, RecipeError, "no weight that is zero keeps a router"),
        ({"settings": ["prune.allocation=widths"]}, RecipeError, "every mixture loses equally"),
        ({"target": {"ppl": "+5%"}}, RecipeError, "no weight that is zero keeps a router"),
        ({"method": "wanda", "pattern": "experts"}, RecipeError, "Methods for experts: reap"),
        (
            {"method": "flap", "pattern": "expert-channels"},
            WontLoad,
            "puts a bias into mlp.experts.0.down_proj",
        ),
        ({"method": "reap", "pattern": "expert-channels"}, RecipeError, "has no rule for"),
    ],
)
def test_what_a_mixture_cannot_do_is_refused(
    wish: dict[str, Any], error: type[Exception], reason: str, mixture: Make, cut: Any
) -> None:
    with pytest.raises(error, match=reason):
        cut(mixture("mixtral"), **({"method": "reap", "sparsity": 0.3} | wish))


def test_a_model_without_experts_says_what_it_has(pico: Make, cut: Any) -> None:
    with pytest.raises(RecipeError, match="this llama model has no experts to remove"):
        cut(pico("llama"), method="reap", sparsity=0.3)


class Listed(torch.nn.Module):
    """A half whose experts are modules in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = 3
        self.gate = torch.nn.Linear(6, 3, bias=False)
        self.experts = torch.nn.ModuleList(torch.nn.ModuleDict() for _ in range(3))
        for expert in self.experts:
            expert.update({name: torch.nn.Linear(6, 5) for name in ("gate_proj", "up_proj")})
            expert["down_proj"] = torch.nn.Linear(5, 6)


def test_experts_in_a_list_are_taken_off_it() -> None:
    module = torch.nn.ModuleDict({"moe": Listed()})
    family = Family(
        model_types=("listed",),
        blocks="blocks",
        taps=expert_taps("moe.experts"),
        mixture=Mixture(num_experts=3, count_key="num_experts", active=1, widths=()),
    )
    shapes = {name: tuple(value.shape) for name, value in module.named_parameters()}
    anatomy = anatomy_of(family, shapes)
    block = Block(
        index=0,
        prefix="",
        module=module,
        anatomy=anatomy,
        device=torch.device("cpu"),
        resident=True,
    )
    coupling = anatomy.coupling("experts")
    before = {name: value.clone() for name, value in module.named_parameters()}
    assert coupling is not None
    changed = block.shrink([(coupling, torch.tensor([0, 2]))])
    moe: Any = module["moe"]
    assert (len(moe.experts), moe.num_experts, moe.gate.out_features) == (2, 2, 2)
    for name in ("gate_proj.weight", "up_proj.bias", "down_proj.weight"):
        assert torch.equal(
            module.get_parameter(f"moe.experts.1.{name}"), before[f"moe.experts.2.{name}"]
        )
        assert f"moe.experts.1.{name}" in changed and f"moe.experts.0.{name}" not in changed
    assert torch.equal(moe.gate.weight, before["moe.gate.weight"][[0, 2]])


def test_experts_that_round_otherwise_in_groups_are_compared_one_at_a_time(
    cut: Any, tokenizer: Any, tmp_path: Path
) -> None:
    build("mixtral").to(torch.bfloat16).save_pretrained(source := tmp_path / "source")
    tokenizer.save_pretrained(source)
    asked = []

    def noted(scratch: Path, job: Any) -> str | None:
        reason = run_stock(scratch, job)
        asked.append(job.get("eager", False))
        if not asked[-1]:  # a token that another expert got
            with safe_open(str(scratch / "stock.safetensors"), "pt") as handle:
                logits = handle.get_tensor("logits")
            save_file({"logits": logits.roll(1, -1)}, str(scratch / "stock.safetensors"))
        return reason

    run_stock = gate._run_stock
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate, "_run_stock", noted)
        _, report = cut(source, "bf16", method="reap", sparsity=0.4, dtype="bfloat16")
        assert asked[-1] and not any(asked[:-1])
        assert report.data["gate"]["agreement"]["passed"]
        with pytest.raises(WontLoad, match="logits differ"):  # float32 leaves no room for that
            cut(source, "fp32", method="reap", sparsity=0.4, dtype="float32")
