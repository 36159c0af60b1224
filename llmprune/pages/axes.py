"""Axes of charts: which numbers are marked, how they are written, and where values lie."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A range of values laid over a stretch of a drawing; by their logarithms, if `log`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def place(self, value: float) -> float:
        """Return where a value lies.

        >>> Axis(low=1, high=100, start=0, end=10, log=True).place(10)
        5.0
        """
        low, high, value = (math.log10(x) if self.log else x for x in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Return the numbers that are marked, all within the range."""
        return powers(self.low, self.high) if self.log else steps(self.low, self.high)


def axis_over(
    values: Iterable[float], start: float, end: float, *, log: bool = False, zero: bool = False
) -> Axis:
    """Return an axis that holds all values, with 0 if asked for; never one of no length."""
    found = [value for value in values if math.isfinite(value) and (value > 0 or not log)]
    found += [0.0] if zero and not log else []
    low, high = (min(found), max(found)) if found else (1.0, 1.0)
    if log:
        low, high = (low, high) if low < high else (low / 10, high * 10)
        if math.log10(high / low) < 1:
            low, high = 10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high))
    elif low == high:
        low, high = (low - 0.5, high + 0.5) if not zero or low else (0.0, 1.0)
        low = 0.0 if zero and low > 0 else low
    else:
        room = 0.04 * (high - low)
        low = low if zero and low == 0 else low - room
        high = high if zero and high == 0 else high + room
    return Axis(low=low, high=high, start=start, end=end, log=log)


def steps(low: float, high: float, most: int = 5) -> list[float]:
    """Return round numbers of equal distance (1, 2 or 5 times a power of ten) within a range.

    >>> steps(0.0, 1.0)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    digits = max(0, -math.floor(math.log10(step)))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, digits) for number in range(first, last + 1)]


def powers(low: float, high: float, most: int = 6) -> list[float]:
    """Return powers of ten within a range, equally far apart.

    >>> powers(0.5, 200.0)
    [1.0, 10.0, 100.0]
    """
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    stride = max(1, math.ceil((last - first + 1) / most))
    return [10.0**power for power in range(first, last + 1) if power % stride == 0]


def short(value: float) -> str:
    """Return a number in few characters.

    >>> short(0.25), short(12345.0), short(1e-7), short(2e9)
    ('0.25', '12345', '1e-7', '2e9')
    """
    if value and not 1e-3 <= abs(value) < 1e6:
        mantissa, _, power = f"{value:.2g}".partition("e")
        return f"{mantissa}e{int(power)}" if power else mantissa
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
