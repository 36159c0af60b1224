"""A whole recipe: its stages in order, each a run of its own that makes the next one's model."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmprune.base.errors import RecipeError
from llmprune.base.progress import Progress
from llmprune.base.world import is_first
from llmprune.calibration.presence import check_texts
from llmprune.checkpoint.source import read_json
from llmprune.engine.opening import default_out, open_plan
from llmprune.engine.records import OWN, check_same_run
from llmprune.pushing import carry_out, check_wish
from llmprune.recovering import run_recovery
from llmprune.recovery.planning import open_recovery
from llmprune.report.run import Report
from llmprune.steps import run_together

if TYPE_CHECKING:
    from torch import Tensor

    from llmprune.calibration.mix import Windows
    from llmprune.engine.budgets import Budget
    from llmprune.recipe import Recipe


def run_recipe(
    recipe: Recipe,
    progress: Progress,
    *,
    tokens: Tensor | Windows | None = None,
    overwrite: bool = False,
    budget: Budget | None = None,
) -> Report | None:
    """Carry out all stages of a recipe, then push where it says so; None in all processes but the
    first.

    What stages before the last one write lies in OUT.stages until the last one is proven, so that
    the same call again goes on where an earlier one stopped.

    Raises:
        LlmpruneError: nothing is published, and the source is as it was.
    """
    check_wish(recipe)
    wished, recipe = recipe.push, recipe.without_push()
    stages = recipe.stages()
    if len(stages) == 1:
        report = _run(stages[0], progress, tokens=tokens, overwrite=overwrite, budget=budget)
    else:
        report = _run_stages(recipe, progress, tokens=tokens, overwrite=overwrite, budget=budget)
    carry_out(wished, report, progress)
    return report


def _run_stages(
    recipe: Recipe,
    progress: Progress,
    *,
    tokens: Tensor | Windows | None,
    overwrite: bool,
    budget: Budget | None,
) -> Report | None:
    """Carry out the stages of a recipe, each on what the one before wrote."""
    stages = recipe.stages()
    out = result_folder(recipe)
    home = out.with_name(out.name + ".stages")
    chain = {"steps": recipe.to_dict()["steps"], "model": recipe.model}
    if not overwrite and (out / OWN / "report.json").exists():
        _check_chain(out, chain)
        progress.note(f"{out} already holds this result; nothing to do")
        return Report.read(out) if is_first() else None
    if overwrite and is_first():
        shutil.rmtree(home, ignore_errors=True)
    report: Report | None = None
    model = recipe.model
    for place, stage in enumerate(stages):
        last = place == len(stages) - 1
        folder = out if last else home / stage_name(place, stage)
        told = {"model": model, "out": str(folder)} | ({"revision": None} if place else {})
        progress.note(f"stage {place + 1} of {len(stages)}: {stage_name(place, stage)}")
        report = _run(
            stage.model_copy(update=told),
            progress,
            tokens=tokens,
            overwrite=overwrite and last,
            budget=budget if place == 0 else None,
            chain=chain if last else None,
        )
        model = str(folder)
    if is_first():
        shutil.rmtree(home, ignore_errors=True)
    return report


def result_folder(recipe: Recipe) -> Path:
    """Return the folder of a recipe's result: as asked, or named for what is done."""
    if recipe.out:
        return Path(recipe.out).expanduser()
    if recipe.stages()[0].recover is not None:
        return Path(f"{Path(recipe.model.rstrip('/')).name}-recovered")
    first = default_out(recipe)
    return first.with_name(f"{first.name}-recovered") if recipe.recover else first


def stage_name(place: int, stage: Recipe) -> str:
    """Return the name of a stage: its number and its kind.

    >>> from llmprune.recipe import build
    >>> stage_name(0, build({"model": "demo", "steps": [{"prune": {"sparsity": 0.5}}]}))
    '1-prune'
    """
    return f"{place + 1}-{'recover' if stage.recover is not None else 'prune'}"


def plans_of(recipe: Recipe) -> list[Any]:
    """Return the plan of the first stage, and of later ones what can be said without a model.

    Raises:
        LlmpruneError: the first cannot be carried out, or a text is not where the recipe says.
    """
    stages = recipe.stages()
    first = stages[0]
    found: Any
    if first.recover is not None:
        found = replace(open_recovery(first), recipe=recipe)
        check_texts(recipe, calibrates=False)
    else:
        found = replace(open_plan(first).plan, recipe=recipe)
        check_texts(recipe, calibrates=found.forward)
    then = [_told(stage) for stage in stages[1:]]
    if recipe.push is not None:
        then.append({"push": recipe.push.model_dump(mode="json", exclude_defaults=True)})
    return [found, *then]


def later_lines(later: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return a line for each later stage that `plans_of` gives, and for the push.

    >>> later_lines([{"recover": {"steps": 4}}, {"push": {"repo": "me/small"}}])
    ['then     recover: steps 4', 'then     push: repo me/small']
    """
    lines = []
    for stage in later:
        for kind, wish in stage.items():
            settings = ", ".join(f"{key} {value}" for key, value in wish.items())
            lines.append(f"then     {kind}: {settings or 'as usual'}")
    return lines


def _told(stage: Recipe) -> dict[str, Any]:
    step = stage.steps[0]
    kind = "recover" if step.recover is not None else "prune"
    wish = step.recover or step.prune
    assert wish is not None
    return {kind: wish.model_dump(mode="json", exclude_defaults=True)}


def _run(
    stage: Recipe,
    progress: Progress,
    *,
    tokens: Tensor | Windows | None,
    overwrite: bool,
    budget: Budget | None = None,
    chain: Mapping[str, Any] | None = None,
) -> Report | None:
    """Carry out one stage."""
    if stage.recover is not None:
        import torch

        ids = tokens if isinstance(tokens, torch.Tensor) else None
        return run_recovery(stage, progress, tokens=ids, overwrite=overwrite, chain=chain)
    opened = open_plan(stage, budget=budget)
    return run_together(opened, progress, tokens=tokens, overwrite=overwrite, chain=chain)


def _check_chain(out: Path, chain: Mapping[str, Any]) -> None:
    """Check that a finished result is of the same recipe.

    Raises:
        RecipeError: it is not.
    """
    before = read_json(out / OWN / "run.json").get("chain")
    if before is None:
        raise RecipeError(
            f"out: {out} holds the result of one step, not of this recipe. Choose another folder "
            "with --out, or add --overwrite."
        )
    check_same_run({"recipe": before}, {"recipe": chain}, f"{out} holds the result")
