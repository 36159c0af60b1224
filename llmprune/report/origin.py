"""What a result was made from: the base model's name where it has a public one, its card, and the
runs that came before.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from llmprune.base.errors import LlmpruneError
from llmprune.checkpoint.source import open_folder, read_json
from llmprune.report.portable import last_name

# What a card says of its model that still holds for the pruned one.
KEPT_KEYS = ("license", "license_name", "license_link", "language", "datasets")


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The model that was pruned first: its Hub id and commit, or how a local one is called."""

    name: str
    hub_id: str | None
    revision: str | None
    pruned_before: bool
    bundled: bool = False

    @property
    def markdown(self) -> str:
        """Return the name, linked where it leads somewhere."""
        if self.hub_id is None:
            return self.name
        commit = f" (commit `{self.revision[:12]}`)" if self.revision else ""
        return f"[{self.hub_id}](https://huggingface.co/{self.hub_id}){commit}"


class Beginning(NamedTuple):
    """The model that a run was given: as it was named, its commit on the Hub, where it lay."""

    name: str
    revision: str | None
    folder: str | None
    fingerprint: str | None

    @property
    def is_public(self) -> bool:
        """Tell whether others have it under this name."""
        return self.revision is not None or self.name == "demo"


def beginning_of(run: Mapping[str, Any]) -> Beginning:
    """Return the model that a run began with; of several steps, the first's."""
    found, chain = run["source"], run.get("chain")
    if chain:
        first = run.get("origin") or {}
        same = first.get("name") == chain["model"]
        found = first if same else {"name": chain["model"]}
    keys = ("revision", "folder", "fingerprint")
    return Beginning(str(found["name"]), *(found.get(key) for key in keys))


def runs_before(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return run.json of the results that a run's model came from, the earliest first.

    Only as far back as their folders still lie where they were and hold what they held; a model
    from the Hub needs no more than its name.
    """
    found: list[dict[str, Any]] = []
    while (begun := beginning_of(run)).folder and not begun.is_public:
        home = Path(str(begun.folder))
        if not (home / "llmprune" / "run.json").is_file():
            break
        try:
            same = open_folder(home).fingerprint() == begun.fingerprint
            run = read_json(home / "llmprune" / "run.json")
        except LlmpruneError:
            break
        if not same:
            break
        found.insert(0, run)
    return found


def origin_of(run: Mapping[str, Any], *, base_model: str | None = None) -> Origin:
    """Return the base model that run.json names; `base_model` names one that was a local folder."""
    first = run.get("origin") or run["source"]
    name, revision = str(first["name"]), first.get("revision")
    before = first.get("fingerprint") != beginning_of(run).fingerprint
    if base_model is not None:
        same = revision if base_model == name else None
        return Origin(name=base_model, hub_id=base_model, revision=same, pruned_before=before)
    if revision is not None:
        return Origin(name=name, hub_id=name, revision=revision, pruned_before=before)
    text = "The demo model that llmprune brings" if name == "demo" else f"`{last_name(name)}`"
    return Origin(
        name=text, hub_id=None, revision=None, pruned_before=before, bundled=name == "demo"
    )


def kept_facts(folder: Path, origin: Origin) -> dict[str, Any]:
    """Return what the base model's card, copied beside the result, says that still holds.

    A licence in a file that did not travel is linked where the base model has it.
    """
    found = _front_matter(folder)
    facts = {key: _words(found[key]) for key in KEPT_KEYS if _words(found.get(key))}
    link = facts.get("license_link")
    if isinstance(link, str) and ":" not in link and not (folder / link).is_file():
        if origin.hub_id is None:
            del facts["license_link"]
        else:
            facts["license_link"] = f"https://huggingface.co/{origin.hub_id}/blob/main/{link}"
    return facts


def _words(value: Any) -> str | list[str] | None:
    """Return a word or a list of words as such; None for anything else.

    YAML reads the language code `no` as false.
    """
    if isinstance(value, list):
        words = [_words(item) for item in value]
        return [word for word in words if isinstance(word, str)]
    return "no" if value is False else value if isinstance(value, str) else None


def _front_matter(folder: Path) -> dict[str, Any]:
    """Return the YAML at the head of a folder's README.md; nothing where it has none."""
    path = folder / "README.md"
    if not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    found = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    try:
        content = yaml.safe_load(found[1]) if found else None
    except (yaml.YAMLError, ValueError, RecursionError):  # a date, for one, that there is not
        return {}
    return content if isinstance(content, dict) else {}
