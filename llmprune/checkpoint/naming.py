"""Disk names and module names: the only file that touches transformers' conversion internals.

A checkpoint may store other names and other shapes than the modules have (experts one by one
instead of stacked). `Naming` holds which disk tensor goes into which parameter, and converts both
ways.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llmprune.base.errors import UnsupportedModel

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Naming:
    """Disk name -> parameter; `pattern` is set for tensors that are merged or split on load."""

    model: Any = field(repr=False)
    target: Mapping[str, str]
    pattern: Mapping[str, str | None]
    converters: Mapping[str, Any] = field(repr=False)

    def disk_names(self, prefix: str) -> list[str]:
        """Return the disk tensors of a block, sorted."""
        return sorted(name for name, param in self.target.items() if param.startswith(prefix))

    def disk_names_of(self, params: Iterable[str]) -> set[str]:
        """Return the disk tensors that make up these parameters."""
        wanted = set(params)
        return {name for name, param in self.target.items() if param in wanted}

    def to_params(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert disk tensors into parameters by module name; plain tensors pass untouched."""
        from transformers.core_model_loading import dot_natural_key

        found: dict[str, Tensor] = {}
        jobs: dict[str, Any] = {}
        for name in sorted(tensors, key=dot_natural_key):
            pattern = self.pattern[name]
            if pattern is None:
                found[self.target[name]] = tensors[name]
            else:
                job = jobs.setdefault(self.target[name], deepcopy(self.converters[pattern]))
                job.add_tensor(self.target[name], name, pattern, tensors[name])
        for first, job in jobs.items():
            for param, value in job.convert(
                first, model=self.model, config=self.model.config
            ).items():
                found[param] = value[0] if isinstance(value, list) else value
        return found

    def to_disk(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert parameters back into disk tensors.

        Raises:
            UnsupportedModel: the conversion yields names that the checkpoint does not have.
        """
        plain = {
            self.target[name]: name for name, pattern in self.pattern.items() if pattern is None
        }
        found = {plain[param]: tensor for param, tensor in params.items() if param in plain}
        rest = {param: tensor for param, tensor in params.items() if param not in plain}
        if rest:
            found |= split_for_disk(self.model, rest)
        if strange := sorted(found.keys() - self.target.keys()):
            raise UnsupportedModel(
                f"writing {strange[0]} would add a tensor that the checkpoint does not have: its "
                "names follow an older layout. Load and save it once with transformers, then prune "
                "the copy."
            )
        return found


def result_names(
    naming: Naming, result: Any, param: str, origin: str | None
) -> dict[str, tuple[int, ...]]:
    """Return the names that a parameter of a result is stored under, with the shapes of the parts.

    `origin` is the parameter of the source that it comes from: the name follows that one's, blocks
    renumbered. One that the source lacks, or that transformers merges on load, is named as
    transformers stores it.
    """
    owner, _, leaf = param.rpartition(".")
    value = getattr(result.get_submodule(owner), leaf)
    stored = sorted(naming.disk_names_of([origin])) if origin is not None else []
    if len(stored) == 1 and naming.pattern[stored[0]] is None:
        return {moved(stored[0], str(origin), param): tuple(value.shape)}
    return {
        name: tuple(part.shape) for name, part in split_for_disk(result, {param: value}).items()
    }


def moved(name: str, origin: str, param: str) -> str:
    """Return a stored name with the number of its block changed as that of its parameter was.

    >>> moved("h.7.attn.weight", "transformer.h.7.attn.weight", "transformer.h.5.attn.weight")
    'h.5.attn.weight'
    """
    before, after = origin.split("."), param.split(".")
    place = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), None)
    if place is None:
        return name
    parts = name.split(".")
    at = parts.index(before[place])
    return ".".join([*parts[:at], after[place], *parts[at + 1 :]])


def split_for_disk(model: Any, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return parameters as transformers stores them: what it merges on load is split again."""
    from transformers.core_model_loading import revert_weight_conversion

    found: dict[str, Tensor] = revert_weight_conversion(model, dict(params))
    return found


def naming_of(model: Any, disk_names: Iterable[str]) -> tuple[Naming, tuple[str, ...]]:
    """Map tensors on disk to the parameters of a (meta) model; also return those it does not use.

    Raises:
        UnsupportedModel: the installed transformers lacks the conversion functions.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            rename_source_key,
        )
    except ImportError as error:
        raise UnsupportedModel(
            f"this transformers has no {error.name} with the functions that map checkpoint names; "
            "install a supported release: pip install 'transformers>=5.17,<6'."
        ) from error
    mapping = get_model_conversion_mapping(model)
    renamings = [row for row in mapping if isinstance(row, WeightRenaming)]
    converters = [row for row in mapping if isinstance(row, WeightConverter)]
    params = model.state_dict()
    target: dict[str, str] = {}
    pattern: dict[str, str | None] = {}
    unused = []
    for name in disk_names:
        for rename, convert in ((renamings, converters), ([], [])):
            param, found = rename_source_key(name, rename, convert, model.base_model_prefix, params)
            if param in params:
                target[name], pattern[name] = param, found
                break
        else:
            unused.append(name)
    by_pattern = {source: row for row in converters for source in row.source_patterns}
    return (
        Naming(model=model, target=target, pattern=pattern, converters=by_pattern),
        tuple(sorted(unused)),
    )
