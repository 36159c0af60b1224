"""Before any weight is read: a family that cannot be walked is refused, whatever the method."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmprune import api
from llmprune.base.errors import UnsupportedModel
from llmprune.checkpoint.source import Source

Pico = Callable[..., Path]
MakeModel = Callable[..., Any]


@pytest.fixture
def unwalkable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every miniature differ from its walk."""

    def refuse(*args: Any, **options: Any) -> None:
        raise UnsupportedModel("cannot be walked block by block")

    def forbidden(self: Source, names: object) -> None:
        raise AssertionError(f"{names} were read")

    monkeypatch.setattr("llmprune.engine.opening.check_replay", refuse)
    monkeypatch.setattr(Source, "get", forbidden)


@pytest.mark.parametrize("method", ["magnitude", "lamp", "wanda"])
def test_a_folder_is_refused_before_a_weight_is_read(
    method: str, pico: Pico, tmp_path: Path, tokens: Tensor, unwalkable: None
) -> None:
    """Also where no text is needed: the gate walks the result."""
    with pytest.raises(UnsupportedModel, match="walked"):
        api.prune(pico("llama"), sparsity=0.5, method=method, calib=tokens, out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_inspect_refuses_what_cannot_be_pruned(pico: Pico, unwalkable: None) -> None:
    with pytest.raises(UnsupportedModel, match="walked"):
        api.inspect(pico("llama"))


def test_a_model_in_memory_is_refused_where_its_statistics_would_be_wrong(
    make_model: MakeModel, tokens: Tensor, unwalkable: None
) -> None:
    model = make_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UnsupportedModel, match="walked"):
        api.prune(model, sparsity=0.5, calib=tokens, quiet=True)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert api.prune(model, sparsity=0.5, method="magnitude", quiet=True).sparsity == 0.5


def test_blocks_in_memory_that_share_a_parameter_are_refused(
    make_model: MakeModel, tokens: Tensor
) -> None:
    model = make_model("llama")
    shared: nn.Module = model.model.layers[0].mlp
    model.model.layers[1].mlp = shared
    with pytest.raises(UnsupportedModel, match=r"blocks 0 and 1 .* share 'mlp"):
        api.prune(model, sparsity=0.5, calib=tokens, quiet=True)
