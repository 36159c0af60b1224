"""What is to be compared: a grid of methods, amounts and seeds, and what all its cells share."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from llmprune.base.errors import RecipeError, UnknownName
from llmprune.base.registry import near_match
from llmprune.catalog import METHODS
from llmprune.recipe import Recipe, build, default_steps, override
from llmprune.recipe.effort import EFFORTS

SEQUENTIAL, DENSE = "sequential", "dense"  # whose statistics cells learn from


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One pruning of a grid; without a pattern it is what the method is for."""

    method: str
    seed: int
    sparsity: float | None = None
    pattern: str | None = None

    @property
    def asked(self) -> str:
        """Return what is asked for, as a table says it.

        >>> Cell(method="flap", seed=0, sparsity=0.2, pattern="heads").asked
        'heads 0.2'
        """
        share = [] if self.sparsity is None else [f"{self.sparsity:g}"]
        return " ".join([*([self.pattern] if self.pattern else []), *share])

    @property
    def name(self) -> str:
        """Return the name of the cell's files.

        >>> Cell(method="wanda", seed=1, pattern="2:4").name
        'wanda-2of4-seed1'
        """
        asked = self.asked.replace(":", "of").replace(" ", "-")
        return f"{self.method}-{asked}-seed{self.seed}"


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The wish: what differs from cell to cell, and what is the same for all of them.

    `settings` are `key=value` overrides of the recipe of every cell. With `statistics` sequential a
    cell learns from what its own pruned blocks pass on, as the bare command does; with dense all
    cells decide by statistics of the dense model, which are collected once.
    """

    model: str
    methods: tuple[str, ...]
    sparsities: tuple[float, ...] = ()
    patterns: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    revision: str | None = None
    calib: str | None = None
    num_samples: int | None = None
    seq_len: int | None = None
    evaluation: str | None = None
    num_windows: int = 16
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    settings: tuple[str, ...] = ()
    statistics: str = SEQUENTIAL
    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False

    @property
    def cells(self) -> tuple[Cell, ...]:
        """Return all cells: by seed last, so that one method's amounts stand together."""
        return tuple(
            Cell(method=method, sparsity=sparsity, pattern=pattern, seed=seed)
            for method in self.methods
            for pattern, sparsity in amounts(self.sparsities, self.patterns)
            for seed in self.seeds
        )

    def recipe(
        self,
        cell: Cell,
        out: str | None = None,
        *,
        measured: bool = False,
        statistics: str | None = None,
    ) -> Recipe:
        """Return the recipe of a cell; nothing but its bytes are its own where not `measured`.

        `statistics` is a folder that takes the place of its text.

        Raises:
            RecipeError: the cell, or a setting of all, is not possible.
        """
        part = "effort" if cell.method in EFFORTS else "method"
        prune = {part: cell.method, "sparsity": cell.sparsity, "pattern": cell.pattern}
        steps = default_steps()
        steps[0]["prune"] = _given(prune)
        calibration = {"data": self.calib, "num_samples": self.num_samples, "seq_len": self.seq_len}
        top = {"revision": self.revision, "out": out, "device": self.device, "dtype": self.dtype}
        data: dict[str, Any] = {"model": self.model, "steps": steps, "seed": cell.seed}
        data |= _given(top) | {"calibration": _given(calibration)}
        data |= {"trust_remote_code": True} if self.trust_remote_code else {}
        asked = [f"evaluate.num_windows={self.num_windows}"]
        asked += [f"evaluate.data={self.evaluation}"] if self.evaluation else []
        asked += ["prune.propagate=dense"] if self.statistics == DENSE else []
        last = [] if measured else ["evaluate.perplexity=false"]
        last += [f"calibration.statistics={json.dumps(statistics)}"] if statistics else []
        return build(override(data, [*asked, *self.settings, *last]))

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, of which `grid_from` makes an equal grid."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(self).items()
        }


def grid_from(data: Mapping[str, Any]) -> Grid:
    """Return the grid of plain data."""
    fields: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in data.items()
    }
    return Grid(**fields)


