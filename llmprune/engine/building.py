"""The modules of a result, built on meta from its config.json and code: no weight is read."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmprune.arch.resize import NUM_BLOCKS, as_mistral
from llmprune.arch.types import Family
from llmprune.base.errors import CheckpointError, UnsupportedModel, WontLoad, first_line
from llmprune.checkpoint.skeleton import Skeleton, build_skeleton, read_config
from llmprune.delivery.copied_code import code_in_scratch

if TYPE_CHECKING:
    import torch


def explicit(config: Mapping[str, Any], built: Any, num_blocks: int) -> dict[str, Any]:
    """Return a config.json that spells out what it leaves to defaults: the number of blocks, and
    lists per block."""
    known = built.to_dict()
    counted = any(name in config for name in NUM_BLOCKS)
    listed = {
        name: value
        for name, value in known.items()
        if name not in config
        and (
            (isinstance(value, list) and len(value) == num_blocks > 1)
            or (name in NUM_BLOCKS and value == num_blocks and not counted)
        )
    }
    return {**config, **listed}


def as_named(sizes: Mapping[str, Any], base: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """Return sizes under the names that a config.json has for them, all of those that are one."""
    aliases = getattr(config, "attribute_map", {})
    found: dict[str, Any] = {}
    for key, size in sizes.items():
        names = {key, aliases.get(key, key), *(a for a, own in aliases.items() if own == key)}
        found |= dict.fromkeys(sorted(names & base.keys()) or [key], size)
    return found


def build_or_twin(
    source: Skeleton,
    config: dict[str, Any],
    code: Sequence[Path],
    dtype: torch.dtype,
    trust_remote_code: bool,
) -> tuple[dict[str, Any], Skeleton]:
    """Return the config and the modules of it.

    A Llama has no number of heads that does not divide the hidden size; a Mistral is the same model
    and has, where there are no biases.
    """
    try:
        return config, build_result(
            source, config, code, dtype, trust_remote_code, family=source.family
        )
    except WontLoad:
        plain = not (config.get("attention_bias") or config.get("mlp_bias"))
        if config.get("model_type") != "llama" or not plain or code:
            raise
    twin = as_mistral(config)
    return twin, build_result(source, twin, code, dtype, trust_remote_code, family=source.family)


def build_result(
    source: Skeleton,
    config: Mapping[str, Any],
    code: Sequence[Path],
    dtype: torch.dtype,
    trust_remote_code: bool,
    *,
    family: Family | None = None,
) -> Skeleton:
    """Build the modules of a result on meta from its config.json and code.

    Where no `family` is given, it is found as that of any model is.

    Raises:
        WontLoad: the config is refused by the family's own checks.
    """
    with tempfile.TemporaryDirectory(prefix="llmprune-") as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(dict(config)), encoding="utf-8")
        for path in code or _own_code(source, config):
            shutil.copyfile(path, folder / path.name)
        trust = trust_remote_code or bool(code)
        try:
            with code_in_scratch():
                return build_skeleton(
                    read_config(folder, trust_remote_code=trust),
                    dtype=dtype,
                    attention=source.config._attn_implementation,
                    trust_remote_code=trust,
                    family=family,
                )
        except (CheckpointError, UnsupportedModel, ValueError, RuntimeError) as error:
            raise WontLoad(
                f"a {config.get('model_type')} model of these sizes does not exist: "
                f"{first_line(error).replace(str(folder), 'the new config')}. Choose other "
                "counts, another --pattern, or --set prune.form=masked."
            ) from error


def _own_code(source: Skeleton, config: Mapping[str, Any]) -> list[Path]:
    """Return the code that a source brings beside its weights, which its result needs too."""
    origin = Path(str(source.config._name_or_path))
    return sorted(origin.glob("*.py")) if config.get("auto_map") and origin.is_dir() else []
