"""Hidden states between blocks: one tensor per micro-batch, on the device, on the host or on disk.

Legend: B sequences of a micro-batch, T tokens, D hidden size.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Place = Literal["device", "host", "disk"]


class HiddenStates:
    """A list of hidden_BTD whose items live where the budget put them; written in place."""

    def __init__(self, place: Place, folder: Path | None = None) -> None:
        if (place == "disk") != (folder is not None):
            raise ValueError(f"place {place!r} and folder {folder} contradict each other")
        self.place = place
        self._folder = folder
        self._items: list[Tensor] = []

    def __len__(self) -> int:
        return len(self._items)

    def append(self, hidden_BTD: Tensor) -> None:
        """Add a micro-batch; its dtype and shape stay."""
        if self._folder is not None:
            stored = self._map(len(self._items), hidden_BTD)
            stored.copy_(hidden_BTD)
        else:
            stored = hidden_BTD if self.place == "device" else _on_host(hidden_BTD)
        self._items.append(stored)

    def get(self, index: int, device: torch.device) -> Tensor:
        """Return a micro-batch on a device."""
        return self._items[index].to(device, non_blocking=True)

    def set(self, index: int, hidden_BTD: Tensor) -> None:
        """Replace a micro-batch by one of the same shape."""
        self._items[index].copy_(hidden_BTD)

    def beside(self, name: str) -> HiddenStates:
        """Return an empty list in the same place; on disk in a folder `name` of its own."""
        return HiddenStates(self.place, self._folder and self._folder / name)

    def close(self) -> None:
        """Free everything, files included."""
        self._items.clear()
        if self._folder is not None:
            for path in self._folder.glob("hidden-*.bin"):
                path.unlink()
            with suppress(OSError):  # others may keep files there
                self._folder.rmdir()

    def _map(self, index: int, like: Tensor) -> Tensor:
        """Return a tensor whose memory is a file of its own."""
        import torch

        assert self._folder is not None
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"hidden-{index:05d}.bin"
        flat = torch.from_file(str(path), shared=True, size=like.numel(), dtype=like.dtype)
        return flat.view(like.shape)


def _on_host(value: Tensor) -> Tensor:
    """Return a tensor on the host; what comes from CUDA in pinned memory, which copies overlap."""
    return value.cpu().pin_memory() if value.is_cuda else value.cpu()
