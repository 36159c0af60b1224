"""What calibration learns: accumulators of sums over tokens, by the name of the statistic."""

from __future__ import annotations

from llmprune.base.registry import Registry
from llmprune.stats.moments import ColumnSquares
from llmprune.stats.types import Statistic

STATISTICS: Registry[Statistic] = Registry(
    "statistic",
    {"col_sq": Statistic(accumulator=ColumnSquares, observe="tap", shape="(I,)")},
)
