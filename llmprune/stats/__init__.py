"""What calibration learns: accumulators of sums over tokens, by the name of the statistic."""

from __future__ import annotations

from llmprune.base.registry import Registry
from llmprune.stats.gradients import (
    gradient_magnitudes,
    gradient_squares,
    gradient_sum,
    region_squares,
)
from llmprune.stats.gram import GramMatrix
from llmprune.stats.moments import ColumnMagnitudes, ColumnMeans, ColumnSquares, ColumnVariances
from llmprune.stats.residual import ResidualSums
from llmprune.stats.routing import ROUTING, RoutingSums
from llmprune.stats.types import Statistic

STATISTICS: Registry[Statistic] = Registry(
    "statistic",
    {
        "col_sq": Statistic(accumulator=ColumnSquares, observe="tap", shape="(I,)"),
        "col_mean": Statistic(accumulator=ColumnMeans, observe="tap", shape="(I,)"),
        "col_var": Statistic(accumulator=ColumnVariances, observe="tap", shape="(I,)", itemsize=16),
        "col_abs": Statistic(accumulator=ColumnMagnitudes, observe="tap", shape="(I,)"),
        "gram": Statistic(accumulator=GramMatrix, observe="tap", shape="(I, I)", itemsize=4),
        "grad_sum": Statistic(
            accumulator=gradient_sum, observe="backward", shape="(O, I)", itemsize=4
        ),
        "grad_abs": Statistic(
            accumulator=gradient_magnitudes, observe="backward", shape="(O, I)", itemsize=4
        ),
        "grad_sq": Statistic(
            accumulator=gradient_squares, observe="backward", shape="(O, I)", itemsize=4
        ),
        "residual": Statistic(accumulator=ResidualSums, observe="residual", shape="(4,)"),
        **{
            name: Statistic(accumulator=RoutingSums, observe="routing", shape="(E,)")
            for name in ROUTING
        },
        "region_sq": Statistic(
            accumulator=region_squares, observe="block_gradient", shape="(O, I)", itemsize=4
        ),
    },
)
