"""Cutting through all blocks at once: what is learnt of the text, what is written, what proves it.

Both runs have the same three verbs. What `learn` finds is kept, so that a resumed run writes the
same bytes; `rewrite` leaves a record for what is whole; `finish` writes what completes the folder.
Legend: D hidden size, K units that are left, V vocabulary, N windows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from llmprune.base.memory import anonymous_bytes
from llmprune.base.progress import Progress
from llmprune.checkpoint.sink import hash_file, write_json, write_tensors
from llmprune.checkpoint.skeleton import Skeleton, build_skeleton, read_config
from llmprune.checkpoint.source import open_folder, read_json
from llmprune.delivery.masks import MaskFiles
from llmprune.engine.opening import Opened, read_tokenizer
from llmprune.engine.plan import Plan
from llmprune.engine.records import Records
from llmprune.engine.whole import TRUNK, Whole
from llmprune.hidden.basis import kept_energy, principal_axes, top_channels
from llmprune.hidden.narrowing import Narrowing, open_narrowing
from llmprune.hidden.residual import survey_residual
from llmprune.vocabulary.choosing import choose_tokens, count_tokens
from llmprune.vocabulary.required import required_ids
from llmprune.vocabulary.rewriting import prune_vocabulary
from llmprune.walk.forward import Stream, embed, logits, walk
from llmprune.walk.streamed import Streamed, stream

if TYPE_CHECKING:
    from torch import Tensor

UNITS = "units.safetensors"
Row = dict[str, Any]


class Rewritten(NamedTuple):
    """The report's rows, and the last block of an earlier run."""

    rows: list[Row]
    resumed: int | None


@dataclass(frozen=True, kw_only=True)
class WholeRun:
    """What both runs work with: the source and its plan, the folder, the text, who is told."""

    opened: Opened
    records: Records
    tokens_NT: Tensor
    embed: Callable[[Tensor], Stream]
    progress: Progress

    @property
    def whole(self) -> Whole:
        assert self.opened.plan.whole is not None
        return self.opened.plan.whole

    @property
    def blocks(self) -> Streamed:
        return self.opened.blocks

    @property
    def plan(self) -> Plan:
        """Return the plan with the config that was written, whose ids may have new numbers."""
        plan = self.opened.plan
        assert plan.shipment is not None
        config = read_json(self.records.partial / "config.json")
        shipment = replace(plan.shipment, config=config, skeleton=self.skeleton())
        return replace(plan, shipment=shipment)

    def skeleton(self) -> Skeleton:
        """Return the modules of what was written, by its own config.json."""
        trust = self.opened.plan.recipe.trust_remote_code
        return build_skeleton(
            read_config(self.records.partial, trust_remote_code=trust),
            dtype=self.opened.plan.dtype,
            attention=self.blocks.model.config._attn_implementation,
            trust_remote_code=trust,
        )

    def result(self) -> Streamed:
        """Open what was written for walking."""
        written, dtype = open_folder(self.records.partial), self.opened.plan.dtype
        return stream(written, self.skeleton(), device=self.blocks.device, dtype=dtype)

    def write_index(self, touched: set[str], unit: Tensor | None, **masks: Any) -> None:
        """Write what was touched, and (where units are the source's) the indices of those kept."""
        if unit is not None:
            path = self.records.own / UNITS
            write_tensors(path, {self.whole.site.name: unit.to("cpu", torch.int32)})
        index = {
            "true_means": "kept",
            "masks": masks,
            "touched": sorted(touched),
            "blocks": list(range(len(self.blocks))),
            "lost": [],
        }
        write_json(self.records.own / "masks.json", index)


@dataclass(frozen=True, kw_only=True)
class HiddenRun(WholeRun):
    """A narrower residual stream: block by block, the trunk last."""

    def learn(self) -> Tensor:
        """Return the basis, rotation_DK or kept_K, of an earlier run or of one walk.

        Raises:
            NumericalError: an activation is not finite.
        """
        path = self.records.survey / "basis.safetensors"
        if not path.exists():
            write_tensors(path, self._survey())
        return _read(path)["basis"]

    def _survey(self) -> dict[str, Tensor]:
        """Send the text through the model; return the basis and the energy that each axis holds."""
        whole = self.whole
        assert whole.blueprint is not None
        flow = self.embed(self.tokens_NT)
        try:
            seen = survey_residual(self.blocks, flow, whole.blueprint)
        finally:
            flow.hidden.close()
        if not whole.score.rotates:
            return {"basis": top_channels(seen.activity_D, whole.kept)}
        rotation_DD, energy_D = principal_axes(seen.gram_DD)
        share = kept_energy(energy_D, whole.kept)
        self.progress.note(
            f"hidden: {whole.kept} of {len(energy_D)} axes hold {100 * share:.2f} % of the energy"
        )
        return {"basis": rotation_DD[:, : whole.kept].contiguous(), "energy": energy_D}

    def rewrite(self, basis: Tensor) -> Rewritten:
        """Write every block that is not whole yet; return all rows."""
        narrowing, rows = self._narrowing(basis), []
        known = [self.records.whole(index) for index in range(len(narrowing))]
        resumed = max((i for i, record in enumerate(known) if record), default=None)
        if resumed is not None:
            self.progress.event("resumed", after=resumed)
            self.progress.note(f"resumed after block {resumed}")
        with self.progress.stage("cut", len(narrowing)) as stage:
            for index, record in enumerate(known):
                if record is None:
                    shard, record = narrowing.commit(index), self._row(index)
                    self.records.write(index, [shard], record)
                rows.append(record)
                stage.advance(
                    f"block {index}", sparsity=record["sparsity"], memory=record["memory"]
                )
        return Rewritten(rows, resumed)

    def finish(self, basis: Tensor) -> dict[str, str]:
        """Write trunk, index, config and what was touched; return the hashes of all shards."""
        narrowing = self._narrowing(basis)
        trunk = narrowing.commit_trunk()
        narrowing.complete()
        width, naming = self.whole.site.num_units, self.blocks.naming
        params = set(narrowing.blueprint.trunk(width).axes)
        for index in range(len(narrowing)):
            prefix = self.blocks.skeleton.prefix(index)
            params |= {prefix + name for name in narrowing.roles(index).axes}
        touched = set(naming.disk_names_of(params))
        touched |= {narrowing.blueprint.head} if narrowing.unties else set()
        self.write_index(touched, None if basis.dim() == 2 else basis)
        return self.records.hashes() | {trunk.name: hash_file(trunk)}

    def masked(self, basis: Tensor) -> None:
        """Return nothing to compare logits with: the family's miniature was, before the run.

        Weights on other axes are rounded otherwise, so those of the whole model differ in 16 bits.
        """

    def _narrowing(self, basis: Tensor) -> Narrowing:
        assert self.whole.blueprint is not None
        trust = self.opened.plan.recipe.trust_remote_code
        return open_narrowing(
            *(self.blocks, self.records.partial, self.whole.blueprint, basis),
            trust_remote_code=trust,
        )

    def _row(self, index: int) -> Row:
        """Return the report's row of a block."""
        cost, site = self.whole.costs[index], self.whole.site
        row = _site_row(
            self.blocks.skeleton.prefix(index) + site.name,
            *(site.num_units, self.whole.removed, cost, self.tokens_NT.numel()),
        )
        return _block_row(index, row)


