"""The packed masks of a result, read by linear; names are those of modules, not of disk tensors."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmprune.checkpoint.sink import hash_file
from llmprune.checkpoint.source import read_json
from llmprune.mask.packed import unpack

if TYPE_CHECKING:
    from torch import Tensor

OWN = "llmprune"
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)")


class MaskFiles:
    """The packed masks of a folder, by linear; absent for folders that llmprune did not write."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / OWN
        path = self.folder / "masks.json"
        content = read_json(path) if path.exists() else {}
        self.index: dict[str, Any] = content.get("masks", {})
        self.touched: set[str] = set(content.get("touched", ()))
        self.blocks: list[int] | None = content.get("blocks")
        self.lost: list[str] = content.get("lost", [])

    def fingerprint(self) -> str | None:
        """Return a hash of all masks; None where there are none."""
        if not self.index:
            return None
        files = sorted(self.folder.glob("masks*"))
        return hashlib.sha256("".join(map(hash_file, files)).encode()).hexdigest()

    def origins(self, names: Iterable[str]) -> dict[str, str]:
        """Return what each tensor is called in the source, whose blocks may have other numbers.

        The first number in a name is that of its block.
        """
        if self.blocks is None or self.blocks == list(range(len(self.blocks))):
            return {name: name for name in names}
        blocks = self.blocks
        return {name: NUMBER.sub(lambda n: str(blocks[int(n[0])]), name, count=1) for name in names}

    def may_lack(self, name: str) -> bool:
        """Tell whether a tensor of the source is one that was to go."""
        return name in self.lost

    def of_block(self, prefix: str) -> dict[str, Tensor]:
        """Return keep_OI of every masked linear of a block."""
        from safetensors import safe_open

        rows = {name: row for name, row in self.index.items() if name.startswith(prefix)}
        found = {}
        for file in sorted({row["file"] for row in rows.values()}):
            with safe_open(str(self.folder / Path(file).name), "pt") as handle:
                for name, row in rows.items():
                    if row["file"] == file:
                        found[name] = unpack(handle.get_tensor(name), tuple(row["shape"]))
        return found
