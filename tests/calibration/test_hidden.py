"""Hidden states on the device, on the host and on disk behave alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llmprune.calibration.hidden import HiddenStates, Place

CPU = torch.device("cpu")
PLACES = pytest.mark.parametrize("place", ["device", "host", "disk"])


def batches(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 5, 3), (2, 5, 3), (1, 5, 3)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def store(place: Place, folder: Path) -> HiddenStates:
    return HiddenStates(place, folder if place == "disk" else None)


@PLACES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_was_put_comes_back(place: Place, dtype: torch.dtype, tmp_path: Path) -> None:
    hidden = store(place, tmp_path / "hidden")
    given = batches(dtype)
    for batch in given:
        hidden.append(batch.clone())
    assert len(hidden) == 3
    for index, batch in enumerate(given):
        assert hidden.get(index, CPU).dtype == dtype
        assert torch.equal(hidden.get(index, CPU), batch)
    hidden.set(1, given[1] * 2)
    found = [hidden.get(index, CPU) for index in range(3)]
    for value, expected in zip(found, [given[0], given[1] * 2, given[2]], strict=True):
        assert torch.equal(value, expected)


@PLACES
def test_a_batch_of_another_shape_is_refused(place: Place, tmp_path: Path) -> None:
    hidden = store(place, tmp_path)
    hidden.append(torch.zeros(2, 5, 3))
    with pytest.raises(RuntimeError):
        hidden.set(0, torch.zeros(2, 4, 3))


def test_files_are_gone_after_closing_and_others_stay(tmp_path: Path) -> None:
    (tmp_path / "other.bin").write_text("mine")
    hidden = store("disk", tmp_path)
    for batch in batches(torch.float32):
        hidden.append(batch)
    assert len(list(tmp_path.glob("hidden-*.bin"))) == 3
    hidden.close()
    assert [path.name for path in tmp_path.iterdir()] == ["other.bin"]
    assert len(hidden) == 0


def test_files_of_a_killed_run_do_not_matter(tmp_path: Path) -> None:
    (tmp_path / "hidden-00000.bin").write_bytes(b"\xff" * 10_000)
    hidden = store("disk", tmp_path)
    batch = batches(torch.float32)[0]
    hidden.append(batch)
    assert torch.equal(hidden.get(0, CPU), batch)


@pytest.mark.parametrize("arguments", [("disk", None), ("host", Path("x")), ("device", Path("x"))])
def test_place_and_folder_must_agree(arguments: Any) -> None:
    with pytest.raises(ValueError, match="contradict"):
        HiddenStates(*arguments)
