"""A result to the Hub, with its page; where a recipe asks for it, checked before the first step."""

from __future__ import annotations

import shlex
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from llmprune.base.errors import CheckpointError, LlmpruneError
from llmprune.base.world import is_first
from llmprune.pages.analysis_shared import analysis_files
from llmprune.pages.result import report_page
from llmprune.report.publishing import Package, pack
from llmprune.report.uploading import Pushed, check_repository, upload

if TYPE_CHECKING:
    from llmprune.base.progress import Progress
    from llmprune.recipe import Recipe
    from llmprune.recipe.publication import PushStep
    from llmprune.report.run import Report


def package_of(folder: str | PathLike[str], repo: str, *, base_model: str | None = None) -> Package:
    """Decide what of a result goes to a repository, its page and its analysis too.

    Raises:
        LlmpruneError: as `pack` does.
    """
    home = Path(folder).expanduser()
    return pack(home, repo, base_model=base_model, page=report_page, analysis=analysis_files)


def check_wish(recipe: Recipe) -> None:
    """Check that the last step of a recipe, if that pushes, will be allowed to.

    Raises:
        LlmpruneError: no token, one that may only read, or a repository that takes no result.
    """
    wish = recipe.push
    if wish is None:
        return
    try:
        check_repository(
            wish.repo, private=wish.private, create_pr=wish.create_pr, revision=wish.revision
        )
    except LlmpruneError as error:
        raise type(error)(
            f"steps[{len(recipe.steps) - 1}].push: {error} Or leave the step out, and push the "
            "result later with `llmprune push`."
        ) from None


def carry_out(wish: PushStep | None, report: Report | None, progress: Progress) -> Pushed | None:
    """Push a finished result as a step says; None where there is none, and in other processes.

    Raises:
        CheckpointError: the Hub refuses or cannot be reached; the result stays whole.
    """
    if wish is None or report is None or report.out is None or not is_first():
        return None
    try:
        package = package_of(report.out, wish.repo, base_model=wish.base_model)
        done = upload(
            package,
            private=wish.private,
            message=wish.message,
            create_pr=wish.create_pr,
            revision=wish.revision,
        )
    except LlmpruneError as error:
        raise CheckpointError(
            f"{error} The result is finished, in {report.out}; the same command again only pushes, "
            f"and so does `{command_of(wish, report.out)}`."
        ) from None
    progress.note(f"pushed to {done.url}, {done.num_checked} files as they are here")
    progress.event("pushed", **done.to_dict())
    return done


def command_of(wish: PushStep, folder: Path) -> str:
    """Return the command that pushes a folder as a step says."""
    words = ["llmprune", "push", str(folder), wish.repo]
    words += ["--private"] * wish.private + ["--create-pr"] * wish.create_pr
    for flag in ("base_model", "message", "revision"):
        if (value := getattr(wish, flag)) is not None:
            words += [f"--{flag.replace('_', '-')}", value]
    return shlex.join(words)
