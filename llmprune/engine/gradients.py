"""The backward survey of a run: gradient statistics of every block, kept in a file of its own.

    FOLDER/  gradients-00001.safetensors ...  inputs/ (what blocks are given, while it runs)

Sequences go through the model in groups, as many at a time as there is room for what their blocks
are given. Every group adds its sums to the files, the last block's first, and each file says how
many sequences it holds: a run that was killed goes on from there, and ends in the same bytes.
Legend: N sequences, T tokens, O outputs, I inputs.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy

from llmprune.arch.anatomy import anatomy_of
from llmprune.arch.miniature import SEQ_LEN, miniature_model
from llmprune.arch.types import Family
from llmprune.base.errors import CheckpointError, UnsupportedModel, first_line
from llmprune.base.progress import Progress
from llmprune.calibration.hidden import Place
from llmprune.checkpoint.sink import write_tensors
from llmprune.checkpoint.skeleton import use_eager_experts
from llmprune.stats.types import Stats
from llmprune.walk.backward import backward_survey
from llmprune.walk.block import Blocks
from llmprune.walk.resident import Resident
from llmprune.walk.sharing import ALONE, Others

if TYPE_CHECKING:
    from torch import Tensor

ROOM = 4 * 2**30  # bytes for what blocks are given, where nothing else is said
_COUNT = "num_sequences"
_WITHIN = 1e-3  # of a linear's largest gradient: what rounding in another order may explain
_NOISE = 1e-8  # of the model's largest gradient: below it a gradient is rounding


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """Gradient statistics by block, read when they are asked for; in memory without a folder."""

    folder: Path | None = None
    held: dict[int, dict[str, Stats]] = field(default_factory=dict)

    def of(self, index: int) -> Mapping[str, Stats]:
        """Return a block's statistics by linear, float32 (O, I), on the host.

        Names are relative to the block; a block without any that was asked for has none.

        Raises:
            CheckpointError: the file is damaged.
        """
        if self.folder is None:
            return self.held.get(index, {})
        values: dict[str, dict[str, Tensor]] = {}
        count = 0
        for name, value in _read(self.path(index)).items():
            if name == _COUNT:
                count = int(value)
            else:
                linear, _, statistic = name.rpartition(".")
                values.setdefault(linear, {})[statistic] = value
        return {
            linear: Stats(num_tokens=0, values=each, num_sequences=count)
            for linear, each in values.items()
        }

    def keep(self, index: int, stats: Mapping[str, Stats]) -> None:
        """Keep a block's statistics; the earlier ones stay until the new ones are on the disk."""
        if self.folder is None:
            self.held[index] = {
                linear: replace(each, values={k: value.cpu() for k, value in each.values.items()})
                for linear, each in stats.items()
            }
            return
        tensors = {
            f"{linear}.{name}": value.cpu()
            for linear, each in stats.items()
            for name, value in each.values.items()
        }
        count = next(iter(stats.values())).num_sequences
        write_tensors(self.path(index), tensors | {_COUNT: torch.tensor(count)})

    def count(self, index: int, expected: set[str]) -> int:
        """Return how many sequences a block's statistics hold; `expected` names the tensors.

        Raises:
            CheckpointError: the file holds others.
        """
        from safetensors import SafetensorError, safe_open

        if self.folder is None:
            return max(
                (each.num_sequences for each in self.held.get(index, {}).values()), default=0
            )
        path = self.path(index)
        if not path.exists():
            return 0
        try:
            with safe_open(path, "pt") as file:
                names = set(file.keys())
                count = int(file.get_tensor(_COUNT)) if _COUNT in names else 0
        except (OSError, SafetensorError) as error:
            raise _damaged(path, error) from error
        if names != expected | {_COUNT}:
            raise CheckpointError(
                f"{path} does not hold the gradients of this run's linears. Begin again with "
                "--overwrite."
            )
        return count

    def path(self, index: int) -> Path:
        """Return the file of a block."""
        assert self.folder is not None
        return self.folder / f"gradients-{index + 1:05d}.safetensors"


