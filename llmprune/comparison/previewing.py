"""What a grid would do: every method and amount planned before anything runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

from llmprune.base.errors import LlmpruneError, RecipeError, UnknownName
from llmprune.base.progress import human_bytes, human_seconds
from llmprune.base.registry import near_match
from llmprune.base.text import columns, named_lines
from llmprune.calibration.presence import check_texts
from llmprune.checkpoint.locate import open_source
from llmprune.collecting import collected_bytes, names_of
from llmprune.comparison.grid import DENSE as COLLECTED
from llmprune.comparison.grid import (
    Cell,
    Grid,
    check_grid,
    listed,
    shares,
    whole_numbers,
)
from llmprune.comparison.rows import AXES, PERPLEXITY
from llmprune.comparison.writing import statistics_text
from llmprune.engine.collected import check_additive
from llmprune.engine.opening import Opened, open_plan
from llmprune.engine.plan import Plan

GIVEN = "calibration.statistics"
OWN_KEYS = ("model", "out", "seed", "revision", "device", "dtype", "steps", "recover")


@dataclass(frozen=True, kw_only=True, repr=False)
class Preview:
    """What a grid would do: the plan of each possible method and amount, and what is not possible.

    `statistics` are those that all cells learn of the dense model, once, where the grid asks for
    that; `pareto` is what the front is of, beside the parameters that are kept.

    `str(preview)` is what --dry-run prints.
    """

    grid: Grid
    plans: Mapping[str, Plan]
    impossible: Mapping[str, str]
    keep: bool = False
    jobs: int = 1
    statistics: tuple[str, ...] = ()
    statistics_bytes: int = 0
    pareto: str = PERPLEXITY

    @property
    def seconds(self) -> float:
        """Return what all cells may take one after another, without the starts of the gate."""
        costs = [self.plans[cell.name].estimate for cell in self.possible]
        return sum(c.survey_seconds + c.cut_seconds + c.evaluate_seconds / 2 for c in costs)

    @property
    def disk(self) -> int:
        """Return the bytes that are needed at most, of weights."""
        costs = [self.plans[cell.name].estimate for cell in self.possible]
        most = max((cost.disk_bytes for cost in costs), default=0)
        collected = self.statistics_bytes * len(self.grid.seeds)
        if not self.keep:
            return most * min(self.jobs, len(costs)) + collected
        return sum(cost.out_bytes for cost in costs) + most + collected

    @property
    def possible(self) -> list[Cell]:
        return [cell for cell in self.grid.cells if cell.name in self.plans]

    def __repr__(self) -> str:
        rows = [
            (cell.name, f"{plan.sparsity:.4f}", plan.form, ", ".join(_learnt(plan)) or "nothing")
            for cell in self.possible
            for plan in [self.plans[cell.name]]
        ]
        lines = [
            ("prunings", f"{len(rows)}, and the dense model once"),
            ("time", f"about {human_seconds(self.seconds)}, and a fresh process for each proof"),
            ("disk", f"{human_bytes(self.disk)}{self._of} at most"),
        ]
        if self.statistics:
            lines += [("statistics", statistics_text(self.grid.statistics, self.statistics))]
        lines += [("left out", f"{name}: {why}") for name, why in self.impossible.items()]
        table = columns(("cell", "sparsity", "form", "needs"), rows)
        return f"{table}\n\n{named_lines(lines)}"

    @property
    def _of(self) -> str:
        return " of weights and statistics" if self.statistics else " of weights"

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "cells": [cell.name for cell in self.possible],
            "seconds": self.seconds,
            "disk_bytes": self.disk,
            "statistics": list(self.statistics),
            "impossible": dict(self.impossible),
        }


def _learnt(plan: Plan) -> tuple[str, ...]:
    return (*plan.parts.backward, *plan.parts.cut)


def make_grid(
    model: str | PathLike[str],
    methods: str | Sequence[str],
    sparsity: str | float | Sequence[float] | None = None,
    pattern: str | Sequence[str] | None = None,
    *,
    seeds: str | int | Sequence[int] = (0,),
    tasks: str | Sequence[str] | None = None,
    settings: Iterable[str] = (),
    **others: Any,
) -> Grid:
    """Build a grid from keywords; lists may be texts such as `0.5,0.6`.

    Raises:
        RecipeError: a name or a number is none.
    """
    for setting in settings:
        key = setting.partition("=")[0].strip()
        if key.partition(".")[0] in OWN_KEYS or key.startswith(("steps[1", "steps[2")):
            raise RecipeError(
                f"set: {key} is not the same for all prunings of a comparison, or has a flag of "
                "its own. Type llmprune compare --help for the flags."
            )
        if key in ("prune.method", "prune.sparsity", "prune.pattern", "prune.target"):
            raise RecipeError(
                f"set: {key} is what the grid is made of. Type --methods, --sparsity, --pattern."
            )
        if others.get("statistics") == COLLECTED and key in ("prune.propagate", GIVEN):
            raise RecipeError(
                f"set: {key} follows from --statistics dense. Leave one of the two out."
            )
    grid = Grid(
        model=str(model),
        methods=tuple(listed(methods)),
        sparsities=shares(sparsity),
        patterns=tuple(listed(pattern)),
        seeds=whole_numbers(seeds),
        tasks=tuple(listed(tasks)),
        settings=tuple(settings),
        **others,
    )
    check_grid(grid)
    return grid


def preview(grid: Grid, *, jobs: int = 1, keep: bool = False, pareto: str = PERPLEXITY) -> Preview:
    """Plan every method and amount of a grid; no weight is read.

    Raises:
        LlmpruneError: there is no such model, or no such text.
    """
    if pareto not in AXES:
        raise UnknownName(
            f"pareto: {pareto!r} is no measure of a front.{near_match(pareto, AXES)} Type "
            f"--pareto {' or --pareto '.join(AXES)}."
        )
    if jobs < 1:
        raise RecipeError(f"jobs: {jobs} processes do nothing. Give 1 or more.")
    open_source(grid.model, revision=grid.revision)
    plans: dict[str, Plan] = {}
    impossible: dict[str, str] = {}
    seen: dict[tuple[str, str], Opened | str] = {}
    for cell in grid.cells:
        key = cell.method, cell.asked
        if key not in seen:
            seen[key] = _planned(grid, cell)
        found = seen[key]
        if isinstance(found, str):
            impossible[cell.name] = found
        else:
            plans[cell.name] = found.plan
    if plans:
        wish = next(iter(plans.values())).recipe
        check_texts(wish, calibrates=any(p.forward for p in plans.values()), measures=True)
    names, size = _to_collect([one for one in seen.values() if not isinstance(one, str)], grid)
    return Preview(
        grid=grid,
        plans=plans,
        impossible=impossible,
        keep=keep,
        jobs=jobs,
        statistics=names,
        statistics_bytes=size,
        pareto=pareto,
    )


def _to_collect(opened: Sequence[Opened], grid: Grid) -> tuple[tuple[str, ...], int]:
    """Return the statistics that any cell learns of the dense model, and their bytes on disk."""
    learning = [one for one in opened if one.plan.forward]
    if grid.statistics != COLLECTED or not learning:
        return (), 0
    names = tuple(dict.fromkeys(name for one in learning for name in names_of(one.plan.parts)))
    return names, collected_bytes(learning[0], names)


def _planned(grid: Grid, cell: Cell) -> Opened | str:
    """Return a cell's plan with its source, or why there is none."""
    try:
        opened = open_plan(grid.recipe(cell, "cell", measured=True))
        plan = opened.plan
        if grid.statistics == COLLECTED and plan.forward:
            check_additive(plan.parts, plan.method.name)
    except LlmpruneError as error:
        return str(error).replace(f"{GIVEN}: ", "with --statistics dense: ")
    if plan.whole is not None and plan.whole.is_vocabulary:
        return "its tokens are others, so perplexities of tokens do not compare. Leave it out."
    return opened


def check_possible(planned: Preview, *, skip_impossible: bool) -> None:
    """Check that all cells are possible, or with `skip_impossible` that any is.

    Raises:
        RecipeError: they are not; names them.
    """
    if planned.impossible and not (skip_impossible and planned.plans):
        whys: dict[str, list[str]] = {}
        for name, why in planned.impossible.items():
            whys.setdefault(why, []).append(name)
        lines = [f"  {', '.join(names)}: {why}" for why, names in whys.items()]
        rest = (
            "Leave them out, or type --skip-impossible."
            if planned.plans
            else "Nothing is left to compare."
        )
        raise RecipeError(
            f"methods: {len(planned.impossible)} of {len(planned.grid.cells)} prunings are not "
            "possible:\n" + "\n".join(lines) + f"\n{rest}"
        )
