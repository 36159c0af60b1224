"""What a score of whole units sees: every linear that a unit owns a part of, unit by unit.

Legend: O outputs, I inputs, U units of the site, N values that one unit owns of a linear.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from llmprune.arch.types import Span
from llmprune.stats.types import Stats


class Member(NamedTuple):
    """One span of a site: its linear's weight_OI and what is known of that linear.

    `stats` joins the statistics of the tap that the linear reads with its gradients, as far as a
    score's `needs` name them.
    """

    span: Span
    weight_OI: Tensor
    stats: Stats

    @property
    def reads_units(self) -> bool:
        """Tell whether the units are columns of this linear, as in an output projection."""
        return self.span.axis == "in"

    def by_unit(self, values_OI: Tensor, num_units: int) -> Tensor:
        """Return values_UN: what each unit owns of a matrix shaped like the weight.

        A span of the axis "all" belongs to one unit; its values are one row, (1, N). Values of
        several rows or columns lie one line after the other.

        Raises:
            ValueError: the linear has fewer rows or columns than the units own.

        >>> import torch
        >>> span = Span(linear="o", axis="in", width=2)
        >>> member = Member(span, torch.arange(4.0)[None], Stats(num_tokens=0, values={}))
        >>> member.by_unit(member.weight_OI, 2)
        tensor([[0., 1.],
                [2., 3.]])
        """
        if self.span.axis == "all":
            return values_OI.reshape(1, -1)
        place = self.place(num_units)
        owned = values_OI[place] if self.span.axis == "out" else values_OI[:, place].T
        return owned.reshape(num_units, -1)

    def columns(self, values_I: Tensor, num_units: int) -> Tensor:
        """Return values_UW of the columns that each unit owns; for a linear that reads units.

        Raises:
            ValueError: the linear has fewer columns than the units own.
        """
        return values_I[self.place(num_units)].reshape(num_units, -1)

    def place(self, num_units: int) -> slice:
        """Return which rows ("out") or columns ("in") of the linear the units own.

        Raises:
            ValueError: the linear has fewer.
        """
        found = self.weight_OI.shape[0 if self.span.axis == "out" else 1]
        stop = self.span.offset + num_units * self.span.width
        if stop > found:
            raise ValueError(
                f"{num_units} units of width {self.span.width} reach to {stop} on the axis "
                f"{self.span.axis!r} of {self.span.linear}, which has {found}"
            )
        return slice(self.span.offset, stop)


@dataclass(frozen=True, kw_only=True)
class UnitScore:
    """One row of the table of scores that judge whole units, with all their members at once.

    `fn(members, num_units, **options)` returns unit_score_U, float32 or wider, higher = keep, and
    changes no argument. `needs` names what it reads of the members' statistics: of the one that
    reads the units or, with `everywhere`, of all. `trained` says that it reads gates, the statistic
    `gate` of the reader, which are learnt before the first cut.
    """

    fn: Callable[..., Tensor]
    needs: tuple[str, ...]
    paper: str
    everywhere: bool = False
    trained: bool = False
    options: Mapping[str, float] = field(default_factory=dict)

    @property
    def learnt(self) -> tuple[str, ...]:
        """Return the statistics that must be learnt from tokens."""
        return self.needs


def reader_of(members: Sequence[Member]) -> Member:
    """Return the member that reads the units as columns.

    Raises:
        ValueError: none does, as where a unit is a whole linear.
    """
    for member in members:
        if member.reads_units:
            return member
    named = ", ".join(f"{member.span.linear} ({member.span.axis})" for member in members)
    raise ValueError(f"no linear reads these units as columns: {named or 'no members'}")
