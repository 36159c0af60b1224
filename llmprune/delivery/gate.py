"""The gate: a result is done when a fresh process has loaded it the stock way and agrees with us.

Checked: the index and its shards, no missing, unexpected or mismatched key, equal logits on two
rows of 128 fixed tokens, zeros where the masks say so, untouched tensors bit for bit.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmprune.arch.limits import longest_sequence
from llmprune.base.errors import CheckpointError, TooLarge, WontLoad
from llmprune.base.memory import return_freed
from llmprune.checkpoint.sink import write_failed, write_json, write_tensors
from llmprune.checkpoint.skeleton import build_skeleton, read_config
from llmprune.checkpoint.source import Source, open_folder, read_json
from llmprune.delivery.agreement import Agreement, compare
from llmprune.delivery.copied_code import code_in_scratch
from llmprune.delivery.masks import OWN, MaskFiles
from llmprune.walk.forward import embed, logits, walk
from llmprune.walk.streamed import Streamed, stream

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ROWS, TOKENS = 2, 128
ZEROS = "zeros"
OURS = "ours.safetensors"
SAME = "the same with a cache as without"
PIECE = 2**17  # of memory that the fresh process gives back as soon as it is freed


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the gate found; written into the report."""

    folder: str
    num_tensors: int
    dtype: str
    agreement: Agreement
    masked_linears: int
    natural_zeros: int
    untouched_equal: int | None
    masked: Agreement | None = None
    generation: str | None = None
    beside: str = ZEROS

    def text(self) -> str:
        """Return the verdict as a sentence."""
        untouched = (
            f"; {self.untouched_equal} untouched tensors are the source's, bit for bit"
            if self.untouched_equal is not None
            else ""
        )
        smaller = f"; as with {self.beside}: {self.masked.text()}" if self.masked else ""
        said = f"; greedy generation: {self.generation}" if self.generation else ""
        return (
            f"loads in a fresh process; {self.num_tensors} tensors; logits: "
            f"{self.agreement.text()}{smaller}{said}; {self.masked_linears} masks hold{untouched}"
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def pass_gate(
    folder: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    source: Source | None = None,
    attention: str | None = None,
    trust_remote_code: bool = False,
    masked: Callable[[Tensor], Tensor] | None = None,
    own_code: bool = False,
    generate: bool = False,
    beside: str = ZEROS,
) -> Verdict:
    """Prove a folder.

    `masked` gives the logits of token ids in the source's shapes, with zeros where a shrunk result
    has nothing (or what else `beside` says): what it computes must agree with them, and generation
    with a cache with that without. `generate` asks for the latter alone. With `own_code` the result
    brings code, which must not be run unasked.

    Raises:
        WontLoad: it does not load cleanly, computes something else, or generates something else
            with a cache than without.
        CheckpointError: zeros or untouched tensors are not what was recorded.
    """
    written = open_folder(folder)
    with code_in_scratch():
        config = read_config(folder, trust_remote_code=trust_remote_code)
        skeleton = build_skeleton(
            config, dtype=dtype, attention=attention, trust_remote_code=trust_remote_code
        )
    blocks = stream(written, skeleton, device=device, dtype=dtype)
    tokens = gate_tokens(config)
    with tempfile.TemporaryDirectory(prefix=".gate-", dir=folder) as scratch:
        _write_logits(blocks, tokens, Path(scratch) / OURS)
        size = sum(entry.num_params for entry in written.entries.values()) * dtype.itemsize
        job = {
            "folder": str(folder.resolve()),
            "scratch": str(Path(scratch).resolve()),
            "tokens": tokens.tolist(),
            "dtype": str(dtype).removeprefix("torch."),
            "trust_remote_code": trust_remote_code,
            "generate": generate or masked is not None,
            "own_code": own_code,
        }
        agreement = _agree_with_stock(folder, Path(scratch), job, size)
        generation = _check_loaded(folder, read_json(Path(scratch) / "loaded.json"))
        as_masked = None
        if masked is not None:
            zeros = Path(scratch) / "masked.safetensors"
            write_tensors(zeros, {"logits": masked(tokens)})
            as_masked = compare(zeros, Path(scratch) / OURS, str(dtype))
            if not as_masked.passed:
                raise WontLoad(
                    f"{folder} computes something else than the same model with {beside} in place "
                    f"of what was removed: {as_masked.text()}. This family's config gives other "
                    "sizes another meaning; use --set prune.form=masked."
                )
    if math.isnan(agreement.kl):
        raise WontLoad(
            f"{folder} loads, but its logits are NaN or infinite, so nothing is proven. The "
            "checkpoint is damaged or overflows: try --dtype float32 or bfloat16."
        )
    if not agreement.passed:
        raise WontLoad(
            f"{folder} loads, but its logits differ from what was computed block by block: "
            f"{agreement.text()}. The result is not published; please report the model's config."
        )
    checked, natural = _check_masks(blocks, folder)
    return Verdict(
        folder=str(folder),
        num_tensors=len(written.entries),
        dtype=str(dtype).removeprefix("torch."),
        agreement=agreement,
        masked_linears=checked,
        natural_zeros=natural,
        untouched_equal=_check_untouched(written, source, folder) if source else None,
        masked=as_masked,
        generation=generation,
        beside=beside,
    )


def gate_tokens(config: Any) -> Tensor:
    """Return the two fixed rows of token ids, shorter only where the model takes fewer."""
    import torch

    text = config.get_text_config(decoder=True)
    longest = longest_sequence(config) or TOKENS
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, text.vocab_size, (ROWS, min(TOKENS, longest)), generator=generator)


