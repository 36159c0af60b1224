"""What comparison.json holds: numbers of all cells, and what they were measured with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmprune import __version__
from llmprune.checkpoint.locate import open_source
from llmprune.checkpoint.source import read_json
from llmprune.comparison.previewing import Preview
from llmprune.comparison.shared import DENSE, GRADIENTS, STATISTICS, WINDOWS, Shared
from llmprune.comparison.working import cell_file
from llmprune.comparison.writing import statistics_text


def gathered(planned: Preview, shared: Shared) -> dict[str, Any]:
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
