"""What a measurement of speed found: repetitions, ratios in pairs, and a table to read."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Any

from llmprune.base.progress import human_bytes, human_count
from llmprune.base.text import columns

RESTLESS = 1.5  # of repetitions that should be equal, the highest over the lowest
HEAD = ("", "batch", "prefill tokens/s", "decode tokens/s", "first token ms", "memory")


@dataclass(frozen=True)
class Spread:
    """The same quantity in every repetition, in the order measured.

    >>> Spread((3.0, 1.0, 2.0)).median
    2.0
    """

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.values)

    @property
    def unrest(self) -> float:
        """Return how many times the lowest goes into the highest."""
        return max(self.values) / min(self.values)

    def text(self, digits: int = 3) -> str:
        """Return the median, and the lowest and highest in brackets."""
        return f"{_short(self.median, digits)} {self.range(digits)}"

    def range(self, digits: int = 3) -> str:
        return f"({_short(min(self.values), digits)}..{_short(max(self.values), digits)})"

    def over(self, other: Spread) -> Spread:
        """Return the ratio of every repetition to the one of `other` beside it."""
        return Spread(tuple(a / b for a, b in zip(self.values, other.values, strict=True)))

    def to_dict(self) -> dict[str, Any]:
        low, high = min(self.values), max(self.values)
        return {"median": self.median, "low": low, "high": high, "values": list(self.values)}


@dataclass(frozen=True, kw_only=True)
class Speed:
    """One batch size: tokens per second of all its sequences, seconds to the first token, bytes.

    `memory` is the peak of weights, cache and activations: what torch has allocated on CUDA, and
    elsewhere the bytes of the weights and by how much the process grew on top.
    """

    batch: int
    prefill: Spread
    decode: Spread
    first_token: Spread
    memory: int

    def row(self, name: str) -> tuple[str, ...]:
        """Return the line of this batch size in the table."""
        milliseconds = Spread(tuple(1000 * value for value in self.first_token.values))
        rates = self.prefill.text(), self.decode.text(), milliseconds.text()
        return (name, str(self.batch), *rates, human_bytes(self.memory))

    def to_dict(self) -> dict[str, Any]:
        spreads = ("prefill", "decode", "first_token")
        found = {name: getattr(self, name).to_dict() for name in spreads}
        return {"batch": self.batch, **found, "memory": self.memory}


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A model that was measured: its size, what it ran on, and a `Speed` per batch size."""

    name: str
    num_params: int
    file_bytes: int
    dtype: str
    device: str
    threads: int | None
    speeds: tuple[Speed, ...]

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "speeds": [speed.to_dict() for speed in self.speeds]}


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What `bench` measured. Ratios are of speeds: above 1 the model is faster than `against`."""

    model: Measured
    against: Measured | None
    prompt: int
    new: int
    repeat: int
    hint: str | None = None

    def ratios(self) -> dict[int, dict[str, Spread]]:
        """Return by batch size how many times faster the model is, for every pair of repetitions.

        A model and the one beside it run one right after the other; the median of these ratios is
        the answer, which a drift of the clock or a visitor on the machine moves little.
        """
        if self.against is None:
            return {}
        pairs = zip(self.model.speeds, self.against.speeds, strict=True)
        return {
            own.batch: {
                "prefill": own.prefill.over(other.prefill),
                "decode": own.decode.over(other.decode),
                "first token": other.first_token.over(own.first_token),
            }
            for own, other in pairs
        }

    def sizes(self) -> dict[str, float]:
        """Return the model's share of the other's file and parameters."""
        if self.against is None:
            return {}
        return {
            "file": self.model.file_bytes / self.against.file_bytes,
            "parameters": self.model.num_params / self.against.num_params,
        }

    def table(self) -> str:
        """Return rows per batch size, then the ratios, then what all of it means."""
        sides = [side for side in (self.against, self.model) if side is not None]
        head = ("", "dtype", "parameters", "file")
        facts = [
            (side.name, side.dtype, human_count(side.num_params), human_bytes(side.file_bytes))
            for side in sides
        ]
        rows = [
            side.speeds[place].row(side.name)
            for place in range(len(self.model.speeds))
            for side in sides
        ]
        lines = [columns(head, facts), "", columns(HEAD, rows), "", *self._compared()]
        return "\n".join([*lines, *self._doubt(), self.protocol])

    def _doubt(self) -> list[str]:
        """Return a warning where repetitions of one thing differ much."""
        sides = [side for side in (self.against, self.model) if side is not None]
        speeds = [speed for side in sides for speed in side.speeds]
        worst = max(spread.unrest for s in speeds for spread in (s.prefill, s.decode))
        if worst < RESTLESS:
            return []
        return [
            f"repetitions of the same work differ {worst:.1f} x: the machine is busy with other "
            "things. Measure again when it is calm, or with a higher --repeat.",
            "",
        ]

    def _compared(self) -> list[str]:
        """Return a line per batch size that sets the model against the other."""
        if self.against is None:
            return [self.hint, ""] if self.hint else []
        lines = []
        memory = zip(self.model.speeds, self.against.speeds, strict=True)
        for (batch, ratios), (own, other) in zip(self.ratios().items(), memory, strict=True):
            parts = [verdict(name, ratio) for name, ratio in ratios.items()]
            parts.append(f"memory {own.memory / other.memory:.2f} x")
            lines.append(f"batch {batch}: " + "; ".join(parts))
        lines.append("; ".join(f"{name} {share:.2f} x" for name, share in self.sizes().items()))
        if self.model.dtype != self.against.dtype:
            lines.append(
                f"{self.model.dtype} beside {self.against.dtype}: a part of the difference is the "
                "dtype's. --dtype makes them equal."
            )
        return [*lines, ""]

    @property
    def protocol(self) -> str:
        """Return how it was measured: numbers of unequal protocols do not compare."""
        threads = f", {self.model.threads} threads" if self.model.threads else ""
        pairs = ", the models in turn; ratios are medians of pairs" if self.against else ""
        return (
            f"medians of {self.repeat} repetitions (lowest..highest){pairs}; {self.prompt} prompt "
            f"tokens, then {self.new} decoded one by one with the cache; {self.model.device}"
            f"{threads}. memory: weights, cache and activations at their peak"
        )

    def to_dict(self) -> dict[str, Any]:
        ratios = {
            str(batch): {name: ratio.to_dict() for name, ratio in found.items()}
            for batch, found in self.ratios().items()
        }
        return {
            "model": self.model.to_dict(),
            "against": self.against.to_dict() if self.against else None,
            "ratios": ratios,
            "sizes": self.sizes(),
            "prompt": self.prompt,
            "new": self.new,
            "repeat": self.repeat,
            "hint": self.hint,
        }

    def __repr__(self) -> str:
        return self.table()


def verdict(name: str, ratio: Spread) -> str:
    """Return a ratio of speeds in words: a loss is called one, and so is what the spread hides.

    >>> verdict("decode", Spread((0.9, 0.95, 0.96)))
    'decode 0.95 x (0.90..0.96), slower than dense'
    """
    low, high, value = min(ratio.values), max(ratio.values), round(ratio.median, 2)
    text = f"{name} {ratio.median:.2f} x ({low:.2f}..{high:.2f})"
    if value < 1:
        text += ", slower than dense"
    if low <= 1 <= high:
        text += ", within the spread"
    return text


def _short(value: float, digits: int) -> str:
    """Return a number with so many digits that count, and never in powers of ten.

    >>> _short(1234.5, 3), _short(0.98765, 3)
    ('1234', '0.988')
    """
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:.0f}"
    return f"{value:#.{digits}g}".rstrip(".")
