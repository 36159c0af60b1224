"""Data sets on the Hugging Face Hub: one commit, only files without code, only what is read."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llmprune.base.errors import RecipeError
from llmprune.base.registry import unknown
from llmprune.calibration.files import Part, Row, table_rows
from llmprune.calibration.presets import PRESETS, Preset
from llmprune.calibration.refusals import CONVERTED, hub_errors, is_unreachable
from llmprune.calibration.selection import HUB, sibling, suffix_of
from llmprune.recipe.texts import Portion

_TIMEOUT = 15.0  # seconds for the first answer
_BLOCK = 1 << 20  # bytes fetched at once of a file that is read from its start
_RETRIES = 2  # of a read that breaks off, each after the client's own

Use = Literal["calibration", "evaluation"]


@dataclass(frozen=True, kw_only=True)
class HubText:
    """A split of a repository at a commit: its files by URL, or by path where they are cached.

    `stream` reads it where its files are of another kind than Parquet and JSON.
    """

    name: str
    repo: str
    commit: str
    split: str
    config: str | None
    key: str
    columns: tuple[str, ...] | None
    files: tuple[str | Path, ...]
    stream: Callable[[], Iterator[Row]] | None = None

    def parts(self, seed: int | None) -> Iterator[Part]:
        """Yield the split as one part, its files in an order drawn by ``seed``."""
        yield Part(name=f"{self.name}, split {self.split}", read=lambda: self._rows(seed))

    def record(self) -> dict[str, Any]:
        """Return what a report says of the text."""
        paths = [file.as_posix() if isinstance(file, Path) else file for file in self.files[:16]]
        marks = (f"@{self.commit}/", f"/{self.commit}/")
        files = [re.split("|".join(map(re.escape, marks)), path)[-1] for path in paths]
        found = {"repo": self.repo, "commit": self.commit, "config": self.config}
        return found | {"split": self.split, "files": files}

    def _rows(self, seed: int | None) -> Iterator[Row]:
        with hub_errors(self.name, self.key):
            if self.stream is not None:
                with _fewer_retries():
                    yield from self.stream()
                return
            files = list(self.files)
            if seed is not None:
                random.Random(seed).shuffle(files)
            for file in files:
                yield from _rows_of(file, self.columns)


def open_hub_text(wish: Portion, key: str, *, use: Use = "calibration") -> HubText:
    """Open a preset, or any data set on the Hub, at the commit that its revision means now.

    Raises:
        RecipeError: not found, gated, not reachable, a script; no such revision, config or split.
    """
    preset = PRESETS.get(wish.data)
    name = wish.data.removeprefix(HUB)
    with hub_errors(name if preset is None else f"{name} ({preset.repo})", key):
        return _open_preset(wish, preset, key, use) if preset else _open_any(wish, name, key, use)


def _open_preset(wish: Portion, preset: Preset, key: str, use: Use) -> HubText:
    """Open the literal files of a preset; from the cache where they are in it."""
    if wish.config is not None:
        raise RecipeError(
            f"{sibling(key, 'config')}: {wish.data} is one fixed part of {preset.repo}. For "
            f"another type the data set itself: `{preset.repo}` with config {wish.config!r}."
        )
    split = wish.split or (preset.split if use == "calibration" else preset.evaluation)
    if split is None:
        raise RecipeError(
            f"{key}: {wish.data} has no text that is kept for evaluation. Use wikitext2, c4, demo "
            "or a file."
        )
    if split not in preset.files:
        raise unknown(sibling(key, "split"), split, preset.files)
    patterns = preset.files[split]
    try:
        commit = _commit(preset.repo, wish.revision)
    except Exception as error:
        commit, cached = _cached(preset.repo, wish.revision, patterns)
        if not cached or not is_unreachable(error):
            raise
    else:
        cached = _cached(preset.repo, commit, patterns)[1]
    return HubText(
        name=wish.data,
        repo=preset.repo,
        commit=commit,
        split=split,
        config=None,
        key=key,
        columns=(wish.column,) if wish.column else preset.columns,
        files=cached or _urls(preset.repo, commit, patterns),
    )


def _open_any(wish: Portion, repo: str, key: str, use: Use) -> HubText:
    """Open a data set as its page describes it."""
    from datasets import load_dataset_builder

    commit = _commit(repo, wish.revision)
    converted = wish.revision == CONVERTED
    try:
        builder = load_dataset_builder(
            repo,
            name=None if converted else wish.config,
            data_dir=wish.config if converted else None,
            revision=commit,
        )
    except ValueError as error:
        raise _config_error(wish, repo, commit, key) or error from None
    found = {str(name): urls for name, urls in (builder.config.data_files or {}).items()}
    split = _split(wish.split, list(found), repo, key, use)
    files = tuple(str(url) for url in found[split])
    return HubText(
        name=repo,
        repo=repo,
        commit=commit,
        split=split,
        config=wish.config or builder.config.name,
        key=key,
        columns=(wish.column,) if wish.column else None,
        files=files,
        stream=None
        if all(suffix_of(file) not in (None, ".txt") for file in files)
        and getattr(builder.config, "field", None) is None
        else lambda: iter(builder.as_streaming_dataset(split=split)),
    )


def _split(asked: str | None, splits: list[str], repo: str, key: str, use: Use) -> str:
    """Return the split that is asked for, or what its use usually takes.

    Raises:
        RecipeError: there is no such split, or several that could be meant.
    """
    if asked is not None:
        if asked not in splits:
            raise unknown(sibling(key, "split"), asked, splits)
        return asked
    usual = ("train",) if use == "calibration" else ("test", "validation")
    wanted = [split for name in usual for split in splits if split.split("_")[0] == name]
    if wanted:
        return min(wanted, key=lambda split: (usual.index(split.split("_")[0]), len(split)))
    if len(splits) == 1:
        return splits[0]
    listed = ", ".join(splits)
    raise RecipeError(
        f"{key}: which split of {repo} is meant? The splits: {listed}. "
        f"Type `{sibling(key, 'split')}={splits[0]}`."
    )


def _config_error(wish: Portion, repo: str, commit: str, key: str) -> RecipeError | None:
    """Return what is wrong with the config, if the data set has several."""
    from datasets import get_dataset_config_names

    names = get_dataset_config_names(repo, revision=commit)
    place = sibling(key, "config")
    if wish.config is not None:
        return unknown(place, wish.config, names) if wish.config not in names else None
    if len(names) < 2:
        return None
    return RecipeError(
        f"{place}: {repo} has several parts: {', '.join(names[:20])}"
        f"{', ...' if len(names) > 20 else ''}. Type `{place}={names[0]}`."
    )


def _commit(repo: str, revision: str | None) -> str:
    from huggingface_hub import HfApi

    found = HfApi().dataset_info(repo, revision=revision, timeout=_TIMEOUT, expand=["sha"])
    return str(found.sha)


def _cached(
    repo: str, revision: str | None, patterns: Sequence[str]
) -> tuple[str, tuple[Path, ...]]:
    """Return commit and files that were downloaded before; no files where any is missing."""
    from huggingface_hub import snapshot_download

    try:
        home = Path(
            snapshot_download(
                repo,
                repo_type="dataset",
                revision=revision,
                allow_patterns=list(patterns),
                local_files_only=True,
            )
        )
    except Exception:  # whatever the cache lacks, the Hub's own answer says it better
        return "", ()
    found = [sorted(home.glob(pattern)) for pattern in patterns]
    whole = all(found) and not any("*" in pattern for pattern in patterns)
    return home.name, tuple(path for files in found for path in files) if whole else ()


def _urls(repo: str, commit: str, patterns: Sequence[str]) -> tuple[str, ...]:
    """Return the files of a repository that globs mean, as URLs of the client's file system."""
    from huggingface_hub import HfFileSystem

    home = f"datasets/{repo}@{commit}"
    found = [sorted(HfFileSystem().glob(f"{home}/{pattern}")) for pattern in patterns]
    if not all(found):
        raise FileNotFoundError(repo)
    return tuple(f"hf://{path}" for paths in found for path in paths)


def _rows_of(file: str | Path, columns: Sequence[str] | None) -> Iterator[Row]:
    """Yield the rows of a file here or on the Hub, of which ranges are fetched when needed."""
    if isinstance(file, Path):
        with file.open("rb") as here:
            yield from table_rows(here, str(file), columns)
        return
    from huggingface_hub import HfFileSystem

    # Parquet is read in exact ranges, JSON from its start in blocks.
    cache = {"cache_type": "none"} if suffix_of(file) == ".parquet" else {"block_size": _BLOCK}
    with HfFileSystem().open(file, "rb", **cache) as there:
        yield from table_rows(there, file, columns)


@contextmanager
def _fewer_retries() -> Iterator[None]:
    """Let the client give up within minutes; by itself it tries 20 times with pauses between."""
    from datasets import config

    names = ("STREAMING_READ_MAX_RETRIES", "STREAMING_OPEN_MAX_RETRIES")
    before = {name: getattr(config, name) for name in names}
    try:
        for name in names:
            setattr(config, name, _RETRIES)
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)
