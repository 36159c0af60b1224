"""What all cells of a grid share: calibration windows, the question, the dense model's answer,
gradients, statistics of the dense model; made once by whichever process comes first, and kept in
OUT/work.

Shapes: N windows, T tokens in each.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock
from safetensors.torch import load_file

from llmprune.asking import evaluation_question
from llmprune.base.progress import Progress
from llmprune.calibration.mix import Windows, wish_hash
from llmprune.calibration.windows import token_hash
from llmprune.checkpoint.sink import copy_file, write_json, write_tensors
from llmprune.checkpoint.source import open_folder, read_json
from llmprune.collecting import collect
from llmprune.comparison.grid import Grid
from llmprune.delivery.heterogeneous import is_own_code
from llmprune.engine.calibrating import check_tokens, leaked_share, opened_windows, run_text
from llmprune.engine.folder import what_fixes
from llmprune.engine.gradients import take_gradients
from llmprune.engine.opening import Opened, open_blocks, open_plan
from llmprune.engine.records import Records
from llmprune.engine.sites import linears_of
from llmprune.evaluation.nearness import keep_dense, measure_nearness
from llmprune.evaluation.perplexity import Question
from llmprune.evaluation.windows import Windows as Asked
from llmprune.measuring import evaluate
from llmprune.walk.streamed import Streamed

WINDOWS, DENSE, GRADIENTS = "calibration windows", "dense baseline", "gradients"
STATISTICS = "statistics of the dense model"


@dataclass(frozen=True)
class Shared:
    """The folder of a comparison, its grid, and what its cells share."""

    home: Path
    grid: Grid

    @property
    def work(self) -> Path:
        return self.home / "work"

    @cached_property
    def first(self) -> Opened:
        """Return the first cell's plan as a run that measures would make it."""
        recipe = self.grid.recipe(self.grid.cells[0], str(self.home / "dense"), measured=True)
        return open_plan(recipe)

    @cached_property
    def question(self) -> tuple[Question, int]:
        """Return what every model is asked, and how many windows at a time.

        Raises:
            RecipeError: there is no text, or it is too short.
        """
        path, facts = self.work / "evaluation.safetensors", self.work / "evaluation.json"
        with self.alone("evaluation"):
            if not facts.exists():
                question = evaluation_question(_insisting(self.first), Progress("quiet"))
                assert question is not None  # the recipe insists
                micro_batch = self.first.plan.estimate.micro_batch
                write_tensors(path, question.windows._asdict())
                told = {
                    "seq_len": question.seq_len,
                    "stride": question.stride,
                    "bos": question.bos,
                    "tokenizer_adds_bos": question.tokenizer_adds_bos,
                    "data": question.data,
                }
                write_json(facts, {"question": told, "micro_batch": micro_batch})
        found = read_json(facts)
        windows = Asked(**load_file(path))
        return Question(windows=windows, **found["question"]), int(found["micro_batch"])

    @cached_property
    def dense(self) -> dict[str, Any]:
        """Return what the dense model says: loss, perplexity, tasks, parameters, protocol."""
        path = self.home / "dense.json"
        with self.alone("dense"):
            if not path.exists():
                opened = self.first
                with self.timed(DENSE, "all"):
                    nats, count = self._walk_dense()
                    found = self.told(opened, nats, count) | {"kl": [0.0, None]}
                    found |= {"tasks": self.scores(self.grid.model)}
                write_json(path, found | {"parameters": opened.plan.num_params})
        return read_json(path)

    def measured(self, blocks: Streamed, opened: Opened) -> dict[str, Any]:
        """Return loss, perplexity and KL from the dense model of blocks on the one question, all of
        one walk."""
        question, micro_batch = self.question
        with self.alone("dense"):
            if not (self.states / "whole").exists():  # a grid that was finished has grown
                self._walk_dense()
        found = measure_nearness(
            self._computing(blocks, opened),
            question.windows,
            self._computing(self.first.blocks, self.first),
            self.states,
            micro_batch=micro_batch,
        )
        return self.told(opened, found.nats, found.count) | {"kl": [found.kl, found.stderr]}

    @property
    def states(self) -> Path:
        """Return the folder of the dense model's hidden states after all blocks."""
        return self.work / "dense-states"

    def told(self, opened: Opened, nats: float, count: int) -> dict[str, Any]:
        """Return what a summed loss says, and of which question."""
        question = self.question[0]
        answer = question.answer(nats, count, dtype=opened.plan.dtype)
        told = {"loss": nats / count, "perplexity": answer.value, "protocol": answer.protocol}
        return told | {"tokens": token_hash(question.windows.inputs_NT)}

    def _walk_dense(self) -> tuple[float, int]:
        """Return the dense model's (summed loss, predicted tokens); keep its hidden states."""
        question, micro_batch = self.question
        blocks = self._computing(self.first.blocks, self.first)
        found = keep_dense(blocks, question.windows, self.states, micro_batch=micro_batch)
        (self.states / "whole").touch()
        return found

    @staticmethod
    def _computing(blocks: Streamed, opened: Opened) -> Streamed:
        return replace(blocks, device=opened.plan.device, dtype=opened.plan.dtype)

    def result_blocks(self, folder: Path, opened: Opened) -> Streamed:
        """Open a result for walking; its own code runs where it is what llmprune ships."""
        trust = opened.plan.recipe.trust_remote_code or is_own_code(folder)
        recipe = opened.plan.recipe.model_copy(update={"trust_remote_code": trust})
        return open_blocks(open_folder(folder), recipe, opened.plan.device, opened.plan.dtype)

    def scores(self, model: str | Path) -> dict[str, tuple[float, float | None]]:
        """Return scores with standard errors by task and metric; none where none is asked for."""
        if not self.grid.tasks:
            return {}
        own = isinstance(model, Path) and is_own_code(model)
        found = evaluate(
            model,
            list(self.grid.tasks),
            limit=self.grid.limit,
            baseline=None,
            device=self.grid.device,
            dtype=self.grid.dtype,
            revision=None if isinstance(model, Path) else self.grid.revision,
            trust_remote_code=self.grid.trust_remote_code or own,
        )
        (scores,) = found.scores.values()
        return {f"{score.task} {score.name}": (score.value, score.stderr) for score in scores}

    def windows(self, opened: Opened) -> tuple[str, Windows]:
        """Return the windows (N, T) of a cell's calibration and their key; read once for all cells
        that ask for the same.

        Raises:
            RecipeError: the text is not there, or is too short.
        """
        plan = opened.plan
        key = wish_hash(plan.recipe, plan.seq_len, opened.source.folder)[:16]
        path, facts = self.work / f"tokens-{key}.safetensors", self.work / f"tokens-{key}.json"
        with self.alone(f"tokens-{key}"):
            if not facts.exists():
                with self.timed(WINDOWS, key):
                    made = opened_windows(opened, Progress("quiet"))
                check_tokens(made.tokens, opened.blocks.model.config)
                asked_NT = self.question[0].windows.inputs_NT
                leak = leaked_share(made.tokens, asked_NT, Progress("quiet"))
                write_tensors(path, {"tokens": made.tokens})
                told = {"record": dict(made.record), "is_remote": made.is_remote, "leak": leak}
                write_json(facts, told | {"seed": plan.recipe.seed})
        found = read_json(facts)
        tokens = load_file(path)["tokens"]
        return key, Windows(tokens=tokens, record=found["record"], is_remote=found["is_remote"])

    def lend_gradients(self, opened: Opened, windows: Windows | None) -> str | None:
        """Put the gradients that a run would take first into its folder; return their key.

        They are taken once for all cells that need the same ones of the same windows. None where
        the run needs none, or has begun before.
        """
        plan, needs = opened.plan, opened.plan.parts.backward
        records = Records(out=Path(str(plan.out)))
        begun = records.run() is not None or (records.out / "llmprune" / "report.json").exists()
        if not needs or windows is None or begun:
            return None
        linears = [linears_of(groups) for groups in plan.groups]
        asked = [list(needs), linears, windows.record["tokens"]]
        key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]
        folder = self.work / f"gradients-{key}"
        with self.alone(f"gradients-{key}"):
            if not (folder / "whole").exists():
                folder.mkdir(parents=True, exist_ok=True)
                with self.timed(GRADIENTS, key):
                    take_gradients(
                        opened.blocks,
                        windows.tokens,
                        needs,
                        linears,
                        folder=folder,
                        room=plan.estimate.gradient_bytes,
                        progress=Progress("quiet"),
                        place=plan.estimate.gradient_place,
                    )
                (folder / "whole").touch()
        text = run_text(
            opened, records, Progress("quiet"), before=None, finished=False, given=windows
        )
        with records.lock():
            records.discard()
            records.begin(what_fixes(opened, None) | text.fixes, replaces=False)
            text.keep(records)
            records.survey.mkdir(parents=True, exist_ok=True)
            for file in folder.glob("gradients-*.safetensors"):
                _linked(file, records.survey / file.name)
        return key

    def collected(self, opened: Opened, windows: Windows) -> tuple[str, Path]:
        """Return the folder of what all cells learn of these windows, and its key; the dense model
        is walked once for all of them.

        Raises:
            LlmpruneError: they cannot be collected.
        """
        plan = opened.plan
        names = tuple(read_json(self.home / "grid.json")["statistics"])
        asked = [opened.source.fingerprint(), windows.record["tokens"], names, plan.dtype_name]
        key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]
        folder = self.work / f"statistics-{key}"
        with self.alone(f"statistics-{key}"):
            if not folder.exists():
                left = Records(out=folder).partial  # of a process that was killed
                shutil.rmtree(left, ignore_errors=True)
                with self.timed(STATISTICS, key):
                    collect(
                        *(plan.recipe, folder, Progress("quiet")),
                        tokens=windows.tokens,
                        names=names,
                    )
        return key, folder

    @contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """Hold what is shared against other processes, which wait."""
        path = self.work / "locks" / f"{name}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path):
            yield

    @contextmanager
    def timed(self, what: str, key: str) -> Iterator[None]:
        """Write down how long it took to make something that is shared."""
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        path = self.work / "times" / f"{what.replace(' ', '-')}-{key}.json"
        write_json(path, {"what": what, "key": key, "seconds": round(seconds, 3)})

    def seconds(self, what: str, key: str) -> float:
        """Return how long it took to make something that is shared."""
        path = self.work / "times" / f"{what.replace(' ', '-')}-{key}.json"
        return float(read_json(path)["seconds"]) if path.exists() else 0.0


def _insisting(opened: Opened) -> Opened:
    """Return an opened source whose recipe fails where perplexity cannot be measured."""
    recipe = opened.plan.recipe
    steps = tuple(
        step
        if step.evaluate is None
        else step.model_copy(
            update={"evaluate": step.evaluate.model_copy(update={"perplexity": True})}
        )
        for step in recipe.steps
    )
    wish = recipe.evaluate
    assert wish is not None
    plan = replace(
        opened.plan,
        recipe=recipe.model_copy(update={"steps": steps}),
        eval_windows=opened.plan.eval_windows or wish.num_windows,
    )
    return replace(opened, plan=plan)


def _linked(file: Path, target: Path) -> None:
    """Give a file a second name, or copy it where the disk has no such names."""
    try:
        os.link(file, target)
    except OSError:
        copy_file(file, target)
