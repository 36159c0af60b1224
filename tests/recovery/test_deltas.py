"""Differences from a base: what stays, times what, and that storing them loses no bit."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmprune.base.errors import NumericalError, RecipeError
from llmprune.checkpoint.source import open_folder
from llmprune.recovery.delta_plan import DeltaPlan, DeltaWish, plan_delta
from llmprune.recovery.deltas import (
    DELTA_METHODS,
    analytic_q,
    bits_of,
    check_amount,
    chosen,
    cut_away,
    generator_of,
    pruned,
    rescaled,
    spread_bound,
)
from llmprune.recovery.differences import (
    BITS,
    KEPT,
    WHOLE,
    ZEROS,
    base_fingerprint,
    decode,
    encode,
)
from llmprune.recovery.rescaling import ETAS, POINTS, Rescaling, find_rescaling, grid_of

DARE, MAGNITUDE = DELTA_METHODS["dare"], DELTA_METHODS["magnitude"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def picked(tuned: Tensor, base: Tensor, sparsity: float, name: str = "a", seed: int = 0) -> Tensor:
    return chosen(tuned, base, DARE, sparsity, generator_of(seed, name))


# What stays, and times what


def test_a_difference_worked_by_hand() -> None:
    """Dropped are the second and third; the others times 1/(1 - 0.5), or times 1/0.8."""
    delta = torch.tensor([0.2, -0.4, 0.1, 0.3])
    keep = torch.tensor([True, False, False, True])
    dare = rescaled(delta, keep, DARE.scale(0.5, None))
    assert torch.allclose(dare, torch.tensor([0.4, 0.0, 0.0, 0.6]))
    by_q = rescaled(delta, keep, DELTA_METHODS["darex-q"].scale(0.5, 0.8))
    assert torch.allclose(by_q, torch.tensor([0.25, 0.0, 0.0, 0.375]))


def test_dare_makes_up_for_what_is_dropped() -> None:
    assert [DARE.scale(p, None) for p in (0.0, 0.5, 0.9, 0.99)] == [1.0, 2.0, 10.0, 100.0]
    assert DELTA_METHODS["darex-q"].scale(0.9, None) == 10.0
    assert MAGNITUDE.scale(0.9, None) == 1.0


@pytest.mark.parametrize("p", [0.0, 0.29, 0.5, 0.9, 0.999])
def test_counts_are_exact(p: float) -> None:
    base = random(20, 5)
    keep = picked(base + 1, base, p)
    assert int((~keep).sum()) == math.floor(p * 100 + 0.5 + 1e-9)


def test_draws_follow_from_seed_and_name_alone() -> None:
    base = random(16, 16)
    tuned = base + 0.1
    first = picked(tuned, base, 0.5, "a", 1)
    assert torch.equal(first, picked(tuned + 1, base, 0.5, "a", 1))
    assert not torch.equal(first, picked(tuned, base, 0.5, "b", 1))
    assert not torch.equal(first, picked(tuned, base, 0.5, "a", 2))


def test_every_entry_stays_as_often() -> None:
    base = torch.zeros(40)
    kept = [picked(base + 1, base, 0.75, "a", seed).float() for seed in range(400)]
    often = torch.stack(kept).mean(0)
    assert float((often - 0.25).abs().max()) < 0.1


def test_the_largest_differences_stay_and_of_equals_the_last() -> None:
    base = torch.zeros(5)
    tuned = torch.tensor([0.3, -0.5, 0.3, 0.1, -0.3])
    keep = chosen(tuned, base, MAGNITUDE, 0.4, generator_of(0, "a"))
    assert keep.tolist() == [False, True, True, False, True]


def slow_pruned(tuned: Tensor, base: Tensor, keep: Tensor, scale: float) -> Tensor:
    """One entry after the other."""
    found = base.clone()
    for place in range(len(base)):
        if float(tuned[place]) == 0 and float(base[place]) != 0:
            found[place] = tuned[place]
        elif bool(keep[place]):
            start = base[place].float()
            found[place] = start + (tuned[place].float() - start) * scale
    return found


@given(
    st.sampled_from(DTYPES),
    st.sampled_from([1.0, 2.0, 10.0, 1 / 0.8]),
    st.integers(0, 999),
    st.sampled_from([0.0, 0.5, 0.9]),
)
def test_the_sum_is_that_of_entry_by_entry_and_zeros_of_a_mask_stay(
    dtype: torch.dtype, scale: float, seed: int, p: float
) -> None:
    base = random(24, seed=seed, dtype=dtype)
    tuned = (base.float() + 0.1 * random(24, seed=seed + 1)).to(dtype)
    removed = random(24, seed=seed + 2) > 0.3
    tuned[removed] = 0
    base[:6][removed[:6]] = 0  # where the base has the mask too
    keep = picked(tuned, base, p)
    assert not bool((keep & removed).any())
    value = pruned(tuned, base, keep, scale)
    assert torch.equal(value, slow_pruned(tuned, base, keep, scale))
    assert bool((value[removed] == 0).all())
    dropped = ~keep & ~cut_away(tuned, base)
    assert torch.equal(value[dropped], base[dropped])


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_stays_unscaled_has_every_bit(dtype: torch.dtype) -> None:
    base = random(64, dtype=dtype) * 1000
    tuned = random(64, seed=1, dtype=dtype) / 1000  # base + (tuned - base) would round
    tuned[:2] = torch.tensor([0.0, -0.0], dtype=dtype)
    value = pruned(tuned, base, picked(tuned, base, 0.0), 1.0)
    assert torch.equal(bits_of(value), bits_of(tuned))


@pytest.mark.parametrize(
    ("sparsity", "q", "says"),
    [
        (1.0, None, "sparsity: 1 "),
        (-0.1, None, "sparsity: -0.1 "),
        (float("nan"), None, "sparsity: nan "),
        (0.9, 0.05, r"q: 0.05 is out of range.*\(0.1,"),
        (0.9, 1.5, "q: 1.5 "),
    ],
)
def test_amounts_out_of_range_are_told(sparsity: float, q: float | None, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        check_amount(sparsity, q)


# The analytic q


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 0.99])
def test_the_bound_on_the_spread_holds(p: float) -> None:
    """Of a drop with probability p, log E exp(t (kept - mean)) is at most Phi t^2 / 4."""
    for t in (-8.0, -1.0, 0.5, 3.0, 6.0):
        moment = (1 - p) * math.exp(t * p) + p * math.exp(-t * (1 - p))
        assert math.log(moment) <= spread_bound(p) * t * t / 4 + 1e-12
    assert spread_bound(p) == pytest.approx(spread_bound(1 - p))


def slow_q(delta_I: Tensor, mean_I: Tensor, p: float, eta: float) -> float:
    """Take the lowest of all q of the grid, sums by hand."""
    parts = [float(d) * float(x) for d, x in zip(delta_I, mean_I, strict=True)]
    best, found, q = math.inf, 1 - p, 1 - p
    while q <= 1 + 1e-9:
        shift = eta * (1 - (1 - p) / q) * sum(parts)
        spread = eta**2 * spread_bound(p) * sum(c * c for c in parts) / (4 * q * q)
        if abs(shift + spread + math.log(2 / 0.05)) < best - 1e-12:
            best, found = abs(shift + spread + math.log(2 / 0.05)), q
        q += 0.001
    return found


@pytest.mark.parametrize("p", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("eta", [0.5, 5.0, 50.0])
def test_the_analytic_q_is_the_lowest_of_the_grid(p: float, eta: float) -> None:
    delta_OI, mean_I = random(4, 6) / 10, random(6, seed=1)
    q_O = analytic_q(delta_OI, mean_I, p, eta)
    wanted = [slow_q(row, mean_I, p, eta) for row in delta_OI]
    assert q_O.tolist() == pytest.approx(wanted, abs=1e-3)
    assert float(q_O.min()) >= 1 - p and float(q_O.max()) <= 1


def test_the_analytic_q_where_it_has_a_closed_form() -> None:
    """With sum(c) = 1 > 0 the derivative is zero at q = eta Phi sum(c^2) / (2 (1 - p) sum(c))."""
    q = float(analytic_q(torch.tensor([[0.5, 0.5]]), torch.ones(2), 0.9, 0.8)[0])
    assert q == pytest.approx(0.8 * 0.364096 * 0.5 / 0.2, abs=1e-3)
    assert float(analytic_q(torch.zeros(1, 2), torch.ones(2), 0.9, 0.8)[0]) == pytest.approx(0.1)


def test_the_grid_of_q_goes_from_dare_to_no_rescaling() -> None:
    found = grid_of(0.9)
    assert len(found) == POINTS and found[0] == 0.1 and found[-1] == 1.0
    factors = [b / a for a, b in pairwise(found)]
    assert factors == pytest.approx([10 ** (1 / (POINTS - 1))] * (POINTS - 1), rel=1e-4)
    assert grid_of(0.0) == [1.0]


# Storing


def test_parts_worked_by_hand() -> None:
    """Of twelve the second and the ninth differ: bits 01000000 10000000, filled up with zeros."""
    base = torch.arange(1.0, 13.0)
    value = base.clone()
    value[1], value[8] = 7.0, -3.0
    parts = encode(value, base)
    assert parts.keys() == {BITS, KEPT}
    assert parts[BITS].tolist() == [64, 128] and parts[KEPT].tolist() == [7.0, -3.0]


def test_the_form_is_the_smallest() -> None:
    base = random(64)
    assert encode(base, base.clone()) == {}
    assert encode(base + 1, base).keys() == {WHOLE}
    half = base.clone()
    half[::2] = 0
    assert encode(half, base).keys() == {BITS, KEPT, ZEROS}
    assert encode(torch.tensor(2.0), torch.tensor(1.0)).keys() == {WHOLE}


@given(
    st.sampled_from([*DTYPES, torch.int32, torch.bool]),
    st.sampled_from([(), (0,), (7,), (3, 5), (2, 3, 4)]),
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(0, 999),
)
def test_every_bit_comes_back(
    dtype: torch.dtype, shape: tuple[int, ...], changed: float, zeros: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    base = (random(*shape, seed=seed) * 100).to(dtype)
    other = (random(*shape, seed=seed + 1) * 100).to(dtype)
    value = torch.where(torch.rand(shape, generator=generator) < changed, other, base)
    value = value.masked_fill(torch.rand(shape, generator=generator) < zeros, 0)
    if dtype == torch.float32 and shape == (7,):
        value[:2] = torch.tensor([-0.0, float("nan")])
    parts = encode(value, base)
    found = decode(parts, base)
    assert found.dtype == dtype and found.shape == shape
    assert torch.equal(bits_of(found), bits_of(value))
    assert sum(part.nbytes for part in parts.values()) <= value.nbytes


def test_parts_of_another_tensor_are_told() -> None:
    parts = encode(torch.arange(64.0), torch.arange(64.0).masked_fill(torch.arange(64) < 9, -1))
    with pytest.raises(ValueError, match="9 bits for 8 values"):
        decode(parts | {KEPT: parts[KEPT][1:]}, torch.zeros(64))
    with pytest.raises(ValueError, match="takes 4 bytes"):
        decode(parts, torch.zeros(32))


# Looking for q in a walk


@pytest.fixture(scope="module")
def tuned(pico: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a fine-tuned copy of a pico model: all but its embeddings moved a little."""
    home = tmp_path_factory.mktemp("tuned")

    def make(model_type: str) -> Path:
        folder = home / model_type
        if not folder.exists():
            shutil.copytree(pico(model_type), folder)
            tensors = load_file(folder / "model.safetensors")
            for place, (name, value) in enumerate(sorted(tensors.items())):
                if "embed" not in name and "wte" not in name:
                    tensors[name] = value + 0.02 * random(*value.shape, seed=place)
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


