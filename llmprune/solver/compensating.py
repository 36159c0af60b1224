"""The rows of the table of compensations: which statistics each reads, and how it is called."""

from __future__ import annotations

from torch import Tensor

from llmprune.solver.compensation import fit_columns, fit_with_bias, mean_bias
from llmprune.solver.types import Compensated, Settings
from llmprune.stats.types import Stats


def fitted(weight_OI: Tensor, stats: Stats, keep_I: Tensor, settings: Settings) -> Compensated:
    """Return the columns that stay, fitted to what all columns gave."""
    return Compensated(fit_columns(weight_OI, stats["gram"], keep_I, settings.damping))


def shifted(weight_OI: Tensor, stats: Stats, keep_I: Tensor, settings: Settings) -> Compensated:
    """Return the columns that stay as they are, and the mean of what went as a bias."""
    kept_OI = weight_OI * keep_I.to(weight_OI)
    return Compensated(kept_OI, mean_bias(weight_OI, stats["col_mean"], keep_I))


def fitted_with_bias(
    weight_OI: Tensor, stats: Stats, keep_I: Tensor, settings: Settings
) -> Compensated:
    """Return the fit of the columns that stay together with a bias."""
    found = fit_with_bias(
        *(weight_OI, stats["gram"], stats["col_mean"], stats.num_tokens, keep_I),
        damping=settings.damping,
    )
    return Compensated(*found)