@code_in_scratch()
def _write_logits(blocks: Streamed, tokens_NT: Tensor, path: Path) -> None:
    """Walk the stored blocks and keep the logits."""
    import torch

    flow = embed(blocks, tokens_NT, ROWS)
    walk(blocks, flow)
    write_tensors(
        path, {"logits": torch.cat([part.cpu() for _, _, part in logits(blocks, flow)], 1)}
    )


def _agree_with_stock(folder: Path, scratch: Path, job: Mapping[str, Any], size: int) -> Agreement:
    """Load the folder with `from_pretrained` in a fresh process, and compare its logits with ours.

    Weights stay on disk until a module asks for them. Some models take their weights in other ways,
    so that they fail or compute with something else: these are loaded whole, as users do, where
    their `size` in bytes fits the memory.

    Raises:
        WontLoad: it does not load, or not cleanly.
        TooLarge: the disk is full.
    """
    import psutil

    agreement: Agreement | None = None
    whole = [False] if size < psutil.virtual_memory().available else []
    order = (*whole, True) if job.get("generate") else (True, *whole)
    for on_disk in order:
        reason = _run_stock(scratch, {**job, "on_disk": on_disk})
        if reason is None:
            _check_keys(folder, read_json(scratch / "loaded.json"), _unused_in_source(folder))
            stock = scratch / "stock.safetensors"
            agreement = compare(scratch / OURS, stock, f"torch.{job['dtype']}")
            if agreement.passed:
                break
    if agreement is None:
        full = write_failed(scratch, OSError(reason))
        if isinstance(full, TooLarge):  # it says nothing of the result
            raise full
        raise WontLoad(f"{folder} does not load with from_pretrained: {reason}")
    return agreement if agreement.passed else _agree_alone(scratch, job, order[-1], agreement)


def _agree_alone(
    scratch: Path, job: Mapping[str, Any], on_disk: bool, agreement: Agreement
) -> Agreement:
    """Return the agreement where experts are multiplied one at a time, as we do, in 16 bits.

    Products of grouped experts round otherwise, and a token between two experts then goes to the
    other one. In float32, or without experts, the agreement stays what it is.
    """
    before = read_json(scratch / "loaded.json")
    grouped = before.get("experts") not in (None, "eager")
    if agreement.exact or not grouped or math.isnan(agreement.kl):
        return agreement
    again = {**job, "on_disk": on_disk, "eager": True, "generate": False}
    if _run_stock(scratch, again) is None:
        agreement = compare(scratch / OURS, scratch / "stock.safetensors", f"torch.{job['dtype']}")
    write_json(scratch / "loaded.json", before)
    return agreement