def plan_of(model_type: str, pico: Any, tuned: Any, sparsity: float = 0.9) -> DeltaPlan:
    wish = DeltaWish(
        model=str(tuned(model_type)),
        base=str(pico(model_type)),
        method="darex-q",
        sparsity=sparsity,
        device="cpu",
    )
    return plan_delta(wish)


def rebuilt_tensors(plan: DeltaPlan, q_of: Callable[[str], float]) -> Iterator[tuple[str, Tensor]]:
    """Return the model of a pair whole, tensor by tensor."""
    for name in plan.pair.names:
        mine, base = plan.pair.read(name)
        if name in plan.pair.eligible:
            keep = plan.pair.keep(name, mine, base)
            mine = base + (mine - base) * keep / q_of(name)
        yield name, mine


def whole_change(
    plan: DeltaPlan, q_of: Callable[[str], float], ids_NT: Tensor, stock: Any, folder: Path
) -> float:
    """Return the change of the logits where models are loaded whole."""
    shutil.copytree(plan.pair.tuned.folder, folder)
    tensors = dict(rebuilt_tensors(plan, q_of))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with torch.no_grad():
        ours, theirs = (stock(f)(ids_NT).logits for f in (folder, plan.pair.tuned.folder))
    return float((ours - theirs).abs().mean())


