"""A run's folder as the cut sees it: where blocks go, what is kept of each, what completes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmprune import __version__
from llmprune.arch.types import RANK, Site
from llmprune.base.timeline import Timeline
from llmprune.calibration.windows import token_hash
from llmprune.checkpoint.sink import copy_file, copy_side_files, hash_file, shard_name, write_json
from llmprune.checkpoint.source import read_json
from llmprune.delivery.heterogeneous import stale_code
from llmprune.delivery.manifest import manifest_of
from llmprune.delivery.masks import OWN, MaskFiles
from llmprune.engine.budgets import budget_data
from llmprune.engine.opening import Opened
from llmprune.engine.outcome import Outcome
from llmprune.engine.plan import Plan
from llmprune.engine.reckoning import sizes_of_result
from llmprune.engine.records import Records
from llmprune.mask.packed import PackedMask
from llmprune.recipe.models import EvaluateStep
from llmprune.walk.rewriting import Rewriting, open_rewriting

if TYPE_CHECKING:
    from torch import Tensor


def open_target(
    opened: Opened, plan: Plan, partial: Path, timeline: Timeline | None = None
) -> Rewriting:
    """Open the source for rewriting into the partial folder, with modules of the result's shape."""
    shipment = plan.shipment
    assert shipment is not None
    return open_rewriting(
        *(opened.blocks, shipment.skeleton, partial, shipment.places),
        overlaps=plan.estimate.overlaps,
        timeline=timeline,
    )


