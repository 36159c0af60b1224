"""The training loop: steps of AdamW over windows of tokens, saved, resumed and shared alike.

A step reads `batch` windows, whatever the number of processes and the micro-batch: its loss is the
mean over all its tokens. Legend: B windows of a micro-batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.nn.functional import cross_entropy

from llmprune.base.errors import NumericalError, RecipeError
from llmprune.base.progress import Progress
from llmprune.evaluation.windows import IGNORED
from llmprune.recovery.attaching import Trainee
from llmprune.recovery.examples import Examples
from llmprune.recovery.rates import rate_factor
from llmprune.recovery.saved import Saved

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor

BETAS = (0.9, 0.999)


@dataclass(frozen=True, kw_only=True)
class Course:
    """How long and how fast to train.

    `micro_batch` windows are read at once in each process; every `evaluate_every` steps the loss of
    what is held out is measured, every `save_every` steps the state is written.
    """

    steps: int
    batch: int
    micro_batch: int
    learning_rate: float
    decay: str
    warm_up: float
    weight_decay: float
    clip: float
    evaluate_every: int
    save_every: int


class Companion(Protocol):
    """What else happens in training: masks that move, weights that fade, a teacher."""

    def loss(self, output: Any, windows: Sequence[int], targets_BT: Tensor) -> Tensor:
        """Return the loss of a micro-batch, summed over the tokens that are asked for."""

    def before_update(self, step: int) -> None:
        """See gradients before the optimizer does."""

    def after_update(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """See weights after the optimizer; `step` steps are finished."""

    def state(self) -> dict[str, Tensor]:
        """Return what a resumed run needs beside weights and moments."""

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` returned."""


