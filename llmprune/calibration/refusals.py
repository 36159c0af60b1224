"""What the Hub's clients raise, as messages that say what to type instead."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from llmprune.base.errors import RecipeError, first_line
from llmprune.calibration.presets import PRESETS
from llmprune.calibration.selection import sibling
from llmprune.checkpoint.hub import is_connection

CONVERTED = "refs/convert/parquet"  # where the Hub keeps Parquet files of other formats


@contextmanager
def hub_errors(name: str, key: str) -> Iterator[None]:
    """Turn the clients' errors into messages that say what to do; tokens and links never show.

    Raises:
        RecipeError: begins with ``key``.
    """
    try:
        yield
    except RecipeError:
        raise
    except Exception as error:
        raise RecipeError(f"{key}: {_explained(error, name, key)}") from None


def _explained(error: Exception, name: str, key: str) -> str:
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RevisionNotFoundError

    kinds = {kind.__name__ for kind in type(error).__mro__}
    if isinstance(error, GatedRepoError):
        return (
            f"{name} is gated. Accept its terms on its page at huggingface.co, log in with "
            "`hf auth login`, and run this again."
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{name} has no such revision. Leave `{sibling(key, 'revision')}` out."
    if kinds & {"RepositoryNotFoundError", "HFValidationError", "DatasetNotFoundError"}:
        return (
            f"{name} is neither a file here nor a data set on the Hub that you can see. Check the "
            f"spelling; the known ones are demo, {', '.join(PRESETS)}. For a private one log in "
            "with `hf auth login`."
        )
    if is_unreachable(error):
        return (
            f"{name} is on the Hub, which cannot be reached ({type(error).__name__}). "
            f"Go online, or {_instead(key)}."
        )
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        return f"the Hub answered {status} for {name}. Try again later, or {_instead(key)}."
    if "scripts are no longer supported" in str(error):
        place = sibling(key, "revision")
        return (
            f"{name} is made by a script, and scripts are never run. Most such data sets have a "
            f"converted branch: type `{place}={CONVERTED}`, with `{sibling(key, 'config')}` for "
            "the folder in it."
        )
    if kinds & {"FileNotFoundError", "EmptyDatasetError", "DataFilesNotFoundError"}:
        return f"{name} holds no data files that can be read there. Choose another, or a file."
    if isinstance(error, ImportError):
        return "reading from the Hub needs a package that is missing. Type `pip install datasets`."
    reason = re.sub(r"\?\S+", "", str(error))  # the query of a link may hold a signature
    first = first_line(reason)
    return f"{name} cannot be read ({type(error).__name__}: {first}). Choose another, or a file."


def _instead(key: str) -> str:
    """Return what to type in place of a text on the Hub."""
    if key.startswith("calibration"):
        return (
            "type `--calib demo` for the bundled text, or `--calib FILE` for a .txt, .jsonl or "
            ".parquet of your own"
        )
    if key.startswith("evaluate"):
        return (
            "type `--set evaluate.data=demo` for the bundled text, `--set evaluate.data=FILE` for "
            "your own, or `--no-eval`"
        )
    return "give `demo` for the bundled text, or a .txt, .jsonl or .parquet file"


def is_unreachable(error: BaseException | None) -> bool:
    """Tell whether an error, or what caused it, means that the Hub does not answer."""
    while isinstance(error, Exception):
        if is_connection(error) or type(error).__name__ == "ConnectionError":
            return True
        error = error.__cause__
    return False
