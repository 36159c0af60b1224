"""Many prunings of one model compared: a grid checked, spread over processes, measured, written.

OUT/  comparison.{json,csv,md,html}  pareto.{png,svg}  grid.json  dense.json
      cells/ reports/ (a file per cell)  runs/ (with keep)  work/ (what cells share)
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

from llmprune import __version__
from llmprune.base.errors import LlmpruneError, RecipeError, UnknownName
from llmprune.base.progress import Progress, human_bytes, human_seconds
from llmprune.base.registry import near_match
from llmprune.base.text import columns, named_lines
from llmprune.calibration.presence import check_texts
from llmprune.checkpoint.locate import open_source
from llmprune.checkpoint.sink import write_json
from llmprune.checkpoint.source import read_json
from llmprune.collecting import collected_bytes, names_of
from llmprune.comparison.grid import DENSE as COLLECTED
from llmprune.comparison.grid import (
    SEQUENTIAL,
    Cell,
    Grid,
    check_grid,
    grid_from,
    growth,
    listed,
    shares,
    whole_numbers,
)
from llmprune.comparison.result import Comparison
from llmprune.comparison.rows import AXES, PERPLEXITY
from llmprune.comparison.shared import DENSE, GRADIENTS, STATISTICS, WINDOWS, Shared
from llmprune.comparison.working import cell_file, do_cells
from llmprune.comparison.writing import statistics_text
from llmprune.engine.collected import check_additive
from llmprune.engine.opening import Opened, open_plan
from llmprune.engine.plan import Plan
from llmprune.engine.records import check_out

RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
GIVEN = "calibration.statistics"
OWN_KEYS = ("model", "out", "seed", "revision", "device", "dtype", "steps", "recover")
WRITTEN = (
    *("cells", "reports", "runs", "work", "grid.json", "dense.json", "pareto.png", "pareto.svg"),
    *(f"comparison.{kind}" for kind in ("json", "csv", "md", "html")),
)


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


def compare(
    model: str | PathLike[str],
    methods: str | Sequence[str],
    sparsity: str | float | Sequence[float] | None = None,
    pattern: str | Sequence[str] | None = None,
    *,
    seeds: str | int | Sequence[int] = (0,),
    out: str | PathLike[str] | None = None,
    calib: str | None = None,
    num_samples: int | None = None,
    seq_len: int | None = None,
    evaluation: str | None = None,
    num_windows: int = 16,
    tasks: str | Sequence[str] | None = None,
    limit: int | None = None,
    jobs: int = 1,
    keep: bool = False,
    skip_impossible: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    settings: Iterable[str] = (),
    statistics: str = SEQUENTIAL,
    pareto: str = PERPLEXITY,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> Comparison | None:
    """Prune a model by several methods and amounts and compare the results; None in all processes
    of torchrun but the first.

    Every pruning is a normal run of the same seed and gets the same bytes. Calibration windows,
    the dense model's numbers and gradients are made once. The same call goes on where an earlier
    one stopped, and a grid that has grown keeps what it has.

    Args:
        model: a folder, a Hub id or "demo".
        methods: rows of `llmprune methods`, or efforts ("fast", "good", "best").
        sparsity: shares to remove. pattern: N:M, which fixes its share, or others, which take all
            of them; each method's own when absent.
        seeds: each draws its own calibration windows.
        out: the folder to write; MODEL-compared when absent.
        calib, num_samples, seq_len: as `prune` takes them, of every cell.
        evaluation: the text that perplexity is of; `num_windows` of it are read.
        tasks: of lm-evaluation-harness, for the dense model and every cell. limit: items of each.
        jobs: processes at once; over CUDA devices, where there are several.
        keep: keep the weights of every cell in OUT/runs; their reports are kept in any case.
        skip_impossible: leave out what a method cannot do instead of refusing the grid.
        overwrite: replace an earlier comparison in this folder.
        settings: further `key=value` overrides of the recipe of every cell.
        statistics: "sequential", of what a cell's own pruned blocks pass on, as the bare command
            learns; "dense", of the dense model, collected once for all cells: the masks are others.
        pareto: what the front is of: "perplexity", or "kl" from the dense model.

    Raises:
        LlmpruneError: the grid cannot be done; a cell that fails later is listed in the result.
    """
    grid = make_grid(
        *(model, methods, sparsity, pattern),
        seeds=seeds,
        tasks=tasks,
        settings=tuple(settings),
        calib=calib,
        num_samples=num_samples,
        seq_len=seq_len,
        evaluation=evaluation,
        num_windows=num_windows,
        limit=limit,
        statistics=statistics,
        revision=revision,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    return run_grid(
        preview(grid, jobs=jobs, keep=keep, pareto=pareto),
        Path(out) if out is not None else default_folder(grid.model),
        Progress("quiet" if quiet else "rich"),
        skip_impossible=skip_impossible,
        overwrite=overwrite,
    )


def default_folder(model: str) -> Path:
    """Return the folder of a comparison, in the working folder.

    >>> str(default_folder("owner/name"))
    'name-compared'
    """
    return Path(f"{Path(model.rstrip('/')).name}-compared")


def run_grid(
    planned: Preview,
    out: Path,
    progress: Progress,
    *,
    skip_impossible: bool = False,
    overwrite: bool = False,
) -> Comparison | None:
    """Do what is missing of a grid, and write the comparison; None in all ranks but the first.

    Raises:
        LlmpruneError: the grid cannot be done, or the folder holds another one.
    """
    import torch

    check_possible(planned, skip_impossible=skip_impossible)
    out = out.expanduser()
    rank, local = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    before, start = torch.get_num_threads(), _start()
    grid = planned.grid
    try:
        with _alone_in_the_world():
            if rank:
                threads = _wait_for_the_first(out, start)
            else:
                threads = _begin(planned, out, start, overwrite=overwrite, ranks=ranks)
            torch.set_num_threads(threads)
            shared = Shared(out, replace(grid, device=device_of(grid.device, local)))
            if rank == 0:
                _forget_failures(planned, out)
                dense = shared.dense
                progress.note(f"dense: perplexity {dense['perplexity']:.3f} ({dense['protocol']})")
            if rank:
                do_cells(
                    shared,
                    set(planned.impossible),
                    keep=planned.keep,
                    wait=False,
                    progress=progress,
                )
                return None
            with _helpers(planned, out, progress.mode, threads):
                for wait in (False, True):  # again for what a process that ended has left
                    do_cells(
                        *(shared, set(planned.impossible)),
                        keep=planned.keep,
                        wait=wait,
                        progress=progress,
                    )
            found = Comparison(_gathered(planned, shared))
            found.save(out)
            if not found.failed:
                _tidy(out, keep=planned.keep)
            return found
    finally:
        torch.set_num_threads(before)


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


def device_of(asked: str, place: int) -> str:
    """Return the device of a process: where there are several CUDA devices, each its own."""
    import torch

    count = torch.cuda.device_count() if asked == "auto" and torch.cuda.is_available() else 0
    return f"cuda:{place % count}" if count > 1 else asked


def _begin(planned: Preview, out: Path, start: str, *, overwrite: bool, ranks: int) -> int:
    """Write what the folder compares, or check that it goes on; return the threads of a process.

    Raises:
        RecipeError: it holds something else, or a grid that this one is no continuation of.
    """
    import torch
    import transformers

    grid, path = planned.grid, out / "grid.json"
    source = open_source(grid.model, revision=grid.revision)
    if overwrite and path.exists():
        for name in WRITTEN:
            if (out / name).is_dir():
                shutil.rmtree(out / name)
            else:
                (out / name).unlink(missing_ok=True)
    if not path.exists():
        check_out(out, source.folder, overwrite=False)
    threads = max(1, torch.get_num_threads() // max(planned.jobs, ranks))
    fixed = {
        "source": source.fingerprint(),
        "versions": {
            "llmprune": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    if path.exists():
        earlier = read_json(path)
        then = grid_from(earlier["grid"]).to_dict() | earlier["fixed"]
        lines = growth(then, grid.to_dict() | fixed)
        if lines:
            raise RecipeError(
                f"out: {out} holds another comparison, which differs in\n  "
                + "\n  ".join(lines)
                + "\nA grid may grow; for another one choose another --out, or --overwrite."
            )
        threads = int(earlier["threads"])
    skipped = [{"name": name, "why": why} for name, why in planned.impossible.items()]
    told = {"grid": grid.to_dict(), "fixed": fixed, "threads": threads, "skipped": skipped}
    told |= {"statistics": list(planned.statistics)}
    write_json(path, told | {"start": start})
    return threads


def _start() -> str:
    """Return what the ranks of one torchrun have in common, and those of the next one have not."""
    names = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")
    one_node = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    parent = [str(os.getppid())] if one_node else []
    return ":".join([*(os.environ.get(name, "") for name in names), *parent])


def _wait_for_the_first(out: Path, start: str) -> int:
    """Wait until the first rank has written what is compared; return the threads of a process.

    Where the first fails, torchrun ends the others.
    """
    while not (out / "grid.json").exists() or read_json(out / "grid.json")["start"] != start:
        time.sleep(0.1)
    return int(read_json(out / "grid.json")["threads"])


def _forget_failures(planned: Preview, out: Path) -> None:
    """Let cells that failed, or whose weights are asked for and gone, be done again."""
    for cell in planned.possible:
        path = cell_file(out, cell.name)
        if not path.exists():
            continue
        gone = planned.keep and not (out / "runs" / cell.name / "llmprune" / "report.json").exists()
        if gone or "error" in read_json(path):
            path.unlink()


@contextmanager
def _helpers(planned: Preview, out: Path, mode: str, threads: int) -> Iterator[None]:
    """Let further processes work on the same folder; none outlives this one's work."""
    started: list[subprocess.Popen[bytes]] = []
    keep = "keep" if planned.keep else "drop"
    for place in range(1, min(planned.jobs, len(planned.possible))):
        device = device_of(planned.grid.device, place)
        command = [sys.executable, "-m", "llmprune.comparison.working", str(out), mode, device]
        env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        started.append(subprocess.Popen([*command, keep], env=env))
    try:
        yield
    finally:
        for process in started:
            if process.poll() is None:
                process.terminate()
        for process in started:
            process.wait()


