"""Disk names to parameters and back, bit for bit, in every form a checkpoint may have."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmprune.base.errors import UnsupportedModel
from llmprune.checkpoint.locate import open_source
from llmprune.checkpoint.naming import Naming, naming_of
from llmprune.checkpoint.skeleton import Skeleton
from llmprune.checkpoint.source import SINGLE, Source

Pico = Callable[..., Path]
SkeletonOf = Callable[[Path], Skeleton]


def same_bits(left: Tensor, right: Tensor) -> bool:
    equal_form = left.dtype == right.dtype and left.shape == right.shape
    return equal_form and torch.equal(
        left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8)
    )


def open_naming(folder: Path, skeleton: Skeleton) -> tuple[Source, Naming]:
    source = open_source(str(folder))
    naming, unused = naming_of(skeleton.model, source.entries)
    assert unused == ()
    return source, naming


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_blocks_make_the_round_trip(
    pico: Pico,
    skeleton_of: SkeletonOf,
    stock: Callable[[Path], Any],
    model_type: str,
    tied: bool,
    sharded: bool,
) -> None:
    folder = pico(model_type, tied=tied, sharded=sharded)
    skeleton = skeleton_of(folder)
    source, naming = open_naming(folder, skeleton)
    expected = stock(folder).state_dict()
    seen: set[str] = set()
    for index in range(len(skeleton.blocks)):
        prefix = skeleton.prefix(index)
        names = naming.disk_names(prefix)
        tensors = source.get(names)
        params = naming.to_params(tensors)
        assert params.keys() == {prefix + name for name in skeleton.shapes(index)}
        for name, value in params.items():
            assert same_bits(value, expected[name]), name
        back = naming.to_disk(params)
        assert back.keys() == set(names)
        for name, value in back.items():
            assert same_bits(value, tensors[name]), name
        seen |= set(names)
    trunk = naming.disk_names_of(skeleton.trunk_params())
    assert seen | trunk == source.entries.keys() and not seen & trunk


def test_experts_are_merged_in_their_order(pico: Pico, skeleton_of: SkeletonOf) -> None:
    folder = pico("mixtral")
    source, naming = open_naming(folder, skeleton_of(folder))
    disk = "model.layers.1.block_sparse_moe.experts.{}.{}.weight"
    names = [disk.format(e, w) for e in range(4) for w in ("w1", "w2", "w3")]
    tensors = source.get(reversed(names))
    params = naming.to_params(tensors)
    gate_up = params["model.layers.1.mlp.experts.gate_up_proj"]
    for e in range(4):
        gate, up = tensors[disk.format(e, "w1")], tensors[disk.format(e, "w3")]
        assert same_bits(gate_up[e], torch.cat([gate, up]))
    assert naming.disk_names_of(["model.layers.1.mlp.experts.down_proj"]) == {
        disk.format(e, "w2") for e in range(4)
    }


def test_one_of_two_merged_parameters_can_be_written_alone(
    pico: Pico, skeleton_of: SkeletonOf
) -> None:
    folder = pico("mixtral")
    source, naming = open_naming(folder, skeleton_of(folder))
    param = "model.layers.0.mlp.experts.down_proj"
    names = naming.disk_names_of([param])
    tensors = source.get(names)
    back = naming.to_disk(naming.to_params(tensors))
    assert back.keys() == names
    assert all(same_bits(back[name], tensors[name]) for name in names)


def test_experts_that_are_stacked_on_disk_stay_so(
    make_model: Callable[..., Any], skeleton_of: SkeletonOf, tmp_path: Path
) -> None:
    model = make_model("mixtral")
    model.save_pretrained(tmp_path, save_original_format=False)
    source, naming = open_naming(tmp_path, skeleton_of(tmp_path))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    params = naming.to_params(source.get([name]))
    assert same_bits(params[name], model.get_parameter(name).data)
    assert naming.to_disk(params).keys() == {name}


def test_gpt2_without_its_prefix_is_understood(
    pico: Pico, skeleton_of: SkeletonOf, tmp_path: Path
) -> None:
    """The first GPT-2 checkpoints name `h.0.attn...` and carry the causal mask as a tensor."""
    original = pico("gpt2")
    folder = tmp_path / "old"
    shutil.copytree(original, folder)
    tensors = load_file(original / SINGLE)
    old = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    assert old.keys() != tensors.keys()
    save_file(old | {"h.0.attn.bias": torch.ones(1, 1, 4, 4)}, folder / SINGLE)
    skeleton = skeleton_of(folder)
    source = open_source(str(folder))
    naming, unused = naming_of(skeleton.model, source.entries)
    assert unused == ("h.0.attn.bias",)
    names = naming.disk_names("transformer.h.1.")
    params = naming.to_params(source.get(names))
    for name, value in params.items():
        assert same_bits(value, tensors[name]), name
    assert naming.to_disk(params).keys() == set(names)
    assert all(name.startswith("h.1.") for name in names)


def test_a_tensor_that_no_parameter_takes_is_told(pico: Pico, skeleton_of: SkeletonOf) -> None:
    model = skeleton_of(pico("llama")).model
    naming, unused = naming_of(model, ["model.norm.weight", "model.extra.weight"])
    assert unused == ("model.extra.weight",)
    assert set(naming.target) == {"model.norm.weight"}


def test_writing_a_name_that_was_not_there_is_refused(pico: Pico, skeleton_of: SkeletonOf) -> None:
    folder = pico("mixtral")
    source = open_source(str(folder))
    some = [name for name in source.entries if ".experts.3." not in name]
    naming, _ = naming_of(skeleton_of(folder).model, some)
    params = {"model.layers.0.mlp.experts.down_proj": torch.zeros(4, 32, 64)}
    with pytest.raises(UnsupportedModel, match=r"experts\.3\.w2\.weight would add a tensor"):
        naming.to_disk(params)
