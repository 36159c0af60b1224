"""The training loop: steps of AdamW over windows of tokens, saved, resumed and shared alike.

A step reads `batch` windows, whatever the number of processes and the micro-batch: its loss is the
mean over all its tokens. Legend: B windows of a micro-batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from llmprune.base.errors import NumericalError
from llmprune.base.progress import Progress
from llmprune.evaluation.windows import IGNORED
from llmprune.recovery.attaching import Trainee
from llmprune.recovery.examples import Examples
from llmprune.recovery.objective import Objective, next_token_loss
from llmprune.recovery.rates import rate_factor
from llmprune.recovery.saved import Saved
from llmprune.recovery.shaping import Moves

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor

BETAS = (0.9, 0.999)


@dataclass(frozen=True, kw_only=True)
class Course:
    """How long and how fast to train.

    `micro_batch` windows are read at once in each process; every `evaluate_every` steps the loss of
    what is held out is measured, every `save_every` steps the state is written. `half` computes
    in bfloat16.
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
    rounds: int = 1
    half: bool = False

    def rate(self, step: int) -> float:
        """Return the learning rate of a step; it runs its course anew in each of equal rounds."""
        length = -(-self.steps // self.rounds)
        place, own = step % length, min(length, self.steps - step // length * length)
        return self.learning_rate * rate_factor(place, own, self.decay, self.warm_up)


@dataclass(kw_only=True)
class History:
    """What was seen on the way: (finished steps, loss) of training and of what is held out."""

    training: list[tuple[int, float]] = field(default_factory=list)
    held: list[tuple[int, float]] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        pairs = {key: [list(pair) for pair in getattr(self, key)] for key in ("training", "held")}
        return vars(self) | pairs


def train(
    trainee: Trainee,
    examples: Examples,
    course: Course,
    saved: Saved,
    progress: Progress,
    accelerator: Accelerator,
    objective: Objective | None = None,
    shaping: Moves | None = None,
    resume: Mapping[str, Any] | None = None,
) -> History:
    """Train, or go on from a saved state, to the last step; `shaping` moves masks on the way.

    Raises:
        NumericalError: the loss is not finite; the last saved state stays.
    """
    objective = objective or Objective()
    optimizer = torch.optim.AdamW(
        list(trainee.params.values()),
        lr=course.learning_rate,
        betas=BETAS,
        weight_decay=course.weight_decay,
    )
    history, first = History(), 0
    if resume is not None:
        masks = saved.restore(resume, trainee.params, optimizer)
        history, first = _history(resume["history"]), int(resume["step"])
        objective.scale = resume["scale"]
        if shaping is not None:
            shaping.restore(masks)
    if shaping is not None:
        shaping.begin(optimizer)
    run = _Run(trainee, examples, course, accelerator, objective, shaping)
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
            told: dict[str, Any] = {}
            if done % course.evaluate_every == 0 or done == course.steps:
                history.held.append((done, run.held_loss()))
                told["held_out"] = history.held[-1][1]
            if accelerator.is_main_process and (
                done % course.save_every == 0 and done < course.steps
            ):
                facts = {"history": history.to_dict(), "scale": objective.scale}
                masks = shaping.state() if shaping is not None else {}
                saved.write(done, trainee.params, optimizer, facts, masks)
            rate = history.tokens / max(history.seconds, 1e-9)
            stage.advance(f"loss {loss:.4f}", **told, tokens_per_second=round(rate))
    if shaping is not None:
        shaping.finish()
    return history


class _Run:
    """The model, its data and its processes, for one step at a time."""

    def __init__(
        self, trainee: Trainee, examples: Examples, course: Course, accelerator: Accelerator,
        objective: Objective, shaping: Moves | None,
    ) -> None:  # fmt: skip
        self.trainee, self.examples, self.course = trainee, examples, course
        self.accelerator, self.objective, self.shaping = accelerator, objective, shaping
        self.model = accelerator.prepare_model(trainee.model)
        self.device = accelerator.device

    def step(self, step: int, optimizer: torch.optim.Optimizer) -> tuple[float, int]:
        """Take one step; return the mean loss over its tokens, of all processes, and how many."""
        if self.shaping is not None:
            self.shaping.before_step(step)
        windows = self.examples.of_step(step, self.course.batch)
        count = int((self.examples.targets_NT[windows] != IGNORED).sum())
        loss = self._backward(windows, count, optimizer)
        if self.shaping is not None:
            self.shaping.see_gradients(step)
        self.trainee.mask_gradients()
        torch.nn.utils.clip_grad_norm_(list(self.trainee.params.values()), self.course.clip)
        for group in optimizer.param_groups:
            group["lr"] = self.course.rate(step)
        optimizer.step()
        self.trainee.hold()
        if self.shaping is not None:
            self.shaping.after_update(step + 1)
        return loss, count

    def _backward(self, windows: list[int], count: int, optimizer: torch.optim.Optimizer) -> float:
        """Gather the gradients of a step; return its mean loss."""
        optimizer.zero_grad(set_to_none=True)
        parts = list(self._parts(windows))
        total = torch.zeros((), dtype=torch.float64)
        for place, part in enumerate(parts):
            with self._quiet(place < len(parts) - 1):
                loss = self._loss(part)
                # DDP averages over processes, and the loss is of all their tokens
                scaled = loss * (self.accelerator.num_processes / max(1, count))
                self.accelerator.backward(scaled)
            total += loss.detach().double().cpu()
        return float(self._summed(total)) / max(1, count)

    def halved(self) -> torch.autocast:
        """Compute in bfloat16, where that is asked for: norms and losses stay in float32."""
        kind = self.device.type
        return torch.autocast(kind, dtype=torch.bfloat16, enabled=self.course.half)

    def held_loss(self) -> float:
        """Return the mean loss of what is held out."""
        total, count = torch.zeros((), dtype=torch.float64), 0
        with torch.no_grad():
            for part in self._parts(list(self.examples.held)):
                ids_BT, targets_BT = self._batch(part)
                # without DDP, whose forward is a conversation: shares may differ by a window
                with self.halved():
                    logits = self.trainee.model(input_ids=ids_BT, use_cache=False).logits
                total += next_token_loss(logits, targets_BT).double().cpu()
        count = int((self.examples.targets_NT[list(self.examples.held)] != IGNORED).sum())
        return float(self._summed(total)) / max(1, count)

    def _loss(self, windows: list[int]) -> Tensor:
        ids_BT, targets_BT = self._batch(windows)
        self.objective.begin()
        with self.halved():
            output = self.model(input_ids=ids_BT, use_cache=False)
        return self.objective.loss(output, windows, targets_BT)

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