def test_the_walk_finds_the_q_that_changes_the_logits_least(
    pico: Any, tuned: Any, stock: Any, tokens: Tensor, tmp_path: Path
) -> None:
    plan = plan_of("llama", pico, tuned)
    found = find_rescaling(plan.pair, plan.blocks, tokens)
    wanted = {
        q: whole_change(plan, Rescaling(q=q).of, tokens, stock, tmp_path / str(q))
        for q in grid_of(0.9)[::4]
    }
    for q, change in wanted.items():
        assert found.tried[q] == pytest.approx(change, rel=1e-3)
    assert isinstance(found.q, float)
    assert found.change == min(found.tried.values()) == found.tried[found.q]
    assert found.change < found.tried[0.1], "another q is better than that of DARE"


def test_every_tensor_gets_its_own_analytic_q(
    pico: Any, tuned: Any, stock: Any, tokens: Tensor, tmp_path: Path
) -> None:
    plan = plan_of("llama", pico, tuned)
    found = find_rescaling(plan.pair, plan.blocks, tokens, analytic=True)
    assert isinstance(found.q, dict) and found.q.keys() == plan.pair.eligible
    assert found.eta in ETAS and list(found.tried) == list(ETAS)
    model, means = stock(plan.pair.tuned.folder), {}
    for name in found.q:
        model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(
            lambda _, given, name=name: means.update({name: given[0].flatten(0, -2).mean(0)})
        )
    with torch.no_grad():
        model(tokens)
    for name, q in found.q.items():
        mine, base = plan.pair.read(name)
        assert q == pytest.approx(
            float(analytic_q(mine - base, means[name], 0.9, found.eta).mean()), abs=2e-3
        )
    change = whole_change(plan, found.q.__getitem__, tokens, stock, tmp_path / "whole")
    assert found.change == pytest.approx(change, rel=1e-3)