@contextmanager
def _alone_in_the_world() -> Iterator[None]:
    """Hide the ranks of torchrun from the runs of cells: each is of one process."""
    hidden = {name: os.environ.pop(name) for name in RANKS if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _gathered(planned: Preview, shared: Shared) -> dict[str, Any]:
    """Return what comparison.json holds."""
    grid, dense = planned.grid, shared.dense
    cells = [read_json(cell_file(shared.home, cell.name)) for cell in planned.possible]
    done = [cell for cell in cells if "error" not in cell]
    return {
        "llmprune": __version__,
        "model": grid.model,
        "grid": grid.to_dict(),
        "protocol": _protocol(planned, shared, done),
        "shared": _sharing(shared, done),
        "pareto": planned.pareto,
        "dense": dense,
        "cells": cells,
        "skipped": [{"name": name, "why": why} for name, why in planned.impossible.items()],
    }


def _protocol(
    planned: Preview, shared: Shared, done: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return what all numbers were measured with."""
    grid, told = planned.grid, read_json(shared.home / "grid.json")
    source = open_source(grid.model, revision=grid.revision)
    used = {cell["used"]["windows"] for cell in done} - {None}
    texts = [read_json(shared.work / f"tokens-{key}.json") for key in sorted(used)]
    texts.sort(key=lambda text: text["seed"])
    revision = f" at {source.revision}" if source.revision else ""
    plan = shared.first.plan
    said = [
        f"seed {text['seed']}: {record['num_windows']} windows of {record['seq_len']} tokens of "
        f"{record['data']}, SHA-256 {record['tokens'][:16]}"
        for text in texts
        for record in [text["record"]]
    ]
    limit = "" if grid.limit is None else f", the first {grid.limit} items of each"
    return {
        "model": f"{source.name}{revision}, {source.fingerprint()[:16]}",
        "calibration": "; ".join(said) or "none is read",
        "evaluation": f"{shared.dense['protocol']}, SHA-256 {shared.dense['tokens'][:16]}",
        "leak": {str(text["seed"]): text["leak"] for text in texts},
        "tasks": f"{', '.join(grid.tasks)}{limit}" if grid.tasks else "",
        "statistics": statistics_text(grid.statistics, planned.statistics),
        "settings": list(grid.settings),
        "dtype": plan.dtype_name,
        "device": plan.device.type,
        "threads": told["threads"],
        "versions": told["fixed"]["versions"],
        "seeds": list(grid.seeds),
    }


def _sharing(shared: Shared, done: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return what was made once for several cells, with the seconds that making it took."""
    uses = {
        WINDOWS: [cell["used"]["windows"] for cell in done],
        DENSE: ["all" for _ in done],
        GRADIENTS: [cell["used"]["gradients"] for cell in done],
        STATISTICS: [cell["used"].get("statistics") for cell in done],
    }
    found = []
    for what, keys in uses.items():
        known = {key for key in keys if key is not None}
        if known:
            seconds = sum(shared.seconds(what, key) for key in known)
            used = sum(key is not None for key in keys)
            found.append({"what": what, "seconds": seconds, "made": len(known), "used": used})
    return found


def _tidy(out: Path, *, keep: bool) -> None:
    """Remove what may be as large as the model, and the locks; windows stay."""
    large = [*out.glob("work/gradients-*"), *out.glob("work/statistics-*")]
    for folder in (*large, out / "work" / "dense-states", out / "work" / "locks"):
        shutil.rmtree(folder, ignore_errors=True)
    if not keep:
        shutil.rmtree(out / "runs", ignore_errors=True)
