"""Candidates by KL to the dense model: what plain transformers models say, each walked once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from transformers import LlamaConfig, LlamaForCausalLM

from llmprune import api
from llmprune.allocation.types import Candidate, Measured
from llmprune.base.progress import Progress
from llmprune.delivery.masks import MaskFiles
from llmprune.engine import planning, probing
from llmprune.engine import survey as surveying
from llmprune.engine.opening import open_plan
from llmprune.engine.probing import Prober
from llmprune.engine.survey import set_apart
from llmprune.mask.packed import unpack
from llmprune.report.run import Report
from llmprune.score.noise import seed_of
from llmprune.walk.block import Block
from llmprune.walk.forward import embed

Pico = Callable[..., Path]
Prune = Callable[..., Report]
Stock = Callable[[Path], Any]
HALF = Fraction(1, 2)

pytestmark = pytest.mark.usefixtures("no_gate")


@pytest.fixture
def prober(pico: Pico, tokens: Tensor) -> Callable[..., Prober]:
    """Make what compares candidates of a pico model in float32, two sequences at a time."""

    def make(model_type: str = "llama", method: str = "magnitude", **changes: Any) -> Prober:
        recipe = api.make_recipe(
            str(pico(model_type)), method=method, sparsity=0.5, out="unused", dtype="float32",
            device="cpu", seed=changes.pop("seed", 0),
        )  # fmt: skip
        opened = open_plan(recipe)
        fields: dict[str, Any] = {
            "plan": opened.plan,
            "blocks": opened.blocks,
            "cutter": opened.plan.masker(),
            "tokens_ST": tokens[:5],
            "embed": lambda tokens_NT: embed(opened.blocks, tokens_NT, 2),
            "progress": Progress("quiet"),
        }
        if opened.plan.parts.cut:
            fields["learn"] = lambda: embed(opened.blocks, tokens, 2)
        return Prober(**(fields | changes))

    return make


def sites_of(prober: Prober) -> list[str]:
    return [site.name for site in prober.plan.sites]


def linear_of(model: Any, site: str) -> Tensor:
    """Return a linear's weight_OI of a stock model as a view."""
    if site[-2:] in (".q", ".k", ".v"):
        param: Tensor = model.get_submodule(site[:-2]).weight.data
        return param.T.chunk(3)["qkv".index(site[-1])]
    if ".experts." in site:
        path, expert, name = site.rsplit(".", 2)
        experts = model.get_submodule(path)
        if name == "down_proj":
            down: Tensor = experts.down_proj.data[int(expert)]
            return down
        gate_up: Tensor = experts.gate_up_proj.data[int(expert)]
        return gate_up.chunk(2)[name == "up_proj"]
    module = model.get_submodule(site)
    weight: Tensor = module.weight.data
    return weight.T if type(module).__name__ == "Conv1D" else weight


def zero_smallest(weight_OI: Tensor, share: Fraction) -> None:
    """Zero a share of a matrix, the smallest first."""
    count = round(share * weight_OI.numel())
    order = weight_OI.abs().flatten().argsort(stable=True)[:count]
    keep = torch.ones(weight_OI.numel(), dtype=torch.bool)
    keep[order] = False
    weight_OI.mul_(keep.view(weight_OI.shape))


def compared(dense: Any, other: Any, tokens_ST: Tensor) -> Measured:
    """Return KL(dense || other) and the loss of the other, per sequence, by plain forwards."""
    with torch.no_grad():
        one, two = (m(input_ids=tokens_ST).logits[:, :-1].double() for m in (dense, other))
    logs = two.log_softmax(-1)
    kl = kl_div(logs, one.log_softmax(-1), log_target=True, reduction="none").sum(-1).mean(1)
    loss = cross_entropy(two.transpose(1, 2), tokens_ST[:, 1:], reduction="none").mean(1)
    return Measured(kl, loss)


def same(one: Sequence[Measured], two: Sequence[Measured]) -> bool:
    """Tell whether answers are the same to the bit."""
    pairs = zip(one, two, strict=True)
    return all(torch.equal(a.kl_S, b.kl_S) and torch.equal(a.loss_S, b.loss_S) for a, b in pairs)


