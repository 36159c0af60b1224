"""Keep out of the user's cache what transformers copies of the code that lies beside a model.

To run such code transformers copies it to a folder of modules, under the name of the model's own
folder, and leaves it there. What is built only to be tried needs another place: each try has a name
of its own, and the copies would pile up.
"""

from __future__ import annotations

import atexit
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

PACKAGE = "transformers_modules"


@contextmanager
def code_in_scratch() -> Iterator[None]:
    """Let code beside models be copied to a folder that is gone when this process ends.

    Classes that were loaded stay usable: their files lie there as long as they may be asked for.
    Outside, the user's cache is what it was. Not for several threads at a time.
    """
    from transformers import dynamic_module_utils

    places: Any = dynamic_module_utils
    before, place = places.HF_MODULES_CACHE, _scratch()
    if before == place:  # within another such passage
        yield
        return
    packages = _take_packages()
    places.HF_MODULES_CACHE = place
    sys.path.insert(0, place)
    try:
        yield
    finally:
        sys.path.remove(place)
        places.HF_MODULES_CACHE = before
        _take_packages()
        sys.modules.update(packages)


@cache
def _scratch() -> str:
    """Return a folder that is made once code comes, and removed when Python ends."""
    folder = os.path.join(tempfile.gettempdir(), f"llmprune-code-{secrets.token_hex(8)}")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _take_packages() -> dict[str, ModuleType]:
    """Take the packages of copied code from the loaded modules, and return them.

    A package knows one place to look for its parts. The parts themselves stay: transformers
    compares their code with what it is to load, and models ask for the module of their class.
    """
    if PACKAGE not in sys.modules:
        return {}
    inside = [name for name in sys.modules if name.startswith(PACKAGE)]
    return {
        name: sys.modules.pop(name) for name in inside if hasattr(sys.modules[name], "__path__")
    }