class Alone:
    """No companion: the loss of the next token, and nothing else."""

    def loss(self, output: Any, windows: Sequence[int], targets_BT: Tensor) -> Tensor:
        return next_token_loss(output.logits, targets_BT)

    def before_update(self, step: int) -> None:
        pass

    def after_update(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        pass

    def state(self) -> dict[str, Tensor]:
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        pass


@dataclass(kw_only=True)
class History:
    """What was seen on the way: (finished steps, loss) of training and of what is held out."""

    training: list[tuple[int, float]] = field(default_factory=list)
    held: list[tuple[int, float]] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return vars(self).copy()


def next_token_loss(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Return the negative log-likelihood of targets in nats, summed, in float32."""
    return cross_entropy(
        logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), ignore_index=IGNORED,
        reduction="sum",
    )  # fmt: skip


def train(
    trainee: Trainee,
    examples: Examples,
    course: Course,
    saved: Saved,
    progress: Progress,
    accelerator: Accelerator,
    companion: Companion | None = None,
    resume: Mapping[str, Any] | None = None,
) -> History:
    """Train, or go on from a saved state, to the last step.

    Raises:
        NumericalError: the loss is not finite; the last saved state stays.
    """
    companion = companion or Alone()
    optimizer = torch.optim.AdamW(
        list(trainee.params.values()),
        lr=course.learning_rate,
        betas=BETAS,
        weight_decay=course.weight_decay,
    )
    history, first = History(), 0
    if resume is not None:
        companion.restore(saved.restore(resume, trainee.params, optimizer))
        history, first = _history(resume["history"]), int(resume["step"])
    run = _Run(trainee, examples, course, accelerator, companion)
    if first == 0:
        history.held.append((0, run.held_loss()))
    with progress.stage("recover", course.steps) as stage:
        stage.done = first
        for step in range(first, course.steps):
            began = time.perf_counter()
            loss, tokens = run.step(step, optimizer)
            if not math.isfinite(loss):
                raise _diverged(step, loss, saved)
            history.training.append((step + 1, loss))
            history.tokens += tokens
            history.seconds += time.perf_counter() - began
            done = step + 1
            told = {}
            if done % course.evaluate_every == 0 or done == course.steps:
                history.held.append((done, run.held_loss()))
                told["held_out"] = history.held[-1][1]
            if accelerator.is_main_process and (
                done % course.save_every == 0 and done < course.steps
            ):
                facts = {"history": history.to_dict()}
                saved.write(done, trainee.params, optimizer, facts, companion.state())
            rate = history.tokens / max(history.seconds, 1e-9)
            stage.advance(f"loss {loss:.4f}", **told, tokens_per_second=round(rate))
    return history


class _Run:
    """The model, its data and its processes, for one step at a time."""

    def __init__(
        self, trainee: Trainee, examples: Examples, course: Course, accelerator: Accelerator,
        companion: Companion,
    ) -> None:  # fmt: skip
        self.trainee, self.examples, self.course = trainee, examples, course
        self.accelerator, self.companion = accelerator, companion
        self.model = accelerator.prepare_model(trainee.model)
        self.device = accelerator.device

    def step(self, step: int, optimizer: torch.optim.Optimizer) -> tuple[float, int]:
        """Take one step; return the mean loss over its tokens, of all processes, and how many."""
        windows = self.examples.of_step(step, self.course.batch)
        count = int((self.examples.targets_NT[windows] != IGNORED).sum())
        parts = list(self._parts(windows))
        optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), dtype=torch.float64)
        for place, part in enumerate(parts):
            with self._quiet(place < len(parts) - 1):
                loss = self._loss(part)
                # DDP averages over processes, and the loss is of all their tokens
                scaled = loss * (self.accelerator.num_processes / max(1, count))
                self.accelerator.backward(scaled)
            total += loss.detach().double().cpu()
        self.trainee.mask_gradients()
        self.companion.before_update(step)
        torch.nn.utils.clip_grad_norm_(list(self.trainee.params.values()), self.course.clip)
        factor = rate_factor(step, self.course.steps, self.course.decay, self.course.warm_up)
        for group in optimizer.param_groups:
            group["lr"] = self.course.learning_rate * factor
        optimizer.step()
        self.trainee.hold()
        self.companion.after_update(step + 1, optimizer)
        return float(self._summed(total)) / max(1, count), count

    def held_loss(self) -> float:
        """Return the mean loss of what is held out."""
        total, count = torch.zeros((), dtype=torch.float64), 0
        with torch.no_grad():
            for part in self._parts(list(self.examples.held)):
                ids_BT, targets_BT = self._batch(part)
                logits = self.model(input_ids=ids_BT, use_cache=False).logits
                total += next_token_loss(logits, targets_BT).double().cpu()
        count = int((self.examples.targets_NT[list(self.examples.held)] != IGNORED).sum())
        return float(self._summed(total)) / max(1, count)

    def _loss(self, windows: list[int]) -> Tensor:
        ids_BT, targets_BT = self._batch(windows)
        with self.accelerator.autocast():
            output = self.model(input_ids=ids_BT, use_cache=False)
        return self.companion.loss(output, windows, targets_BT)

    def _batch(self, windows: list[int]) -> tuple[Tensor, Tensor]:
        ids_BT = self.examples.ids_NT[windows].to(self.device)
        return ids_BT, self.examples.targets_NT[windows].to(self.device)

    def _parts(self, windows: list[int]) -> Iterator[list[int]]:
        """Yield the micro-batches of this process."""
        ranks = self.accelerator.num_processes
        mine = windows[self.accelerator.process_index :: ranks]
        size = self.course.micro_batch
        for start in range(0, len(mine), size):
            yield mine[start : start + size]

    @contextmanager
    def _quiet(self, quiet: bool) -> Iterator[None]:
        """Keep processes from exchanging gradients until the last micro-batch."""
        with self.accelerator.no_sync(self.model) if quiet else nullcontext():
            yield

    def _summed(self, total: Tensor) -> Tensor:
        """Return a sum over all processes."""
        if self.accelerator.num_processes == 1:
            return total
        where = total.float() if self.device.type == "mps" else total
        return self.accelerator.reduce(where.to(self.device), "sum").cpu()  # type: ignore[no-any-return]


def check_processes(course: Course, num_processes: int) -> None:
    """Check that every process gets as many windows of a step as the others.

    Raises:
        RecipeError: the batch is not divisible.
    """
    if course.batch % num_processes:
        raise RecipeError(
            f"recover.batch: {course.batch} windows cannot be shared evenly by {num_processes} "
            f"processes. Type --batch {-(-course.batch // num_processes) * num_processes}."
        )


def _history(data: Mapping[str, Any]) -> History:
    pairs = {key: [(int(a), float(b)) for a, b in data[key]] for key in ("training", "held")}
    return History(**pairs, tokens=int(data["tokens"]), seconds=float(data["seconds"]))


def _diverged(step: int, loss: float, saved: Saved) -> NumericalError:
    """Return the error for a loss that is not finite."""
    newest = saved.newest()
    kept = f"The state after step {newest['step']} is kept" if newest else "Nothing was saved yet"
    return NumericalError(
        f"recover: the loss of step {step + 1} is {loss}. {kept}, and no result is written. A "
        "lower --learning-rate helps, with --overwrite to begin again."
    )