def test_answers_are_those_of_plain_models(
    prober: Callable[..., Prober], pico: Pico, stock: Stock, model_type: str
) -> None:
    probe = prober(model_type)
    names = sites_of(probe)
    asked = [{}, {names[0]: HALF}, {names[-1]: HALF}, dict.fromkeys(names, Fraction(3, 10))]
    noise = {names[2]: 0.05}
    answers = probe([*(Candidate(shares=shares) for shares in asked), Candidate(noise=noise)])
    dense = stock(pico(model_type))
    for answer, shares in zip(answers, [*asked, noise], strict=True):
        model = stock(pico(model_type))
        for site, amount in shares.items():
            weight = linear_of(model, site)
            if shares is noise:
                generator = torch.Generator().manual_seed(int(seed_of(0, site)))
                weight += amount * torch.randn(weight.shape, generator=generator)
            else:
                zero_smallest(weight, amount)
        expected = compared(dense, model, probe.tokens_ST)
        assert torch.allclose(answer.kl_S, expected.kl_S, rtol=1e-3, atol=1e-6)
        assert torch.allclose(answer.loss_S, expected.loss_S, rtol=1e-5)
    assert answers[0].kl == 0 < min(answer.kl for answer in answers[1:])


def test_statistics_are_those_of_the_dense_model(
    prober: Callable[..., Prober], pico: Pico, stock: Stock, tokens: Tensor
) -> None:
    """All linears cut by Wanda at once, with what each reads in the dense model."""
    probe = prober(method="wanda")
    (answer,) = probe([Candidate(shares=dict.fromkeys(sites_of(probe), HALF))])
    dense, model = stock(pico("llama")), stock(pico("llama"))
    norms: dict[str, Tensor] = {}
    for site in sites_of(probe):
        dense.get_submodule(site).register_forward_pre_hook(
            lambda module, args, site=site: norms.update({site: args[0].flatten(0, 1).norm(dim=0)})
        )
    with torch.no_grad():
        dense(input_ids=tokens)
    for site, norm in norms.items():
        weight = linear_of(model, site)
        ranks = (weight.abs() * norm).argsort(dim=1).argsort(dim=1)
        weight.mul_(ranks >= weight.shape[1] // 2)
    expected = compared(dense, model, probe.tokens_ST)
    assert torch.allclose(answer.kl_S, expected.kl_S, rtol=1e-3)
    assert torch.allclose(answer.loss_S, expected.loss_S, rtol=1e-5)


@pytest.mark.parametrize("model_type", ["gpt2", "mixtral"])
def test_candidates_alone_and_together_are_the_same(
    prober: Callable[..., Prober], model_type: str
) -> None:
    names = sites_of(prober(model_type))
    first, last = names[0], names[-1]
    candidates = [
        Candidate(shares={last: HALF}),
        Candidate(),
        Candidate(shares={first: HALF, last: HALF}),
        Candidate(shares={first: HALF}),
        Candidate(noise={first: 0.1}),
        Candidate(shares={first: HALF}, noise={last: -0.1}),
        Candidate(shares={last: HALF}),
    ]
    together = prober(model_type)(candidates)
    alone = [prober(model_type)([each])[0] for each in candidates]
    assert same(together, alone)
    assert same(prober(model_type, at_once=3)(candidates), together)
    assert same([together[0]], [together[6]])
    assert len({answer.kl for answer in together}) == 6


def test_a_prefix_that_candidates_share_is_computed_once(
    prober: Callable[..., Prober], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    call = probing.call
    monkeypatch.setattr(probing, "call", lambda *args: calls.append(1) or call(*args))
    probe = prober()
    last = [name for name in sites_of(probe) if ".1." in name]
    probe([Candidate(shares={name: HALF}) for name in last])
    batches = 3
    assert len(calls) == batches * (1 + (1 + len(last)))


@pytest.fixture
def placed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Tensor]]:
    """Return the weights that blocks are given, in order."""
    found: list[tuple[str, Tensor]] = []
    put = Block.replace

    def noted(self: Block, linear: str, weight_OI: Tensor) -> None:
        found.append((self.prefix + linear, weight_OI.clone()))
        put(self, linear, weight_OI)

    monkeypatch.setattr(Block, "replace", noted)
    return found


def test_noise_is_symmetric_and_follows_from_the_seed(
    prober: Callable[..., Prober], placed: list[tuple[str, Tensor]]
) -> None:
    probe = prober()
    one, two = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"
    both = [Candidate(noise={one: 0.01}), Candidate(noise={one: -0.01})]
    answers = probe(both)
    minus, dense, plus, again = (weight for _, weight in placed)
    assert torch.equal(dense, again)
    assert torch.allclose(plus - dense, dense - minus, atol=1e-6)
    assert float((plus - dense).std()) == pytest.approx(0.01, rel=0.1)
    assert not same(answers[:1], answers[1:])
    assert same(prober()(both), answers)
    assert same(prober()(both[::-1]), answers[::-1])
    assert not same(prober(seed=1)(both), answers)
    placed.clear()
    prober()([Candidate(noise={two: 0.01})])
    assert not torch.allclose(placed[0][1] - placed[1][1], plus - dense, atol=1e-3)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral"])
