"""What of a result goes to the Hub, and what does not; nothing is sent here.

Paths of this machine are cut out of all that goes, and nothing that holds a token goes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from llmprune.base.errors import CheckpointError, RecipeError
from llmprune.checkpoint.sink import HEAVY, TEMPLATES, hash_file
from llmprune.checkpoint.source import INDEX, open_folder, read_json
from llmprune.report.card import card_text
from llmprune.report.licences import Terms, terms_of
from llmprune.report.origin import kept_facts, origin_of, runs_before
from llmprune.report.portable import without_places, without_roots
from llmprune.report.recounting import with_moved_masks
from llmprune.report.run import Report

OWN, CARD = "llmprune", "README.md"
PICTURE, PAGE = f"{OWN}/report.png", f"{OWN}/report.html"  # made anew, without paths
RECORDS = ("report.json", "run.json", "evaluations.json")  # events.jsonl is of this machine alone
VOCABULARIES = ("tokenizer.json", "vocab.json", "added_tokens.json", "special_tokens_map.json")
ANALYSIS, ANALYSIS_BYTES = f"{OWN}/analysis", 10_000_000  # of an analysis, at most
Page = Callable[[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any] | None], str]
Analysed = Callable[[Path, Callable[[Any], Any]], Mapping[str, bytes]]
SIDE = (".json", ".jinja", ".md", ".model", ".py", ".spm", ".bpe", ".tiktoken", ".txt")


@dataclass(frozen=True, kw_only=True)
class Package:
    """What a push brings, by name in the repository: files as they lie, and texts made for it.

    `left` names what of an analysis is too large to go.
    """

    folder: Path
    repo: str
    base_model: str | None
    files: Mapping[str, Path]
    texts: Mapping[str, bytes]
    terms: Terms | None = None
    page: Page | None = None
    analysis: Analysed | None = None
    left: tuple[str, ...] = ()

    @property
    def card(self) -> str:
        return self.texts[CARD].decode()

    @property
    def sizes(self) -> dict[str, int]:
        """Return bytes by name, in order of name."""
        sizes = {name: path.stat().st_size for name, path in self.files.items()}
        return dict(sorted((sizes | {name: len(t) for name, t in self.texts.items()}).items()))


def pack(
    folder: str | Path,
    repo: str,
    *,
    base_model: str | None = None,
    page: Page | None = None,
    analysis: Analysed | None = None,
) -> Package:
    """Decide what of a result goes to a repository, and write its card; nothing is sent.

    Paths of this machine are cut down to their last names in everything that goes. `page` makes
    the page for a browser from report.json, evaluations.json and analysis.json, and `analysis` what
    goes of an analysis from its folder and what cuts the paths out of plain data.

    Raises:
        RecipeError: the name of the repository or of the base model is none.
        CheckpointError: the folder is no finished result, a file of it is missing or damaged, or
            one holds a token.
    """
    check_name("repo", repo)
    if base_model is not None:
        check_name("base_model", base_model)
    home = Path(folder)
    data = Report.read(home).data
    run = read_json(home / OWN / "run.json")
    if not (data.get("gate") or {}).get("agreement", {}).get("passed"):
        raise CheckpointError(
            f"{home} was never proven to load: its report holds no passed gate. See with "
            "`llmprune gate` what is wrong, or prune again."
        )
    weights = {entry.file for entry in open_folder(home).entries.values()}
    _check_unchanged(home, data.get("files", {}))
    files = {name: home / name for name in sorted(_own_files(home) | weights | _side_files(home))}
    earlier = runs_before(run)
    places = [place for each in (run, *earlier) for place in _places(home, each)]
    records = {
        name: without_places(read_json(home / OWN / name), places)
        for name in RECORDS
        if (home / OWN / name).exists()
    }
    texts = {f"{OWN}/{name}": _json(record) for name, record in records.items()}
    texts |= _cleaned(files, places)
    analysed = analysis(home / ANALYSIS, partial(without_places, places=places)) if analysis else {}
    analysed = {f"{ANALYSIS}/{name}": content for name, content in analysed.items()}
    texts |= (fitting := _within(analysed, ANALYSIS_BYTES))
    _check_no_token(files, texts)
    report = with_moved_masks(records["report.json"], home)
    later = records.get("evaluations.json", {})
    texts[PICTURE] = _picture(json.dumps(report))
    told = texts.get(f"{ANALYSIS}/analysis.json")
    if page is not None:
        texts[PAGE] = page(report, later, json.loads(told) if told else None).encode()
    terms = terms_of(kept_facts(home, origin_of(run, base_model=base_model)))
    if terms is not None and not any(name.upper().startswith("NOTICE") for name in files):
        texts["NOTICE"] = f"{terms.notice}\n".encode()
    runs = [*without_places(earlier, places), records["run.json"]]
    card = card_text(home, report, runs, later, repo=repo, base_model=base_model, beside=set(texts))
    texts[CARD] = card.encode()
    return Package(
        folder=home,
        repo=repo,
        base_model=base_model,
        files={name: path for name, path in files.items() if name not in texts},
        texts=texts,
        terms=terms,
        page=page,
        analysis=analysis,
        left=tuple(sorted(analysed.keys() - fitting.keys())),
    )


def renamed(package: Package, repo: str) -> Package:
    """Return the package for another repository, whose name its card has."""
    return pack(
        package.folder,
        repo,
        base_model=package.base_model,
        page=package.page,
        analysis=package.analysis,
    )


def _within(texts: Mapping[str, bytes], limit: int) -> dict[str, bytes]:
    """Return the first of some files that weigh no more than a limit together.

    >>> _within({"a": b"12", "b": b"345", "c": b"6"}, 4)
    {'a': b'12', 'c': b'6'}
    """
    found: dict[str, bytes] = {}
    for name, content in texts.items():
        if sum(map(len, found.values())) + len(content) <= limit:
            found[name] = content
    return found


def _check_unchanged(home: Path, hashes: Mapping[str, str]) -> None:
    """Check that shards and masks are those that were proven.

    Raises:
        CheckpointError: one is missing or another.
    """
    for name, digest in hashes.items():
        if not (home / name).exists() or hash_file(home / name) != digest:
            raise CheckpointError(
                f"{home / name} is not the file that was proven to load: it was changed or lost "
                "after the run. Prune again with --overwrite, or push your own version with "
                "`hf upload`."
            )


def check_name(key: str, name: str) -> None:
    """Check the form of a repository's name.

    Raises:
        RecipeError: the Hub has no such names.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError:
        raise RecipeError(
            f"{key}: {name!r} is no name of a repository. Give OWNER/NAME, with letters, digits, "
            "'-', '_' and '.' in both."
        ) from None


