"""Weights that fade before they go: by the step, by family and pattern, resumed, and cut out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from llmprune import api
from llmprune.arch.anatomy import Anatomy
from llmprune.arch.types import Coupling, Span
from llmprune.base.errors import LlmpruneError
from llmprune.base.progress import Progress
from llmprune.delivery.masks import MaskFiles
from llmprune.recipe import Recipe
from llmprune.recovery.doomed import march, march_factor
from llmprune.recovery.fading import Fade
from llmprune.recovery.saved import Saved
from llmprune.report.run import Report
from llmprune.runs import run_recipe
from llmprune.walk.resident import in_memory

pytestmark = pytest.mark.usefixtures("quick_gate")
STILL = ["evaluate.perplexity=false"]
UNITS = "ffn-channels+heads"


def params_of(*values: float) -> dict[str, nn.Parameter]:
    return {"w": nn.Parameter(torch.tensor([list(values)]))}


def fade_of(how: Any, params: Any, begin: int = 0, end: int = 4, **rest: Any) -> Fade:
    return Fade(
        **{"how": how, "params": params, "blocks": [], "kinds": (), "begin": begin, "end": end}
        | rest
    )


def test_four_steps_lead_to_zero_on_a_line() -> None:
    params, keep = params_of(2.0, 1.0), torch.tensor([[False, True]])
    fade = fade_of("march", params, begin=3, end=7, doomed={"w": keep})
    seen = []
    for done in (4, 5, 6, 7):
        adopted = fade.after_update(done)
        seen.append(params["w"][0, 0].item())
    torch.testing.assert_close(torch.tensor(seen[:3]), torch.tensor([1.5, 1.0, 0.5]))
    assert torch.equal(adopted["w"], keep) and not fade.doomed  # the mask does the last step
    assert params["w"][0, 1] == 1.0


def test_a_decision_leaves_all_weights_as_they_were() -> None:
    params = params_of(2.0, 1.0)
    fade = fade_of("march", params)

    def cut() -> dict[str, Tensor]:
        params["w"].data = torch.tensor([[0.0, 5.0]])  # a solver may change what stays
        return {"w": torch.tensor([[False, True]])}

    fade.decide(cut)
    assert params["w"].tolist() == [[2.0, 1.0]]
    assert fade.doomed["w"].tolist() == [[False, True]]


@given(st.integers(1, 9), st.integers(0, 99))
def test_marching_by_mask_is_marching_by_unit(steps: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    up, down = torch.randn(6, 4, generator=draw), torch.randn(4, 6, generator=draw)
    keep_U = torch.rand(3, generator=draw) < 0.5
    spans = (Span(linear="up", axis="out", width=2), Span(linear="down", axis="in", width=2))
    coupling, theirs = Coupling(name="x", spans=spans, num_units=3), {"up": up, "down": down}
    params = {name: nn.Parameter(value.clone()) for name, value in theirs.items()}
    wide = keep_U.repeat_interleave(2)
    keeps = {"up": wide[:, None].expand(6, 4), "down": wide[None].expand(4, 6)}
    fade = fade_of("march", params, end=steps, doomed=dict(keeps))
    first = {name: param.detach().clone() for name, param in params.items()}
    for step in range(steps - 1):
        assert fade.after_update(step + 1) == {}
        march(coupling, theirs, keep_U, march_factor(step, steps))
        for name, param in params.items():
            assert torch.equal(param, theirs[name])
            line = torch.where(keeps[name], 1.0, 1 - (step + 1) / steps)
            torch.testing.assert_close(param.detach(), first[name] * line)
    assert fade.after_update(steps).keys() == keeps.keys()


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox"])
def test_a_pull_is_along_each_unit_that_goes_and_as_long_as_asked(
    model_type: str, make_model: Any
) -> None:
    model = make_model(model_type)
    with in_memory(model) as blocks:
        anatomy, prefix = blocks.anatomy(1), f"{blocks.family.blocks}.1."
    params = {prefix + name: value for name, value in blocks.modules[1].named_parameters()}
    params = {name: nn.Parameter(value.data.clone()) for name, value in params.items()}
    coupling = anatomy.coupling("heads")
    assert coupling is not None
    keep_U = torch.arange(coupling.num_units) != 1
    owned = {prefix + anatomy.linears[span.linear].param for span in coupling.spans}
    doomed = {name: torch.ones_like(params[name], dtype=torch.bool) for name in owned}
    march(coupling, _views(prefix, anatomy, doomed), keep_U, 0)
    fade = fade_of(
        "pull", params, blocks=[(prefix, anatomy)], kinds=("heads",), doomed=doomed,
        options={"strength": 0.5, "smooth": 0.0},
    )  # fmt: skip
    for param in params.values():
        param.grad = torch.ones_like(param)
    fade.see_gradients()
    weights, grads = [], []
    for name, param in params.items():
        assert param.grad is not None
        gone = ~doomed.get(name, torch.ones_like(param, dtype=torch.bool))
        assert torch.equal(param.grad[~gone], torch.ones_like(param)[~gone])
        weights.append(param.detach()[gone])
        grads.append((param.grad - 1)[gone])
    weight, pull = torch.cat(weights), torch.cat(grads)
    assert len(weight) == sum(int((~keep).sum()) for keep in doomed.values())
    torch.testing.assert_close(pull, 0.5 * weight / weight.norm(), atol=1e-6, rtol=1e-4)


def _views(prefix: str, anatomy: Anatomy, tensors: Any) -> dict[str, Tensor]:
    """Return linears of the parameters that are among tensors."""
    return {
        name: linear.view(tensors[prefix + linear.param])
        for name, linear in anatomy.linears.items()
        if prefix + linear.param in tensors
    }


@pytest.fixture
def text() -> Tensor:
    """Sixty windows of sixteen tokens that follow one another in few ways."""
    draw = torch.Generator().manual_seed(0)
    starts = torch.randint(0, 64, (60, 1), generator=draw)
    return (starts + 3 * torch.arange(16)) % 64


def train(folder: Path, out: Path, text: Tensor, *settings: str, **wishes: Any) -> Report:
    report = api.recover(
        folder, data=text, out=out, quiet=True, device="cpu",
        settings=[*STILL, *(f"recover.{each}" for each in settings)],
        **{"steps": 12, "batch": 4, "learning_rate": 0.003} | wishes,
    )  # fmt: skip
    assert report is not None
    return report


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def units_wish(fade: str, pattern: str = UNITS) -> tuple[str, ...]:
    return (f"prune.pattern={pattern}", "prune.method=magnitude-struct", "prune.sparsity=0.3",
            f"fade={fade}")  # fmt: skip


@pytest.mark.parametrize(
    ("model_type", "fade"), [("llama", "pull"), ("gpt2", "march"), ("phi3", "pull")]
)
def test_units_go_whole_in_every_family(
    model_type: str, fade: str, pico: Any, make_model: Any, tmp_path: Path, text: Tensor
) -> None:
    report = train(pico(model_type), tmp_path / "out", text, *units_wish(fade))
    assert 0.3 <= report.sparsity < 0.45
    assert report.data["gate"]["masked_linears"]
    masks = MaskFiles(tmp_path / "out").of_block("")
    with in_memory(make_model(model_type)) as blocks:
        for index in range(len(blocks)):
            prefix = f"{blocks.family.blocks}.{index}."
            for coupling in blocks.anatomy(index).couplings:
                if coupling.kind not in UNITS.split("+"):
                    continue
                parts = []
                for span in coupling.spans:
                    keep_OI = masks[prefix + span.linear]
                    lines = keep_OI if span.axis == "out" else keep_OI.T
                    place = slice(span.offset, span.offset + span.width * coupling.num_units)
                    owned_UN = lines[place].reshape(coupling.num_units, -1)
                    parts.append(owned_UN.any(dim=1))
                    assert torch.equal(owned_UN.all(dim=1), parts[-1])
                assert all(torch.equal(part, parts[0]) for part in parts)
                assert 0 < int(parts[0].sum()) < coupling.num_units


@pytest.mark.parametrize("wish", [("prune.sparsity=0.6",), ("prune.pattern=2:4",)])
def test_single_weights_march_too(wish: Any, pico: Any, tmp_path: Path, text: Tensor) -> None:
    report = train(
        pico("llama"), tmp_path / "out", text, *wish, "prune.method=magnitude", "fade=march"
    )
    assert report.sparsity == pytest.approx(0.6 if "0.6" in wish[0] else 0.5, abs=1e-3)


def test_a_window_of_no_length_cuts_at_once(pico: Any, tmp_path: Path, text: Tensor) -> None:
    wish = ("prune.sparsity=0.5", "prune.method=magnitude", "window=[0,0]")
    train(pico("llama"), tmp_path / "fade", text, *wish, "fade=march")
    train(pico("llama"), tmp_path / "cut", text, *wish, "schedule=one-shot")
    one, two = tensors_of(tmp_path / "fade"), tensors_of(tmp_path / "cut")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_killed_run_goes_on_fading(
    pico: Any, tmp_path: Path, text: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    wish = (*units_wish("march"), "window=[0.1,0.9]", "save_every=3")
    train(pico("llama"), tmp_path / "whole", text, *wish)
    write = Saved.write

    def dying(self: Saved, step: int, *rest: Any, **named: Any) -> None:
        write(self, step, *rest, **named)
        if step == 6:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Saved, "write", dying)
        with pytest.raises(Killed):
            train(pico("llama"), tmp_path / "out", text, *wish)
    state = load_file(
        tmp_path / "out.partial/llmprune/records/saved/00000006.safetensors"
    )  # in the middle of the window, where nothing is zero yet
    doomed = {key: keep for key, keep in state.items() if key.startswith("other.doomed:")}
    assert doomed and not any(key.startswith("other.model") for key in state)
    for key, keep in doomed.items():
        weight = state["param." + key.removeprefix("other.doomed:")]
        assert (~keep).any() and weight[~keep].all()
    train(pico("llama"), tmp_path / "out", text, *wish)
    one, two = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "out")
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(("model_type", "pattern"), [("llama", UNITS), ("gpt2", "ffn-channels")])
def test_what_has_faded_can_be_cut_out_exactly(
    model_type: str,
    pattern: str,
    pico: Any,
    stock: Any,
    tmp_path: Path,
    text: Tensor,
    tokens: Tensor,
) -> None:
    prune = {"pattern": pattern, "method": "magnitude-struct", "sparsity": 0.3}
    recover = {
        **{"prune": prune, "fade": "march", "steps": 12, "batch": 4, "learning_rate": 0.003},
        "seq_len": 16,
    }
    recipe = Recipe(
        **{"model": str(pico(model_type)), "out": str(tmp_path / "small"), "device": "cpu"},
        steps=[{"recover": recover}, {"prune": prune}, {"evaluate": {"perplexity": False}}],
    )
    report = run_recipe(recipe, Progress("quiet"), tokens=text)
    assert report is not None
    first = recipe.model_copy(update={"out": str(tmp_path / "masked"), "steps": recipe.steps[::2]})
    run_recipe(first, Progress("quiet"), tokens=text)
    masked, small = stock(tmp_path / "masked"), stock(tmp_path / "small")
    assert small.num_parameters() < masked.num_parameters()
    with torch.no_grad():
        one, two = (model(input_ids=tokens).logits for model in (masked, small))
    torch.testing.assert_close(one, two, atol=1e-5 * float(one.abs().max()), rtol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["fade=march"], "recover.fade: it is about masks that move"),
        (["prune.sparsity=0.5", "fade=pull"], "recover.fade: a pull is on whole units"),
        (["prune.sparsity=0.5", "fade=march", "regrow=rigl"], "recover.fade: it does not go with"),
        ([*units_wish("march", "ffn"), "prune.method=finercut"], "recover.fade: ffn go with their"),
        ([*units_wish("pull"), "options.lenght=1"], "'lenght' is no option of fade: pull"),
        ([*units_wish("pull"), "options.strength=-1"], "recover.options.strength: -1 is no length"),
        ([*units_wish("march"), "prune.method=flap"], "recover.prune.solver: bias-shift, which"),
        (
            ["prune.pattern=experts", "prune.sparsity=0.5"],
            "recover.prune.pattern: zeros cannot stand for experts",
        ),
        (
            ["prune.pattern=16x16", "prune.sparsity=0.5", "regrow=rigl"],
            "recover.regrow: it moves single weights",
        ),
    ],
)
def test_wrong_wishes_are_refused(
    settings: list[str], message: str, pico: Any, tmp_path: Path, text: Tensor
) -> None:
    with pytest.raises(LlmpruneError, match=message):
        train(pico("llama"), tmp_path / "out", text, *settings)
    assert list(tmp_path.iterdir()) == []