def test_blocks_are_as_before_after_every_candidate(
    prober: Callable[..., Prober], model_type: str
) -> None:
    probe = prober(model_type)
    blocks = probe.blocks
    held: dict[int, Any] = {}

    class Held:
        """Blocks that stay open, as those of a model in memory do."""

        def __getattr__(self, name: str) -> Any:
            return getattr(blocks, name)

        def __len__(self) -> int:
            return len(blocks)

        @contextmanager
        def open(self, index: int) -> Iterator[Block]:
            with blocks.open(index) as block:
                before = {n: p.clone() for n, p in block.module.named_parameters()}
                yield block
                held[index] = before, dict(block.module.named_parameters())
                assert all(torch.equal(held[index][1][n], value) for n, value in before.items())

    object.__setattr__(probe, "blocks", Held())
    names = sites_of(probe)
    probe([Candidate(shares=dict.fromkeys(names, HALF)), Candidate(noise={names[-1]: 0.1})])
    assert held.keys() == {0, 1}


def test_rounds_in_the_log_are_not_walked_again(
    prober: Callable[..., Prober], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "probes.jsonl"
    walked: list[int] = []
    walk = Prober._walk

    def counted(self: Prober, candidates: Sequence[Candidate]) -> list[Measured]:
        if len(walked) == 2:
            raise InterruptedError
        walked.append(len(candidates))
        return walk(self, candidates)

    monkeypatch.setattr(Prober, "_walk", counted)
    probe = prober(log=log, at_once=2)
    candidates = [Candidate(shares={name: HALF}) for name in sites_of(probe)[:5]]
    with pytest.raises(InterruptedError):
        probe(candidates)
    assert [len(json.loads(line)["answers"]) for line in log.read_text().splitlines()] == [2, 2]
    with log.open("a") as file:
        file.write('{"round": "0123", "ans')  # what a kill in the middle of a line leaves
    monkeypatch.setattr(Prober, "_walk", walk)
    for left in (1, 0):
        walked.clear()
        monkeypatch.setattr(
            Prober, "_walk", lambda self, each: walked.append(len(each)) or walk(self, each)
        )
        answers = prober(log=log, at_once=2)(candidates)
        assert walked == [1] * left
    assert same(answers, prober()(candidates))
    assert not same(prober(log=log)(candidates[::-1]), answers)


# Through whole runs.


@pytest.fixture
def prune(tmp_path: Path, tokens: Tensor) -> Prune:
    """Prune a folder, or a model in memory, on sixteen sequences; two are set apart."""
    more = torch.randint(0, 64, (16, 24), generator=torch.Generator().manual_seed(4))

    def run(model: Any, out: str = "out", **wishes: Any) -> Report:
        defaults: dict[str, Any] = {"calib": more, "quiet": True, "sparsity": 0.5}
        if isinstance(model, Path):
            defaults |= {"out": tmp_path / out, "device": "cpu", "dtype": "float32"}
            model = str(model)
        return api.prune(model, **(defaults | wishes))

    return run


def removed(report: Report) -> dict[str, int]:
    return {
        row["site"]: row["removed"] for block in report.data["blocks"] for row in block["sites"]
    }


@pytest.mark.parametrize(
    ("allocation", "method"),
    [("uniform+", "magnitude"), ("erk", "wanda"), ("alpha", "magnitude"), ("alpha", "wanda")],
)
def test_a_judged_allocation_is_used_where_it_is_nearer_to_the_dense_model(
    make_model: Callable[..., Any], prune: Prune, allocation: str, method: str
) -> None:
    settings = [f"prune.allocation={allocation}"]
    if allocation == "uniform+":
        settings.append("prune.options.first=0.3")
    report = prune(make_model("llama"), method=method, settings=settings)
    always = prune(make_model("llama"), method=method, settings=[*settings, "prune.adopt=always"])
    uniform = removed(prune(make_model("llama"), method=method))
    verdict = report.data["verdict"]
    assert verdict["kl"] == always.data["verdict"]["kl"] and verdict["sequences"] == 2
    better = verdict["kl"][allocation] < verdict["kl"]["uniform"]
    assert verdict["adopted"] == better and always.data["verdict"]["adopted"]
    assert removed(always) != uniform
    assert removed(report) == (removed(always) if better else uniform)
    assert abs(report.sparsity - 0.5) < 1e-3 and abs(always.sparsity - 0.5) < 1e-3


def test_a_verdict_is_what_plain_models_say(pico: Pico, prune: Prune, stock: Stock) -> None:
    settings = ["prune.allocation=uniform+", "prune.options.first=0.3", "prune.adopt=always"]
    tokens = torch.randint(0, 64, (16, 24), generator=torch.Generator().manual_seed(4))
    report = prune(pico("gpt2"), method="magnitude", settings=settings, calib=tokens)
    dense = stock(pico("gpt2"))
    for name, counts in {
        "uniform+": removed(report),
        "uniform": removed(prune(pico("gpt2"), "even", method="magnitude")),
    }.items():
        model = stock(pico("gpt2"))
        for site, count in counts.items():
            weight = linear_of(model, site)
            zero_smallest(weight, Fraction(count, weight.numel()))
        expected = float(compared(dense, model, set_apart(tokens).judge_ST).kl_S.mean())
        assert report.data["verdict"]["kl"][name] == pytest.approx(expected, rel=1e-3)


REDUNDANT = (1, 3)


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of five blocks, two of which add next to nothing."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=5,
        num_attention_heads=4, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    with torch.no_grad():
        for value in model.parameters():
            if value.dim() > 1:
                value.mul_(5)
        for index in REDUNDANT:
            layer = model.model.layers[index]
            layer.self_attn.o_proj.weight.mul_(0.05)
            layer.mlp.down_proj.weight.mul_(0.05)
    folder = tmp_path_factory.mktemp("idle") / "model"
    model.save_pretrained(folder)
    return folder


SEARCHES: dict[str, list[str]] = {
    "sensitivity": [],
    "ecoflap": ["prune.options.spread=0.3"],
    "evopress": ["prune.options.generations=2", "prune.options.offspring=6"],
}


@pytest.mark.parametrize("allocation", SEARCHES)
def test_blocks_that_do_next_to_nothing_are_found(
    idle: Path, prune: Prune, stock: Stock, allocation: str
) -> None:
    settings = [f"prune.allocation={allocation}", *SEARCHES[allocation]]
    tokens = torch.randint(0, 64, (24, 24), generator=torch.Generator().manual_seed(5))
    wishes = {"sparsity": 0.6, "calib": tokens}
    report = prune(idle, settings=settings, **wishes)
    even = prune(idle, "even", **wishes)
    assert report.data["verdict"]["adopted"]
    shares = [block["sparsity"] for block in report.data["blocks"]]
    busy = [share for index, share in enumerate(shares) if index not in REDUNDANT]
    assert min(shares[index] for index in REDUNDANT) > sum(busy) / len(busy) + 0.05
    assert abs(report.sparsity - 0.6) < 1e-3
    unseen = torch.randint(0, 64, (16, 24), generator=torch.Generator().manual_seed(6))
    assert report.out is not None and even.out is not None
    dense = stock(idle)
    own, other = (
        float(compared(dense, stock(each.out or Path()), unseen).kl_S.mean())
        for each in (report, even)
    )
    assert own < 0.9 * other


def test_streamed_and_resident_searches_end_alike(pico: Pico, prune: Prune, stock: Stock) -> None:
    settings = ["prune.allocation=evopress", *SEARCHES["evopress"]]
    report = prune(pico("gpt2"), settings=settings)
    resident = prune(stock(pico("gpt2")), settings=settings)
    assert report.data["verdict"] == resident.data["verdict"]
    assert report.out is not None
    for name, keep in MaskFiles(report.out).of_block("").items():
        assert torch.equal(unpack(resident.masks[name], keep.shape), keep), name
    left = {path.name for path in (report.out / "llmprune").iterdir()}
    assert not left & {"probes.jsonl", "survey"}


def test_a_block_is_profiled_whole_however_little_room_there_is(
    make_model: Callable[..., Any], prune: Prune, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    profile = surveying._profile

    def noted(plan: Any, row: Any, evidence: Mapping[str, Any]) -> Any:
        seen.append(len(evidence))
        return profile(plan, row, evidence)

    monkeypatch.setattr(surveying, "_profile", noted)
    estimate = planning.estimate
    monkeypatch.setattr(
        planning, "estimate", lambda *a, **k: replace(estimate(*a, **k), statistics_bytes=600)
    )
    settings = ["prune.allocation=owl"]
    assert prune(make_model("llama"), settings=settings).data["verdict"] is not None
    assert seen == [7, 7]
