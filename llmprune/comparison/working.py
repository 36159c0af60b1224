"""The cells of a grid done one after another, by one process or several that share a folder.

Whoever holds a cell's lock does it; the lock of a process that ends, however it ends, is free. A
cell is finished when OUT/cells/NAME.json is there, which is written last and at once.
Other processes than the first are started as `python -m llmprune.comparison.working OUT MODE ...`.
"""

from __future__ import annotations

import shutil
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from llmprune.base.errors import LlmpruneError
from llmprune.base.progress import Progress
from llmprune.checkpoint.sink import copy_file, write_json
from llmprune.checkpoint.source import read_json
from llmprune.comparison.grid import DENSE, Cell, grid_from
from llmprune.comparison.shared import GRADIENTS, STATISTICS, Shared
from llmprune.engine.opening import open_plan
from llmprune.steps import run_streamed

OURS, YOURS = 1, 2  # exit codes: whose fault a failure is
PRUNING = ("survey", "embed", "cut", "finish")  # what of a run's times is the method's


def do_cells(
    shared: Shared, left_out: set[str], *, keep: bool, wait: bool, progress: Progress
) -> None:
    """Do all cells that are not finished; those that another process does are passed over, or with
    `wait` looked at again when that has ended.
    """
    for cell in shared.grid.cells:
        if cell.name in left_out:
            continue
        path = cell_file(shared.home, cell.name)
        lock = shared.work / "locks" / f"{cell.name}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as held:
            try:
                held.enter_context(FileLock(lock, timeout=-1 if wait else 0))
            except Timeout:
                continue
            if path.exists():
                continue
            result = attempt(shared, cell, keep=keep)
            write_json(path, result)
            if "error" not in result and not keep:
                shutil.rmtree(shared.home / "runs" / cell.name, ignore_errors=True)
            _tell(result, progress)


def attempt(shared: Shared, cell: Cell, *, keep: bool) -> dict[str, Any]:
    """Return the result of a cell, or what is wrong; an interruption goes on its way."""
    told = {"name": cell.name, "asked": cell.asked, **asdict(cell)}
    try:
        return told | prune_and_measure(shared, cell, keep=keep)
    except LlmpruneError as error:
        return told | {"error": {"message": str(error), "code": YOURS}}
    except Exception as error:  # one cell's fault must not cost the others
        message = f"{type(error).__name__}: {error}"
        found = {"message": message, "code": OURS, "traceback": traceback.format_exc()}
        return told | {"error": found}


def prune_and_measure(shared: Shared, cell: Cell, *, keep: bool) -> dict[str, Any]:
    """Run a cell as the bare command would, and measure what it wrote.

    Raises:
        LlmpruneError: the run failed.
    """
    start = time.perf_counter()
    out = shared.home / "runs" / cell.name
    opened = open_plan(shared.grid.recipe(cell, str(out)))
    key, windows = shared.windows(opened) if opened.plan.forward else (None, None)
    statistics = None
    if windows is not None and shared.grid.statistics == DENSE:
        statistics, folder = shared.collected(opened, windows)
        opened = open_plan(shared.grid.recipe(cell, str(out), statistics=str(folder)))
        windows = None
    gradients = shared.lend_gradients(opened, windows)
    report = run_streamed(opened, Progress("quiet"), tokens=windows).data
    found = shared.measured(shared.result_blocks(out, opened), opened)
    scores = shared.scores(out)
    copy_file(out / "llmprune" / "report.json", _place(shared.home, cell.name))
    spent = sum(seconds for name, seconds in report["seconds"].items() if name in PRUNING)
    spent += shared.seconds(GRADIENTS, gradients) if gradients else 0.0
    spent += shared.seconds(STATISTICS, statistics) if statistics else 0.0
    after = int(report["parameters_after"])
    removed = sum(row["removed_weights"] for block in report["blocks"] for row in block["sites"])
    return {
        "sparsity": report["sparsity"],
        "parameters": after,
        "kept": after - removed if report["form"] == "masked" else after,
        **{name: found[name] for name in ("loss", "perplexity", "kl")},
        "tasks": scores,
        "seconds": round(spent, 3),
        "wall": round(time.perf_counter() - start, 3),
        "memory": report["peak_memory"],
        "allocation": report["allocation"],
        "warnings": list(report["warnings"]),
        "files": dict(report["files"]),
        "run": {key: report["run"][key] for key in ("threads", "device", "dtype", "versions")},
        "used": {"windows": key, "gradients": gradients, "statistics": statistics},
        "folder": str(out.relative_to(shared.home)) if keep else None,
    }


def cell_file(home: Path, name: str) -> Path:
    """Return where the result of a cell lies."""
    return home / "cells" / f"{name}.json"


def _place(home: Path, name: str) -> Path:
    path = home / "reports" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _tell(result: Mapping[str, Any], progress: Progress) -> None:
    name = f"{result['method']} {result['asked']} seed {result['seed']}"
    if "error" in result:
        progress.warn(f"{name} failed: {result['error']['message']}")
        return
    progress.event("cell", **{key: result[key] for key in ("name", "sparsity", "perplexity")})
    progress.note(
        f"{name}: sparsity {result['sparsity']:.4f}, perplexity {result['perplexity']:.3f}, "
        f"{result['wall']:.1f} s"
    )


def main(arguments: list[str], work: Callable[..., None] = do_cells) -> None:
    """Help with the cells of a folder: OUT, the mode of the display, the device, keep or drop."""
    import torch

    home, mode, device, keep = arguments
    told = read_json(Path(home) / "grid.json")
    torch.set_num_threads(int(told["threads"]))
    shared = Shared(Path(home), replace(grid_from(told["grid"]), device=device))
    progress = Progress(mode)  # type: ignore[arg-type]
    left_out = {each["name"] for each in told["skipped"]}
    work(shared, left_out, keep=keep == "keep", wait=False, progress=progress)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(130)
