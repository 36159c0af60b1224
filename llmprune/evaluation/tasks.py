"""Tasks of lm-evaluation-harness, by name or by file, found and read before a model is."""

from __future__ import annotations

import difflib
import io
import logging
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from llmprune.base.errors import RecipeError, UnknownName, first_line

OWN = Path(__file__).parents[1] / "demo" / "tasks"  # as they are installed
CHECKOUT = Path(__file__).parents[2] / "eval" / "tasks"  # where they are written
OFFLINE = ("demo_cloze", "demo_sentences", "demo_last_word")  # of the demo's text; no download
PARTS = ("tasks", "groups", "group_map")  # of what lm_eval makes of task names


def open_tasks(
    wanted: Sequence[str], *, include_path: str | Path | None = None, num_fewshot: int | None = None
) -> dict[str, Any]:
    """Return lm_eval's tasks for names, globs of names and YAML files, with their data read.

    The tasks that llmprune brings (`OFFLINE`) are known by name. Data files that a YAML names by a
    relative path are looked for beside it, then in the working directory. The 14,000 tasks that
    lm_eval brings are only searched (some 10 s) where a name is not in `include_path`.
    `num_fewshot` does not change tasks whose own is fixed at 0.

    Raises:
        UnknownName: no task is called so; has the near match.
        RecipeError: a file or folder is not there, or a task's data cannot be read.
    """
    folder = _include(include_path)
    wanted = [_brought(name) if folder is None else name for name in wanted]
    if not wanted:
        raise RecipeError(f"tasks: none. Name one or more, as in --tasks {OFFLINE[0]}.")
    with hushed():
        manager = _manager(wanted, folder)
        loaded: dict[str, Any] = {part: {} for part in PARTS}
        for name in wanted:
            for spec, home in _specs(name, manager):
                found = _load(manager, spec, home)
                for part in PARTS:
                    loaded[part].update(found.get(part) or {})
    for name, task in loaded["tasks"].items():
        _check(name, task)
        own = task.get_config("num_fewshot")
        if own is None or (num_fewshot is not None and own != 0):
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
    return loaded


@contextmanager
def hushed() -> Iterator[list[str]]:
    """Keep lm_eval's log, and except on a terminal its progress bars, away; yield its warnings."""
    said: list[str] = []
    keeper = logging.Handler(logging.WARNING)
    keeper.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("lm_eval")
    before = logger.handlers, logger.level, logger.propagate
    logger.handlers, logger.level, logger.propagate = [keeper], logging.WARNING, False
    stream = sys.stderr if sys.stderr.isatty() else io.StringIO()
    try:
        with redirect_stderr(stream), redirect_stdout(stream):
            yield said
    finally:
        logger.handlers, logger.level, logger.propagate = before


def _include(include_path: str | Path | None) -> Path | None:
    if include_path is None:
        return None
    folder = Path(include_path).expanduser().resolve()
    if not folder.is_dir():
        raise RecipeError(
            f"include_path: {include_path} is no folder. Give the folder that holds your tasks' "
            "YAML files."
        )
    return folder


def _brought(name: str) -> str:
    """Return the file of a task that llmprune brings, and other names as they are."""
    for home in (OWN, CHECKOUT):
        if name in OFFLINE and (home / f"{name}.yaml").is_file():
            return str(home / f"{name}.yaml")
    return name


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def _words(path: Path) -> str:
    """Return a file as text, whatever is in it; lm_eval itself says what is wrong with it."""
    return path.read_text("utf-8", errors="replace")


def _manager(wanted: Iterable[str], folder: Path | None) -> Any:
    """Return lm_eval's index of tasks, the smallest that knows all names."""
    from lm_eval.tasks import TaskManager

    own = TaskManager(include_path=folder, include_defaults=False)
    for name in wanted:
        if _is_file(name):
            path = Path(name).expanduser()
            complete = path.is_file() and not re.search(r"^group:", _words(path), re.M)
        else:
            found = own.match_tasks([name])
            complete = bool(found) and not set(found) & set(own.all_groups)
        if not complete and (not _is_file(name) or Path(name).expanduser().is_file()):
            return TaskManager(include_path=folder, include_defaults=True)
    return own


def _specs(name: str, manager: Any) -> list[tuple[str, Path | None]]:
    """Return what lm_eval is to load for a name, each with the folder that its data lie in.

    Raises:
        UnknownName, RecipeError: there is nothing.
    """
    if _is_file(name):
        path = Path(name).expanduser().resolve()
        if not path.is_file():
            raise RecipeError(f"tasks: there is no file {name}. Give a task's YAML file or name.")
        return [(str(path), path.parent)]
    found = manager.match_tasks([name])
    if not found:
        near = difflib.get_close_matches(name, [*manager.all_tasks, *OFFLINE], n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UnknownName(
            f"tasks: {name!r} is no task of lm-eval.{hint} `lm-eval ls tasks` lists them; your own "
            "are found by their YAML file, or by name with --include-path FOLDER."
        )
    homes = [manager.task_index[spec].yaml_path for spec in found]
    return [
        (spec, Path(home).parent.resolve() if home else None)
        for spec, home in zip(found, homes, strict=True)
    ]


def _load(manager: Any, spec: str, home: Path | None) -> dict[str, Any]:
    """Read a task and its data.

    Raises:
        RecipeError: it cannot be read.
    """
    try:
        try:
            with chdir(home or Path.cwd()):
                found: dict[str, Any] = manager.load([spec])
        except FileNotFoundError:  # lm_eval itself looks in the working directory
            found = manager.load([spec])
    except Exception as error:  # whatever a task's own code, its data's format or the Hub raises
        first = first_line(error)
        raise RecipeError(
            f"tasks: {spec} or its data cannot be read ({type(error).__name__}: {first}). Data on "
            "the Hub need a connection, or the local cache of an earlier one. Without, try "
            f"--tasks {','.join(OFFLINE)}, which llmprune brings."
        ) from error
    return found


def _check(name: str, task: Any) -> None:
    """Check that a task can be run here.

    Raises:
        RecipeError: it runs code that the model writes, or shows pictures.
    """
    if getattr(task, "UNSAFE_CODE", False):
        raise RecipeError(
            f"tasks: {name} runs the code that the model writes, which llmprune does not. Leave it "
            "out, or run it with lm-eval itself."
        )
    if getattr(task, "MULTIMODAL", False):
        raise RecipeError(f"tasks: {name} needs more than text. Leave it out.")
