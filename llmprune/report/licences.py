"""What a base model's licence demands of a model made from it: a name, a line, a notice.

Only what can be told from the licence's name in the base model's card; the licence itself decides.
Sources: section 1.b of the Llama 3, 3.1, 3.2, 3.3 and 4 Community Licence Agreements.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple


class Terms(NamedTuple):
    """What a licence demands: how names begin, what is shown, what a file NOTICE says."""

    begins: str
    shown: str
    notice: str


_RIGHTS = "Copyright © Meta Platforms, Inc. All Rights Reserved."


def _llama(number: str, begins: str, shown: str) -> Terms:
    return Terms(
        begins,
        shown,
        f"{begins if number == '3' else f'Llama {number}'} is licensed under the "
        f"Llama {number} Community License, {_RIGHTS}",
    )


TERMS: Mapping[str, Terms] = {
    "llama3": _llama("3", "Llama 3", "Built with Meta Llama 3"),
    "llama3.1": _llama("3.1", "Llama", "Built with Llama"),
    "llama3.2": _llama("3.2", "Llama", "Built with Llama"),
    "llama3.3": _llama("3.3", "Llama", "Built with Llama"),
    "llama4": _llama("4", "Llama", "Built with Llama"),
}


def terms_of(facts: Mapping[str, Any]) -> Terms | None:
    """Return what the licence that a card's metadata names demands; None where nothing is known.

    >>> terms_of({"license": "llama3.1"}).shown
    'Built with Llama'
    >>> terms_of({"license": "mit"})
    """
    for key in ("license", "license_name"):
        name = re.sub(r"[^a-z0-9.]", "", str(facts.get(key) or "").lower())
        if (found := TERMS.get(name)) is not None:
            return found
    return None


def misnamed(terms: Terms | None, repo: str) -> str:
    """Return what is wrong with a repository's name under a licence; empty where nothing is.

    >>> misnamed(TERMS["llama3.1"], "me/Llama-half"), misnamed(None, "me/small")
    ('', '')
    """
    name = repo.rpartition("/")[2]
    if terms is None or _plain(name).startswith(_plain(terms.begins)):
        return ""
    return (
        f"the base model's licence asks that names of models made from it begin with "
        f"{terms.begins!r}, and {name!r} does not"
    )


def better_name(terms: Terms, repo: str) -> str:
    """Return a name that the licence allows, near the one that was given."""
    owner, slash, name = repo.rpartition("/")
    return f"{owner}{slash}{terms.begins.replace(' ', '-')}-{name}"


def _plain(name: str) -> str:
    """Return a name in small letters, without what separates words."""
    return re.sub(r"[-_ ]", "", name.lower())
