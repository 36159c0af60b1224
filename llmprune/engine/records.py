"""The folder a run works in: what fixed the run, which blocks are whole, and the final rename.

    OUT.partial/  model-00001-of-00007.safetensors ...  llmprune/{run.json, masks-*, records/}

A block is whole when its record, written last, matches the hashes of its shard and its mask file.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmprune.base.errors import CheckpointError, RecipeError, first_line
from llmprune.checkpoint.sink import hash_file, settle, write_failed, write_json, write_tensors
from llmprune.checkpoint.source import damaged, read_json
from llmprune.mask.packed import PackedMask

if TYPE_CHECKING:
    from torch import Tensor

OWN = "llmprune"
OBEYED = ("micro_batch", "threads", "place", "budget")
TOLD = (
    *("wish", "chain", "text", "origin", "unused"),
    *("source.name", "source.revision", "source.folder"),
)


@dataclass(frozen=True, kw_only=True)
class Records:
    """Reads and writes the state of one run in its partial folder."""

    out: Path

    @property
    def partial(self) -> Path:
        return self.out.with_name(self.out.name + ".partial")

    @property
    def own(self) -> Path:
        return self.partial / OWN

    @property
    def survey(self) -> Path:
        """Where surveys keep what an interrupted run goes on from."""
        return self.own / "records" / "survey"

    def run(self) -> dict[str, Any] | None:
        """Return what fixed an unfinished run, if there is one."""
        path = self.own / "run.json"
        return read_json(path) if path.exists() else None

    @property
    def replaces(self) -> bool:
        """Tell whether the unfinished run was allowed to replace an existing result."""
        return (self.own / "records" / "replaces").exists()

    def begin(self, run: Mapping[str, Any], *, replaces: bool) -> None:
        """Make the folder and write what fixes the run."""
        self.own.mkdir(parents=True, exist_ok=True)
        if replaces:
            (self.own / "records").mkdir(exist_ok=True)
            (self.own / "records" / "replaces").touch()
        write_json(self.own / "run.json", run)

    def any_whole(self) -> bool:
        """Tell whether any block has a record."""
        return any((self.own / "records").glob("*.json"))

    def whole(self, index: int) -> dict[str, Any] | None:
        """Return a block's record if its shard and masks are what was recorded."""
        path = self._record(index)
        if not path.exists():
            return None
        record = read_json(path)
        for file, digest in record["files"].items():
            if not (self.partial / file).exists() or hash_file(self.partial / file) != digest:
                return None
        return record

    def write_masks(
        self, name: str, masks: Mapping[str, PackedMask], units: Mapping[str, Tensor]
    ) -> Path:
        """Write packed masks by linear and kept unit indices by site."""
        path = self.own / name.replace("model-", "masks-")
        tensors = {linear: mask.bits for linear, mask in masks.items()}
        kept_units = {site: kept.cpu() for site, kept in units.items()}
        write_tensors(path, tensors | kept_units, settled=False)
        return path

    def write(self, index: int, files: list[Path], content: Mapping[str, Any]) -> None:
        """Settle a block's files and record that it is whole; the last write of a block."""
        for path in files:
            settle(path)
        hashes = {str(path.relative_to(self.partial)): hash_file(path) for path in files}
        record = {**content, "files": hashes}
        write_json(self._record(index), record)

    def hashes(self) -> dict[str, str]:
        """Return the SHA-256 of every shard and mask file that a record vouches for."""
        found: dict[str, str] = {}
        for path in sorted((self.own / "records").glob("[0-9]*.json")):
            found |= read_json(path)["files"]
        return found

    def publish(self, *, overwrite: bool) -> None:
        """Give the proven folder its name; what it replaces is removed only after that."""
        aside = self.out.with_name(f".{self.out.name}.replaced-{os.getpid()}")
        if self.out.exists():
            if not any(self.out.iterdir()):
                self.out.rmdir()
            elif overwrite:
                os.replace(self.out, aside)
            else:
                raise CheckpointError(f"{self.out} appeared meanwhile and is not empty; rename it.")
        _sweep(self.partial)
        os.replace(self.partial, self.out)
        settle(self.out.parent)
        self.tidy()

    def tidy(self) -> None:
        """Remove what only a resumed run needs, and what a run that was killed left lying."""
        shutil.rmtree(self.out / OWN / "records", ignore_errors=True)
        _sweep(self.out)
        for aside in self.out.parent.glob(f".{escape(self.out.name)}.replaced-*"):
            shutil.rmtree(aside, ignore_errors=True)

    def discard(self) -> None:
        """Remove everything that the run wrote."""
        shutil.rmtree(self.partial, ignore_errors=True)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder against a second run.

        Raises:
            CheckpointError: another run works in it, or it cannot be written.
        """
        from filelock import FileLock, Timeout

        path = self.out.with_name(f".{self.out.name}.lock")
        made = [folder for folder in path.parents if not folder.exists()]
        lock = FileLock(path, timeout=0)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout as error:
            if not path.exists():
                raise write_failed(self.out, error) from None
            raise CheckpointError(
                f"another run is writing {self.out}. Wait for it, or choose another --out."
            ) from None
        except OSError as error:
            raise write_failed(self.out, error) from error
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            lock.release()
            for folder in made:
                with suppress(OSError):  # only what is still empty goes
                    folder.rmdir()

    def _record(self, index: int) -> Path:
        return self.own / "records" / f"{index + 1:05d}.json"


def _sweep(folder: Path) -> None:
    """Remove files that were still being written when a process was killed."""
    for path in (*folder.glob(".*.tmp"), *(folder / OWN).glob(".*.tmp")):
        path.unlink(missing_ok=True)


def check_files(folder: Path, hashes: Mapping[str, str]) -> None:
    """Check that the files of a result are what was written; all of them are read.

    Raises:
        CheckpointError: one is missing, cannot be read, or has other bytes.
    """
    for name, digest in hashes.items():
        try:
            same = hash_file(folder / name) == digest
        except OSError as error:
            raise damaged(folder / name, first_line(error)) from error
        if not same:
            raise CheckpointError(
                f"{folder / name} is not what was written there: its checksum differs from the one "
                "in the report, so the file was damaged or changed since. Make the result again "
                "with --overwrite."
            )


def check_out(out: Path, source: Path | None, *, overwrite: bool) -> None:
    """Check that a result may be written to a folder.

    Raises:
        RecipeError: it is the source, lies in it, is a file, or holds something already.
    """
    partial = out.with_name(out.name + ".partial")
    home = source.resolve() if source is not None else None
    for folder in (out, partial):
        target = folder.resolve()
        if home and (target == home or home in target.parents or target in home.parents):
            raise RecipeError(
                f"out: {folder} is (or contains, or lies in) the source {source}, which is never "
                "changed. Choose another folder with --out."
            )
    if out.is_file():
        raise RecipeError(f"out: {out} is a file. Choose a folder with --out.")
    if out.exists() and out.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise RecipeError(f"out: {out} holds the working directory. Choose a folder below it.")
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise RecipeError(
            f"out: {out} is not empty. Choose another folder with --out, or add --overwrite."
        )
    if not (partial / OWN / "run.json").exists() and not _is_beginning(partial):
        raise RecipeError(
            f"out: {partial}, where this run would work, holds something else. Rename it, or "
            "choose another folder with --out."
        )


def _is_beginning(partial: Path) -> bool:
    """Tell whether a folder is missing, or holds only what a run writes before it has a record."""
    ours = {partial / OWN / ".run.json.tmp", partial / OWN / "records" / "replaces"}
    return not partial.is_file() and all(
        path in ours or (path.is_dir() and not path.is_symlink()) for path in partial.rglob("*")
    )


def check_same_run(old: Mapping[str, Any], new: Mapping[str, Any], holder: str) -> None:
    """Check that what a folder holds was asked for as this run is; `holder` names the folder.

    Raises:
        RecipeError: they differ; names the keys.
    """
    before, after = dict(_leaves(old)), dict(_leaves(new))
    differing = [
        f"{key}: {before.get(key)!r} then, {after.get(key)!r} now"
        for key in sorted(before.keys() | after.keys())
        if not key.startswith((*OBEYED, *TOLD)) and before.get(key) != after.get(key)
    ]
    if differing:
        raise RecipeError(
            f"out: {holder} of a run that differs in\n  "
            + "\n  ".join(differing)
            + "\nUse the same settings, choose another --out, or replace it with --overwrite."
            + _upgrade_remedy(before, after)
        )


LIBRARIES = "versions."


def _upgrade_remedy(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Return what to install to go on where libraries were upgraded meanwhile."""
    wanted = [
        f"{key.removeprefix(LIBRARIES)}=={before[key]}"
        for key in sorted(before.keys() & after.keys())
        if key.startswith((LIBRARIES, "llmprune")) and before[key] != after[key]
    ]
    if not wanted:
        return ""
    return (
        "\nOther versions of libraries may write other bytes, so a run is finished by those that "
        f"began it: pip install {' '.join(wanted)}"
    )


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the key paths of nested data with their values."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        for index, inner in enumerate(value):
            yield from _leaves(inner, f"{path}[{index}]")
    else:
        yield path, value
