"""Where llmprune keeps what it may need again, beside the caches of other libraries."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(what: str) -> Path:
    """Return the folder for one kind of thing: below `LLMPRUNE_CACHE`, or the user's cache."""
    home = os.environ.get("LLMPRUNE_CACHE")
    if home:
        return Path(home).expanduser() / what
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "llmprune" / what
