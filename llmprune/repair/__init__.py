"""What improves a whole block after the cut, by the name of the repair."""

from __future__ import annotations

from llmprune.base.registry import Registry
from llmprune.repair.adapters import ADAPTERS
from llmprune.repair.halves import BLOCK, HALVES
from llmprune.repair.mask_only import BILEVEL, JACKPOTS
from llmprune.repair.regional import REGIONAL
from llmprune.repair.types import Repair

REPAIRS: Registry[Repair] = Registry(
    "prune.repair",
    {
        "bilevel": BILEVEL,
        "block": BLOCK,
        "halves": HALVES,
        "jackpots": JACKPOTS,
        "masked-lora": ADAPTERS,
        "regional": REGIONAL,
    },
)