def _own_files(home: Path) -> set[str]:
    """Return the masks and their index."""
    found = [home / OWN / "masks.json", *(home / OWN).glob("masks-*.safetensors")]
    return {f"{OWN}/{path.name}" for path in found if path.is_file()}


def _side_files(home: Path) -> set[str]:
    """Return config, index, tokenizer, templates, licence and other small files of a model."""
    found = {path for path in (*home.iterdir(), *(home / TEMPLATES).glob("*")) if path.is_file()}
    kept = {
        path
        for path in found
        if not path.name.startswith(".")
        and path.name != CARD
        and (path.name == INDEX or not path.name.endswith(HEAVY))
        and (path.suffix in SIDE or path.name.isupper())  # LICENSE, NOTICE
    }
    return {path.relative_to(home).as_posix() for path in kept}


def _places(home: Path, run: Mapping[str, Any]) -> list[str | Path]:
    """Return the paths that the records of a run may hold."""
    wish = run.get("wish", {})
    named = [wish.get("model")]
    texts = ((run.get("text") or {}).get("record") or {}).get("texts", ())
    named += [text.get("data") for text in texts] or [wish.get("calibration", {}).get("data")]
    chain = run.get("chain") or {}
    named.append(chain.get("model"))
    steps = [*wish.get("steps", ()), *chain.get("steps", ())]
    for data in (step[kind].get("data") for step in steps for kind in step if kind != "prune"):
        named += [part["data"] for part in data] if isinstance(data, list) else [data]
    for key in ("source", "origin"):
        named += [run.get(key, {}).get("folder"), run.get(key, {}).get("name")]
    return [home, *(text for text in named if isinstance(text, str) and text)]


def _check_no_token(files: Mapping[str, Path], texts: dict[str, bytes]) -> None:
    """Check that no file but the weights holds a token of the Hub.

    Raises:
        CheckpointError: one does; says which.
    """
    from huggingface_hub import get_token

    own = re.escape((get_token() or "").encode())
    token = re.compile(rb"hf_[A-Za-z0-9]{30,}" + (b"|" + own if own else b""))
    small = (name for name in files if not name.endswith(".safetensors"))
    contents = {name: files[name].read_bytes() for name in small if name not in texts} | texts
    for name, content in contents.items():
        if token.search(content):
            raise CheckpointError(
                f"{name} holds a token of the Hub, which everybody who reads it could use. Take it "
                "out of the file, make a new one at huggingface.co/settings/tokens, and run this "
                "again. Nothing was sent."
            )


def _cleaned(files: Mapping[str, Path], places: list[str | Path]) -> dict[str, bytes]:
    """Return the small JSON files that held paths of this machine, without them."""
    found = {}
    for name, path in files.items():
        if path.suffix != ".json" or name in (*VOCABULARIES, INDEX, f"{OWN}/masks.json"):
            continue
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            continue
        after = without_roots(before, [Path.home(), *places])
        if after != before:
            found[name] = _json(after)
    return found


@lru_cache(maxsize=2)  # laying it out takes longer than all else that a push prepares
def _picture(report: str) -> bytes:
    """Return the figure of a report, given as JSON, as a PNG."""
    from llmprune.report.plots import report_figure

    return report_figure(json.loads(report))._repr_png_()


def _json(data: Any) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()
