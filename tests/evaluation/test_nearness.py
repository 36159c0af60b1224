"""KL beside the loss in one walk: by hand, and by whole models in memory."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from llmprune.checkpoint.locate import open_source
from llmprune.engine.opening import open_blocks
from llmprune.evaluation import nearness, perplexity
from llmprune.evaluation.nearness import keep_dense, ratio_of_sums
from llmprune.evaluation.windows import IGNORED, Windows, next_tokens
from llmprune.recipe import build
from llmprune.walk.streamed import Streamed


@pytest.fixture(scope="module")
def wide(pico: Any) -> Streamed:
    return _opened(pico("llama"))


@pytest.fixture(scope="module")
def other(pico: Any, tmp_path_factory: pytest.TempPathFactory) -> Streamed:
    """The same model with other weights: every parameter is turned towards noise."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(pico("llama"))
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.3 * value.std() * torch.randn(value.shape, generator=draw))
    folder = tmp_path_factory.mktemp("other")
    model.save_pretrained(folder)
    return _opened(folder)


def _opened(folder: Path) -> Streamed:
    recipe = build({"model": str(folder), "steps": [{"prune": {"sparsity": 0.5}}]})
    return open_blocks(open_source(str(folder)), recipe, torch.device("cpu"), torch.float32)


def windows(num: int = 5, seq_len: int = 12) -> Windows:
    draw = torch.Generator().manual_seed(0)
    inputs_NT = torch.randint(1, 50, (num, seq_len), generator=draw)
    return Windows(inputs_NT, next_tokens(inputs_NT))


def test_a_ratio_of_sums_and_its_error_by_hand() -> None:
    assert ratio_of_sums([2.0, 6.0], [2, 2]) == (2.0, 1.0)  # means 1 and 3: 1.414 / sqrt(2)
    mean, error = ratio_of_sums([1.0, 2.0, 9.0], [1, 2, 3])
    assert mean == 2.0
    assert error == pytest.approx(math.sqrt(3 / 2 * (1 + 4 + 9)) / 6)
    assert ratio_of_sums([3.0], [2]) == (1.5, None)


def test_loss_and_kl_are_those_of_whole_models(
    wide: Streamed, other: Streamed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = windows()
    asked.targets_NT[1, :7] = IGNORED  # as a stride leaves it
    monkeypatch.setattr("llmprune.walk.forward.LOGITS", 500)  # several chunks of positions
    monkeypatch.setattr(perplexity, "HIDDEN_BYTES", 1)  # a walk for each micro-batch
    loss = keep_dense(wide, asked, tmp_path, micro_batch=2)
    assert loss == perplexity.loss_of_blocks(wide, *asked, micro_batch=2)
    found = nearness.measure_nearness(other, asked, wide, tmp_path, micro_batch=2)
    assert (found.nats, found.count) == perplexity.loss_of_blocks(other, *asked, micro_batch=2)

    dense_NTV, other_NTV = (_log_probs(side, asked.inputs_NT) for side in (wide, other))
    means, sums, counts = [], [], []
    for row, wanted in enumerate(asked.targets_NT.tolist()):
        each = [
            sum(
                math.exp(p) * (p - q)
                for p, q in zip(
                    dense_NTV[row, at].tolist(), other_NTV[row, at].tolist(), strict=True
                )
            )
            for at, target in enumerate(wanted)
            if target != IGNORED
        ]
        means += each
        sums.append(sum(each))
        counts.append(len(each))
    assert found.kl == pytest.approx(sum(means) / len(means), rel=1e-4)
    assert found.kl > 1e-3
    assert found.stderr == pytest.approx(ratio_of_sums(sums, counts)[1], rel=1e-3)


def test_a_model_is_no_distance_from_itself(wide: Streamed, tmp_path: Path) -> None:
    keep_dense(wide, windows(1), tmp_path)
    found = nearness.measure_nearness(wide, windows(1), wide, tmp_path)
    assert found.kl == 0.0 and found.stderr is None


def _log_probs(side: Streamed, ids_NT: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(side.source.folder)
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids_NT).logits.double().log_softmax(dim=-1)
    return found
