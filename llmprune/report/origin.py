"""What a result was made from: the base model's name where it has a public one, and its card."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

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


def origin_of(run: Mapping[str, Any], *, base_model: str | None = None) -> Origin:
    """Return the base model that run.json names; `base_model` names one that was a local folder."""
    first = run.get("origin") or run["source"]
    name, revision = str(first["name"]), first.get("revision")
    before = first.get("fingerprint") != run["source"].get("fingerprint")
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