@pytest.mark.parametrize("model_type", ["gpt2", "mixtral"])
def test_fused_and_stacked_tensors_are_walked_as_they_are_stored(
    model_type: str, pico: Any, tuned: Any, stock: Any, tokens: Tensor, tmp_path: Path
) -> None:
    plan = plan_of(model_type, pico, tuned, 0.5)
    found = find_rescaling(plan.pair, plan.blocks, tokens, analytic=True)
    assert isinstance(found.q, dict) and found.q.keys() == plan.pair.eligible
    assert not any("router" in n or ".gate." in n or "ln_" in n for n in plan.pair.eligible)
    change = whole_change(plan, found.q.__getitem__, tokens, stock, tmp_path / "whole")
    assert found.change == pytest.approx(change, rel=1e-3)


def test_candidates_that_overflow_are_passed_over(
    pico: Any, tuned: Any, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of("llama", pico, tuned)
    monkeypatch.setattr("llmprune.recovery.rescaling.grid_of", lambda p: [1e-38, 1.0])
    found = find_rescaling(plan.pair, plan.blocks, tokens)
    assert found.tried[1e-38] == math.inf and found.q == 1.0
    monkeypatch.setattr("llmprune.recovery.rescaling.grid_of", lambda p: [1e-38])
    with pytest.raises(NumericalError, match="every rescaled model overflows"):
        find_rescaling(plan.pair, plan.blocks, tokens)


def test_one_number_serves_all_tensors() -> None:
    assert Rescaling(q=0.3).of("a") == Rescaling(q={"a": 0.3}).of("a") == 0.3


# Telling a base


def test_a_base_is_known_wherever_it_lies(pico: Any, tmp_path: Path) -> None:
    folder, wanted = pico("llama"), base_fingerprint(open_folder(pico("llama")))
    assert base_fingerprint(open_folder(pico("llama", sharded=True))) == wanted
    copy = shutil.copytree(folder, tmp_path / "copy")
    tensors = load_file(copy / "model.safetensors")
    tensors[max(tensors)].view(-1)[-1] += 1
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert base_fingerprint(open_folder(copy)) != wanted