class FolderKeeper:
    """Keeps a block by writing its masks and, last, its record.

    The blocks' thread does that, after it has written the shard, while the next block is cut.
    """

    def __init__(self, records: Records, blocks: Rewriting) -> None:
        self.records = records
        self.blocks = blocks

    def whole(self, index: int) -> dict[str, Any] | None:
        """Return the record of a whole block."""
        return self.records.whole(index)

    def keep(
        self, index: int, shard: Path | None, outcome: Outcome, content: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Begin to write masks and, when they and the shard are on the disk, the record."""
        params = {self.blocks.param_of(index, name) for name in outcome.touched}
        record = {
            "block": index,
            **content,
            "touched": sorted(self.blocks.result.naming.disk_names_of(params)),
            "masks": {n: list(m.shape) for n, m in self._renamed(index, outcome).items()},
        }
        masks, units = self._renamed(index, outcome), dict(outcome.kept_units)

        def settle() -> None:
            with self.blocks.timeline.span("hash and record", index):
                name = shard_name(index, len(self.blocks))
                path = self.records.write_masks(name, masks, units)
                self.records.write(index, [path] if shard is None else [shard, path], record)

        self.blocks.worker.begin(settle)
        return record

    def _renamed(self, index: int, outcome: Outcome) -> dict[str, PackedMask]:
        """Return masks by the names that linears have in the result; none of a block that went."""
        if self.blocks.is_gone(index):
            return {}
        before = self.blocks.source.skeleton.prefix(index)
        after = self.blocks.param_of(index, "")
        return {after + name.removeprefix(before): m for name, m in outcome.masks.items()}

    def flush(self) -> None:
        """Wait for the record of the last block; raise what went wrong with it."""
        self.blocks.settle()


def complete(
    opened: Opened, plan: Plan, blocks: Rewriting, records: Records, rows: list[dict[str, Any]]
) -> dict[str, str]:
    """Write trunk, index, config, code, masks' index and side files; return every weight file's
    hash."""
    shipment = plan.shipment
    assert shipment is not None
    trunk = blocks.commit_trunk()
    blocks.write_index()
    copy_side_files(opened.source.folder, records.partial)
    if shipment.skeleton is not opened.blocks.skeleton:
        write_json(records.partial / "config.json", dict(shipment.config))
        for path in shipment.code:
            copy_file(path, records.partial / path.name)
        for path in stale_code(records.partial, shipment.config):  # of a source that differed
            path.unlink()
    masks = {
        name: {
            "file": shard_name(row["block"], len(blocks)).replace("model-", "masks-"),
            "shape": shape,
        }
        for row in rows
        for name, shape in row["masks"].items()
    }
    touched = sorted({name for row in rows for name in row["touched"]} | blocks.added())
    blocks_of = sorted(shipment.places, key=lambda index: shipment.places[index])
    index = {"true_means": "kept", "masks": masks, "touched": touched}
    if shipment.skeleton is not opened.blocks.skeleton:
        index |= {"blocks": blocks_of, "lost": blocks.lost()}
    write_json(records.own / "masks.json", index)
    return records.hashes() | {trunk.name: hash_file(trunk)}


def _kept_name(site: Site) -> str:
    """Return what the units kept of a site are told under: their kind, or the linear of a rank."""
    return f"{RANK} of {site.spans[0].linear}" if site.kind == RANK else site.kind


def manifest(opened: Opened, plan: Plan, fixed: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the result is made of, for whoever prunes it again or adapts it."""
    shipment = plan.shipment
    assert shipment is not None
    counts = plan.counts or {}
    kept: list[dict[str, int]] = []
    for block in shipment.layout.blocks:
        sites = [site for group in plan.groups[block.source] for site in group.sites]
        kept.append({_kept_name(site): site.num_units - counts[site.name] for site in sites})
    cache = sizes_of_result(plan).get("kv", {})
    dense = {"parameters": plan.num_params, "kv_values_per_token": cache.get("before")}
    result = {
        "parameters": shipment.num_params,
        "kv_values_per_token": cache.get("after"),
    }
    found = manifest_of(
        layout=shipment.layout,
        tier=shipment.tier,
        reasons=shipment.reasons,
        source=fixed["source"],
        config=opened.source.config(),
        method={
            "prune": plan.prune.model_dump(mode="json"),
            "solver": plan.method.solver,
            "allocation": plan.allocation,
            "seed": plan.recipe.seed,
            "tokens": fixed["tokens"],
        },
        kept=kept,
        sizes={"dense": dense, "result": result},
    )
    shared = dict(shipment.layout.shared)
    return found | ({"shared": shared} if shared else {})


def prior_masks(opened: Opened) -> Callable[[int], Mapping[str, Tensor]]:
    """Return what gives the masks of an earlier pruning of the source."""
    if opened.plan.prune.regrow:
        return lambda index: {}
    masks = MaskFiles(opened.source.folder)
    return lambda index: masks.of_block(opened.blocks.skeleton.prefix(index))


FREE = ("out", "max_memory")  # where the result lies and what may be used decide no byte


def what_fixes(opened: Opened, tokens: Tensor | None, *, world_size: int = 1) -> dict[str, Any]:
    """Return what fixes the bytes of a run, for its folder; `world_size` are its processes."""
    import safetensors
    import transformers

    plan = opened.plan
    wish = {key: value for key, value in plan.recipe.to_dict().items() if key not in FREE}
    wish["calibration"] = {k: v for k, v in wish["calibration"].items() if k != "cache"}
    asked: dict[str, Any] = {"steps": [{"prune": plan.prune.model_dump(mode="json")}]}
    if plan.forward:
        asked |= {key: wish[key] for key in ("calibration", "seed")}
    elif plan.given is not None:
        asked |= {"calibration": {"statistics": plan.given.hash}}
    elif plan.draws:
        asked |= {"seed": wish["seed"]}
    if plan.prune.target:  # the sparsity follows from the text that perplexity is measured on
        question = plan.recipe.evaluate or EvaluateStep()
        asked["evaluate"] = question.model_dump(mode="json", exclude={"perplexity"})
    source = {
        "name": opened.source.name,
        "folder": str(opened.source.folder.resolve()),
        "revision": opened.source.revision,
        "fingerprint": opened.source.fingerprint(),
        "last_change": opened.source.last_change(),
        "masks": MaskFiles(opened.source.folder).fingerprint(),
    }
    earlier = opened.source.folder / OWN / "run.json"
    return {
        "llmprune": __version__,
        "budget": budget_data(plan.budget),
        "recipe": asked,
        "wish": wish,
        "source": source,
        "origin": read_json(earlier).get("origin", source) if earlier.exists() else source,
        "unused": list(opened.blocks.unused),
        "tokens": None if tokens is None else token_hash(tokens),
        **({"statistics": plan.given.hash} if plan.given is not None else {}),
        "micro_batch": plan.estimate.micro_batch,
        "place": plan.estimate.place,
        "threads": torch.get_num_threads(),
        "device": plan.device.type,
        "processor": processor(plan.device),
        "dtype": plan.dtype_name,
        "attention": opened.blocks.model.config._attn_implementation,
        "experts": "eager",
        "world_size": world_size,
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "safetensors": safetensors.__version__,
        },
    }


def processor(device: torch.device) -> str:
    """Return what decides how sums are rounded: the device's name and its precision settings."""
    if device.type == "cuda":
        precise = "TF32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "float32"
        return f"{torch.cuda.get_device_name(device)}, {precise} products"
    return f"{device.type}, {torch.backends.cpu.get_cpu_capability()}"
