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
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from os import PathLike
from pathlib import Path

from llmprune import __version__
from llmprune.base.errors import RecipeError
from llmprune.base.progress import Progress
from llmprune.checkpoint.locate import open_source
from llmprune.checkpoint.sink import write_json
from llmprune.checkpoint.source import read_json
from llmprune.comparison.grid import (
    SEQUENTIAL,
    grid_from,
    growth,
)
from llmprune.comparison.previewing import Preview, check_possible, make_grid, preview
from llmprune.comparison.result import Comparison
from llmprune.comparison.rows import PERPLEXITY
from llmprune.comparison.shared import Shared
from llmprune.comparison.summary import gathered
from llmprune.comparison.working import cell_file, do_cells
from llmprune.engine.records import check_out

RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
WRITTEN = (
    *("cells", "reports", "runs", "work", "grid.json", "dense.json", "pareto.png", "pareto.svg"),
    *(f"comparison.{kind}" for kind in ("json", "csv", "md", "html")),
)


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
            found = Comparison(gathered(planned, shared))
            found.save(out)
            if not found.failed:
                _tidy(out, keep=planned.keep)
            return found
    finally:
        torch.set_num_threads(before)


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


def _tidy(out: Path, *, keep: bool) -> None:
    """Remove what may be as large as the model, and the locks; windows stay."""
    large = [*out.glob("work/gradients-*"), *out.glob("work/statistics-*")]
    for folder in (*large, out / "work" / "dense-states", out / "work" / "locks"):
        shutil.rmtree(folder, ignore_errors=True)
    if not keep:
        shutil.rmtree(out / "runs", ignore_errors=True)
