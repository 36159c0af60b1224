"""The state of a training run on disk, from which it goes on with the same bytes.

    saved/00000100.safetensors   trained tensors, moments of the optimizer, masks that moved
    saved/00000100.json          written last, with the hash of the other

Two states are kept, so that one is whole whenever the other is being written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmprune.checkpoint.sink import hash_file, write_json, write_tensors
from llmprune.checkpoint.source import read_json

if TYPE_CHECKING:
    from torch import Tensor

KEPT = 2
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class Saved:
    """States of one training run in a folder."""

    folder: Path

    def write(
        self,
        step: int,
        params: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer,
        facts: Mapping[str, Any],
        others: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write what `step` finished steps have led to; older states go once this is whole."""
        tensors = {f"param.{name}": value.detach().cpu() for name, value in params.items()}
        counts = {}
        for name, param in params.items():
            state = optimizer.state.get(param, {})
            for moment in MOMENTS:
                if moment in state:
                    tensors[f"{moment}.{name}"] = state[moment].cpu()
            if "step" in state:
                counts[name] = float(state["step"])
        tensors |= {f"other.{name}": value.cpu() for name, value in (others or {}).items()}
        path = self.folder / f"{step:08d}.safetensors"
        write_tensors(path, tensors)
        content = {"step": step, "hash": hash_file(path), "counts": counts, **facts}
        write_json(path.with_suffix(".json"), content)
        for old in self._steps()[:-KEPT]:
            for suffix in (".json", ".safetensors"):
                (self.folder / f"{old:08d}{suffix}").unlink(missing_ok=True)

    def newest(self) -> dict[str, Any] | None:
        """Return what the newest whole state says; none where there is none."""
        for step in reversed(self._steps()):
            content = read_json(self.folder / f"{step:08d}.json")
            path = self.folder / f"{step:08d}.safetensors"
            if path.exists() and hash_file(path) == content["hash"]:
                return content
        return None

    def restore(
        self,
        content: Mapping[str, Any],
        params: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer,
    ) -> dict[str, Tensor]:
        """Put a state into trained tensors and the optimizer; return the others, by name."""
        from safetensors import safe_open

        others = {}
        path = self.folder / f"{content['step']:08d}.safetensors"
        with safe_open(str(path), "pt") as handle:
            names = set(handle.keys())
            for name, param in params.items():
                param.data.copy_(handle.get_tensor(f"param.{name}"))
                state = {
                    moment: handle.get_tensor(f"{moment}.{name}").to(param.device)
                    for moment in MOMENTS
                    if f"{moment}.{name}" in names
                }
                if name in content["counts"]:
                    state["step"] = torch.tensor(content["counts"][name])
                    optimizer.state[param] = state
            for name in names:
                kind, _, rest = name.partition(".")
                if kind == "other":
                    others[rest] = handle.get_tensor(name)
        return others

    def _steps(self) -> list[int]:
        return sorted(int(path.stem) for path in self.folder.glob("[0-9]*.json"))