def take_gradients(
    blocks: Blocks,
    tokens_NT: Tensor,
    needs: Sequence[str],
    linears: Sequence[Sequence[str]] | None = None,
    *,
    folder: Path | None,
    progress: Progress,
    room: int = ROOM,
    place: Place = "host",
    others: Others = ALONE,
) -> Gradients:
    """Take the gradient statistics of all sequences, or what is missing of them in `folder`.

    Every process takes those of its share of a group of sequences; their sums are added in the
    order of the processes.

    Args:
        needs: the statistics, of those that are seen in a backward walk.
        linears: which ones to look at, for each block (names relative to it); all, if None.
        folder: where they are kept, one file per block; in memory where None.
        room: bytes that the inputs of all blocks may take up at `place` at a time, of each process.

    Raises:
        NumericalError: an activation or a gradient is not finite; names the block.
        CheckpointError: `folder` holds other gradients, or a damaged file.
        TooLarge: the disk is full.
    """
    found = Gradients(folder=folder)
    linears = all_linears(blocks) if linears is None else linears
    inputs = folder / "inputs" if folder is not None and place == "disk" else None
    if inputs is not None:
        shutil.rmtree(inputs, ignore_errors=True)  # of a run that was killed
    counts = [
        found.count(index, {f"{linear}.{need}" for linear in names for need in needs})
        for index, names in enumerate(linears)
        if names
    ]
    num = len(tokens_NT)
    if counts and max(counts) > num:
        raise CheckpointError(
            f"{folder} holds the gradients of {max(counts)} sequences, where this run has {num}. "
            "Begin again with --overwrite."
        )
    done = min(counts, default=num)
    world = others.world
    group = world.size * sequences_at_once(blocks, tokens_NT.shape[-1], room)
    starts = range(done, num, group)
    if not starts:
        return found
    lowest = next(index for index, names in enumerate(linears) if names)
    steps = len(starts) * (2 * len(blocks) - lowest)
    with progress.stage("gradients", steps) as stage:
        for start in starts:
            part_NT = tokens_NT[start : start + group]
            until = start + len(part_NT)

            def told(label: str, until: int = until) -> None:
                stage.advance(f"{label}, sequences to {until} of {num}")

            with others.alongside(
                "gradients",
                tokens_NT=part_NT,
                needs=list(needs),
                linears=linears,
                place=place,
                folder=inputs,
                threads=torch.get_num_threads(),
            ) as pieces:
                for index, stats in backward_survey(
                    blocks,
                    part_NT[world.share(len(part_NT))],
                    needs,
                    linears.__getitem__,
                    before=found.of,
                    start=start,
                    place=place,
                    folder=inputs,
                    told=told,
                ):
                    held = next(iter(stats.values())).num_sequences if stats else 0
                    for piece in pieces():
                        if piece and held < until:  # else the block has them already
                            stats = _with(stats, piece)
                    if stats:
                        found.keep(index, stats)
                    del stats  # one block's at a time
    return found


def _with(stats: Mapping[str, Stats], more: Mapping[str, Stats]) -> dict[str, Stats]:
    """Return what two processes found of a block together."""
    return {
        linear: Stats(
            num_tokens=0,
            values={
                name: value + more[linear][name].to(value.device)
                for name, value in each.values.items()
            },
            num_sequences=each.num_sequences + more[linear].num_sequences,
        )
        for linear, each in stats.items()
    }


def all_linears(blocks: Blocks) -> list[list[str]]:
    """Return the names of each block's linears, without reading a weight."""
    return [list(anatomy_of(blocks.family, _shapes(module)).linears) for module in blocks.modules]


def _shapes(module: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(param.shape) for name, param in module.named_parameters()}