@dataclass(frozen=True, kw_only=True)
class VocabularyRun(WholeRun):
    """Fewer tokens: rows of embeddings and head go, and every file that numbers tokens follows."""

    def learn(self) -> Tensor:
        """Return kept_K, the ids to keep, by how often each occurs in the text."""
        path = self.records.survey / "tokens.safetensors"
        if not path.exists():
            counts_V = count_tokens(self.tokens_NT, num_ids=self.whole.site.num_units)
            write_tensors(path, {"counts": counts_V})
        counts_V = _read(path)["counts"]
        folder, recipe = self.opened.source.folder, self.opened.plan.recipe
        words = read_tokenizer(self.opened.source, recipe)
        trust = recipe.trust_remote_code
        kept = choose_tokens(
            read_json(folder / "tokenizer.json"),
            counts_V,
            num_kept=self.whole.kept,
            multiple=1,
            required=required_ids(folder, words, trust_remote_code=trust),
        )
        return torch.tensor(kept, dtype=torch.int64)

    def rewrite(self, kept_K: Tensor) -> Rewritten:
        """Write all shards and files, or nothing where an earlier run wrote all."""
        whole = self.whole
        record = self.records.whole(TRUNK)
        resumed = None if record is None else len(self.blocks) - 1
        with self.progress.stage("cut", 1) as stage:
            if record is None:
                found = prune_vocabulary(
                    *(self.opened.source, self.records.partial, kept_K.tolist()),
                    trust_remote_code=self.opened.plan.recipe.trust_remote_code,
                )
                row = _site_row(
                    whole.site.name,
                    *(whole.site.num_units, whole.removed, whole.site.unit_cost),
                    self.tokens_NT.numel(),
                )
                record = _block_row(TRUNK, row) | {"touched": list(found.sliced)}
                self.records.write(TRUNK, self._shards(), record)
            stage.advance("vocabulary", sparsity=record["sparsity"], memory=record["memory"])
        return Rewritten([record], resumed)

    def finish(self, kept_K: Tensor) -> dict[str, str]:
        """Write what was touched, and carry the masks of earlier prunings over."""
        record = self.records.whole(TRUNK)
        assert record is not None
        masks = MaskFiles(self.opened.source.folder)
        for file in sorted({str(row["file"]) for row in masks.index.values()}):
            name = Path(file).name
            write_tensors(self.records.own / name, _read(masks.folder / name))
        self.write_index(set(record["touched"]), kept_K, **masks.index)
        return self.records.hashes()

    def masked(self, kept_K: Tensor) -> Callable[[Tensor], Tensor]:
        """Return what gives the source's logits of kept tokens, given in new numbering."""
        blocks = replace(self.blocks, dtype=self.opened.plan.dtype)

        def logits_of(tokens_NT: Tensor) -> Tensor:
            flow = embed(blocks, kept_K[tokens_NT], len(tokens_NT))
            walk(blocks, flow)
            parts = [part[..., kept_K].cpu() for _, _, part in logits(blocks, flow)]
            return torch.cat(parts, 1)

        return logits_of

    def _shards(self) -> list[Path]:
        files = {entry.file for entry in open_folder(self.records.partial).entries.values()}
        return [self.records.partial / file for file in sorted(files)]


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def _site_row(name: str, num_units: int, removed: int, cost: int, num_tokens: int) -> Row:
    return {
        "site": name,
        "units": num_units,
        "removed": removed,
        "weights": num_units * cost,
        "removed_weights": removed * cost,
        "sparsity": removed / num_units,
        "tokens": num_tokens,
        "error": None,
    }


def _block_row(index: int, row: Row) -> Row:
    return {
        "block": index,
        "sparsity": row["sparsity"],
        "error": None,
        "sites": [row],
        "seconds": {},
        "masks": {},
        "memory": anonymous_bytes(),
    }