def check_grid(grid: Grid) -> None:
    """Check names and numbers of a grid, before a model is looked at.

    Raises:
        UnknownName: there is no such method.
        RecipeError: an axis is empty, or has one value twice.
    """
    known = (*METHODS, *EFFORTS)
    for method in grid.methods:
        if method not in known:
            raise UnknownName(
                f"methods: {method!r} is no method.{near_match(method, known)} `llmprune methods` "
                "lists them; fast, good and best are efforts, which stand in the place of one."
            )
    if not grid.methods:
        raise RecipeError("methods: none. Type --methods magnitude,wanda,sparsegpt.")
    if not amounts(grid.sparsities, grid.patterns):
        raise RecipeError(
            "sparsity: missing. Type --sparsity 0.5,0.6, or --pattern 2:4, which fixes its own."
        )
    asked = amounts(grid.sparsities, grid.patterns)
    if grid.sparsities and all(share is None for _, share in asked):
        raise RecipeError(
            f"sparsity: {', '.join(grid.patterns)} fixes its own, so nothing takes "
            f"{grid.sparsities[0]:g}. Leave --sparsity out, or add a pattern that takes one: "
            f"--pattern unstructured,{','.join(grid.patterns)}."
        )
    if not grid.seeds:
        raise RecipeError("seeds: none. Type --seeds 0.")
    if grid.statistics not in (SEQUENTIAL, DENSE):
        near = near_match(grid.statistics, (SEQUENTIAL, DENSE))
        raise RecipeError(
            f"statistics: {grid.statistics!r} is no choice.{near} Type --statistics sequential, "
            "what each pruning's own blocks pass on, or --statistics dense, collected once."
        )
    if grid.num_windows < 1:
        raise RecipeError(f"num_windows: {grid.num_windows} measures nothing. Give 1 or more.")
    if grid.limit is not None and not grid.tasks:
        raise RecipeError("limit: is of tasks, and none is named. Add --tasks NAME.")
    axes = (grid.methods, grid.sparsities, grid.patterns, grid.seeds)
    for name, axis in zip(("methods", "sparsity", "pattern", "seeds"), axes, strict=True):
        twice = [value for place, value in enumerate(axis) if value in axis[:place]]
        if twice:
            raise RecipeError(f"{name}: {twice[0]} is given twice. Leave one out.")


def amounts(
    sparsities: Sequence[float], patterns: Sequence[str]
) -> list[tuple[str | None, float | None]]:
    """Return (pattern, sparsity) of every amount: N:M fixes its sparsity, others take all of them.

    >>> amounts([0.5, 0.6], ["2:4", "unstructured"])
    [('2:4', None), ('unstructured', 0.5), ('unstructured', 0.6)]
    >>> amounts([0.5], [])
    [(None, 0.5)]
    """
    found: list[tuple[str | None, float | None]] = []
    for pattern in patterns or (None,):
        fixed = pattern is not None and re.fullmatch(r"\d+:\d+", pattern)
        found += [(pattern, None)] if fixed else [(pattern, share) for share in sparsities]
    return found


def growth(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return what keeps a grid from being continued as another one, a line per key; none: it may.

    Both are what `to_dict` gives, with what else fixes the numbers. A longer axis keeps nothing.

    >>> growth({"methods": ["a"], "seeds": [0]}, {"methods": ["a", "b"], "seeds": [0]})
    []
    >>> growth({"methods": ["a", "b"], "limit": 1}, {"methods": ["a"], "limit": 2})
    ['limit: 1 then, 2 now', "methods: without b, which was compared"]
    """
    lines = []
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key), after.get(key)
        if key in ("methods", "sparsities", "patterns", "seeds"):
            gone = [str(value) for value in old or () if value not in (new or ())]
            if gone:
                lines.append(f"{key}: without {', '.join(gone)}, which was compared")
        elif old != new:
            lines.append(f"{key}: {old!r} then, {new!r} now")
    return lines


def listed(text: str | float | Iterable[Any] | None) -> list[str]:
    """Return the parts of `a,b`, or of a sequence of such texts.

    >>> listed("wanda, ria"), listed(["0.5,0.6", 0.7]), listed(None)
    (['wanda', 'ria'], ['0.5', '0.6', '0.7'], [])
    """
    if text is None:
        return []
    parts = [text] if isinstance(text, str) or not isinstance(text, Iterable) else list(text)
    return [piece.strip() for part in parts for piece in str(part).split(",") if piece.strip()]


def shares(text: str | float | Iterable[Any] | None) -> tuple[float, ...]:
    """Return the sparsities of `0.5,0.6`.

    Raises:
        RecipeError: one is no share.
    """
    found = []
    for piece in listed(text):
        try:
            share = float(piece)
        except ValueError:
            share = -1.0
        if not 0 <= share < 1:
            raise RecipeError(
                f"sparsity: {piece!r} is no share of the weights. Give numbers from 0 to below 1, "
                "as in --sparsity 0.5,0.6."
            )
        found.append(share)
    return tuple(found)


def whole_numbers(text: str | int | Iterable[Any] | None) -> tuple[int, ...]:
    """Return the seeds of `0,1,2`.

    Raises:
        RecipeError: one is no whole number from 0 on.
    """
    pieces = listed(text)
    wrong = next((piece for piece in pieces if not piece.isdecimal()), None)
    if wrong is not None:
        raise RecipeError(f"seeds: {wrong!r} is no seed. Give whole numbers, as in --seeds 0,1,2.")
    return tuple(int(piece) for piece in pieces)


def _given(wishes: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in wishes.items() if value is not None}