def sequences_at_once(blocks: Blocks, seq_len: int, room: int) -> int:
    """Return how many sequences' inputs of all blocks fit `room` bytes; one at least."""
    embeddings = blocks.model.get_input_embeddings().weight
    width = getattr(blocks.model.config.get_text_config(), "hidden_size", embeddings.shape[-1])
    each = (len(blocks) + 1) * seq_len * width * embeddings.dtype.itemsize
    return max(1, room // int(each))


def check_backward(config: Any, family: Family, *, trust_remote_code: bool = False) -> None:
    """Check on a miniature that gradients block by block are those of the whole model.

    Raises:
        UnsupportedModel: they differ, because a block computes something for another one beside its
            hidden states, or the model has no gradients; names what differs.
    """
    small = miniature_model(config, trust_remote_code=trust_remote_code)
    use_eager_experts(small)
    check_gradients(Resident(model=small, family=family))


def check_gradients(blocks: Resident) -> None:
    """Check a model in memory, a small one: see `check_backward`.

    Raises:
        UnsupportedModel: gradients differ.
    """
    model = type(blocks.model).__name__
    vocab = blocks.model.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(1)
    tokens_NT = torch.randint(0, vocab, (2, SEQ_LEN), generator=generator)
    linears = all_linears(blocks)
    try:
        survey = backward_survey(blocks, tokens_NT, ["grad_sum"], lambda i: linears[i], chunk=7)
        ours = {
            (index, linear): each["grad_sum"]
            for index, stats in survey
            for linear, each in stats.items()
        }
        theirs = _whole(blocks, tokens_NT, linears)
    except Exception as error:  # any line of any model may have no derivative
        raise UnsupportedModel(
            f"no gradients can be taken of {model} ({type(error).__name__}: {first_line(error)}). "
            "Choose a method that needs none, such as --method wanda or sparsegpt."
        ) from error
    noise = _NOISE * max(float(value.abs().max()) for value in theirs.values())
    differing = [
        f"block {index} {linear}"
        for (index, linear), value in sorted(theirs.items())
        if not _close(ours[index, linear], value, noise)
    ]
    if differing:
        shown = ", ".join(differing[:3]) + (", ..." if len(differing) > 3 else "")
        raise UnsupportedModel(
            f"{model} computes in one block what another one uses (shared keys and values, say), "
            f"so gradients taken block by block are wrong: those of {len(differing)} linears "
            f"differ from the whole model's ({shown}). Choose a method without gradients through "
            "the model, such as --method wanda or sparsegpt."
        )


def _whole(
    blocks: Resident, tokens_NT: Tensor, linears: Sequence[Sequence[str]]
) -> dict[tuple[int, str], Tensor]:
    """Return the sum over sequences of every linear's gradient, by the whole model at once."""
    params: dict[tuple[int, str], Tensor] = {}
    for index, names in enumerate(linears):
        for linear in names:
            param = blocks.anatomy(index).linears[linear].param
            params[index, param] = blocks.modules[index].get_parameter(param).requires_grad_()
    with torch.enable_grad():
        logits = blocks.model(input_ids=tokens_NT, use_cache=False).logits[:, :-1].float()
        loss = cross_entropy(logits.flatten(0, 1), tokens_NT[:, 1:].flatten()) * len(tokens_NT)
        found = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
    gradients = dict(zip(params, found, strict=True))
    result = {}
    for index, names in enumerate(linears):
        for name in names:
            found_in = blocks.anatomy(index).linears[name]
            gradient = gradients[index, found_in.param]
            if gradient is None:
                gradient = torch.zeros_like(params[index, found_in.param])
            result[index, name] = found_in.view(gradient)
    return result


def _close(ours: Tensor, theirs: Tensor, noise: float) -> bool:
    """Tell whether gradients agree to rounding."""
    within = _WITHIN * float(theirs.abs().max()) + noise
    return torch.allclose(ours, theirs.to(ours), rtol=0, atol=within)


def _read(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a block's file; none where there is none.

    Raises:
        CheckpointError: the file is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.exists():
        return {}
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path} is damaged ({first_line(error)}). Remove it to take the gradients of its block "
        "again, or begin again with --overwrite."
    )