def _run_stock(scratch: Path, job: Mapping[str, Any]) -> str | None:
    """Run the loading script in a fresh process; return why it failed, if it did."""
    write_json(scratch / "job.json", job)
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(scratch / "modules"),  # of code beside the model
        "TRANSFORMERS_VERBOSITY": "error",
        "GLIBC_TUNABLES": f"glibc.malloc.mmap_threshold={PIECE}",
    }
    return_freed()  # two processes hold the libraries now, which is the peak of a small run
    process = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("stock.py")), str(scratch / "job.json")],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if not process.returncode:
        return None
    return (process.stderr.strip().splitlines() or ["no message"])[-1]


def _unused_in_source(folder: Path) -> list[str]:
    """Return the tensors that the source already had and its model does not use."""
    path = folder / OWN / "run.json"
    return list(read_json(path).get("unused", [])) if path.exists() else []


def _check_keys(folder: Path, loaded: Mapping[str, list[str]], unused: list[str]) -> None:
    """Check that loading left nothing missing, unexpected or mismatched.

    Tensors that the source already had and its model does not use stay, and are no surprise.
    """
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        found = [key for key in loaded[kind] if kind != "unexpected_keys" or key not in unused]
        if found:
            raise WontLoad(
                f"{folder} loads with {kind.replace('_', ' ')}: {', '.join(found[:3])}"
                f"{' ...' if len(found) > 3 else ''}. transformers would fill or drop them "
                "silently."
            )


def _check_loaded(folder: Path, loaded: Mapping[str, Any]) -> str | None:
    """Check what the fresh process found beside logits; say what generation did.

    Raises:
        WontLoad: a cache changes what is generated, or code of the result was run unasked.
    """
    if loaded.get("ran_unasked"):
        raise WontLoad(
            f"{folder} loads without trust_remote_code, though it needs the code that it brings: "
            "its config must name a model type of its own."
        )
    said = loaded.get("generation")
    if said is not None and said != SAME:
        raise WontLoad(
            f"{folder} generates other tokens with a cache than without ({said}). The result is "
            "not published; please report the model's config."
        )
    return said


def _check_masks(blocks: Streamed, folder: Path) -> tuple[int, int]:
    """Check that every removed weight is zero on disk; return linears checked and natural zeros."""
    keeps = MaskFiles(folder)
    masked = natural = 0
    plain = replace(blocks, dtype=None)
    for index in range(len(blocks)):
        found = keeps.of_block(blocks.skeleton.prefix(index))
        if not found:
            continue
        with plain.open(index) as block:
            for name, keep_OI in found.items():
                weight_OI = block.weight(name.removeprefix(block.prefix))
                zero_OI = weight_OI == 0
                if bool((~zero_OI & ~keep_OI.to(zero_OI.device)).any()):
                    raise CheckpointError(
                        f"{folder}: {name} has weights where its mask says removed. The folder was "
                        "changed after pruning (merged, fine-tuned or quantised); prune it again."
                    )
                natural += int((zero_OI & keep_OI.to(zero_OI.device)).sum())
                masked += 1
    return masked, natural


def _check_untouched(written: Source, source: Source, folder: Path) -> int:
    """Check that untouched tensors are bit for bit those of the source; return how many."""
    import torch

    masks = MaskFiles(folder)
    origin = masks.origins(written.entries)
    names = sorted(written.entries.keys() - masks.touched)
    if strange := [name for name in names if origin[name] not in source.entries]:
        raise CheckpointError(
            f"{folder}: tensor {strange[0]} is not in the source, and nothing was to add it."
        )
    known = set(origin.values())
    lost = [name for name in source.entries if name not in known and not masks.may_lack(name)]
    if lost:
        raise CheckpointError(
            f"{folder}: tensor {sorted(lost)[0]} of the source is not in the result, though "
            "nothing was to remove it."
        )
    for name in names:
        ours, theirs = written.get([name])[name], source.get([origin[name]])[origin[name]]
        if (
            ours.dtype != theirs.dtype
            or ours.shape != theirs.shape
            or not torch.equal(
                ours.reshape(-1).view(torch.uint8), theirs.reshape(-1).view(torch.uint8)
            )
        ):
            raise CheckpointError(
                f"{folder}: {name} differs from the source although nothing was to change it. "
                "The source was edited during the run, or the disk is faulty; run again with "
                "--overwrite."
            )
    return len(names)


def clean_scratch(folder: Path) -> None:
    """Remove what a killed gate left behind."""
    for path in folder.glob(".gate-*"):
        shutil.rmtree(path, ignore_errors=True)
