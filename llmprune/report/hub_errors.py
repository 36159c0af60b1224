"""What the Hub says when it takes no push, as messages that say what to do; tokens never show."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager

from llmprune.base.errors import CheckpointError, LlmpruneError
from llmprune.checkpoint.hub import is_connection

LOG_IN = "log in with `hf auth login` (a token with write access), or set HF_TOKEN"
UNSENT = "Nothing was committed."
UNCERTAIN = (
    "Whether the commit was made is not known: the same command again sends only what is not there."
)
COMMITTED = (
    "The commit was made ({url}), but what arrived could not be compared with what was sent: the "
    "same command again does that."
)


@contextmanager
def told_by_hub(repo: str, user: str | None = None, *, unsent: str = UNSENT) -> Iterator[None]:
    """Turn the Hub client's errors into ours; `user` is who the Hub says we are, once it has.

    `unsent` says what is known of the commit where the answer to a request may have got lost.

    Raises:
        CheckpointError: the Hub refuses or cannot be reached; says what to type.
    """
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
    )

    try:
        with _causes():
            yield
    except LlmpruneError:
        raise
    except LocalTokenNotFoundError:
        raise CheckpointError(f"no token for the Hub: to push to {repo}, {LOG_IN}.") from None
    except UnicodeEncodeError:  # of the header that carries it
        raise CheckpointError(
            f"the token for the Hub holds a character that no token has. To push to {repo}, "
            f"{LOG_IN}."
        ) from None
    except (KeyError, json.JSONDecodeError) as error:  # a proxy's page, for one
        raise CheckpointError(
            f"what answered for {repo} does not speak as the Hub does ({type(error).__name__}). "
            f"{unsent} Check HF_ENDPOINT and the network, and run the same command again."
        ) from None
    except OfflineModeIsEnabled:
        raise CheckpointError(
            f"HF_HUB_OFFLINE is set, and a push to {repo} needs the Hub. Unset it, and run this "
            "again."
        ) from None
    except HfHubHTTPError as error:
        status = int(error.response.status_code)
        said = _said(error.server_message)
        lost = unsent if unsent != UNCERTAIN or has_left(error) else UNSENT
        raise CheckpointError(_refused(status, repo, user, said, lost)) from None
    except Exception as error:
        if not is_connection(error):
            raise
        raise CheckpointError(
            f"the Hub cannot be reached for {repo} ({type(error).__name__}). {unsent} Go online, "
            "and run this again."
        ) from None


@contextmanager
def _causes() -> Iterator[None]:
    """Raise what went wrong with an upload, where the client wraps that in another error."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error.__cause__, Exception):
            raise
        raise error.__cause__ from None


def check_card(text: str, endpoint: str) -> None:
    """Let the Hub check a model card, as it will when the card is committed.

    Raises:
        CheckpointError: it does not accept the card.
    """
    from huggingface_hub import get_session
    from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]

    asked = {"content": text, "repoType": "model"}
    # ModelCard.validate of huggingface_hub 1.x asks huggingface.co, whatever HF_ENDPOINT says.
    response = get_session().post(f"{endpoint}/api/validate-yaml", json=asked)
    if response.status_code == 400:
        raise CheckpointError(
            f"the Hub does not accept the model card: {_said(response.text)} Nothing was sent. "
            "Licence, languages and datasets come from the front matter of README.md in the "
            "result's folder: mend it there, and run this again."
        )
    hf_raise_for_status(response)


def has_left(error: Exception) -> bool:
    """Tell whether a request that failed so may yet have done its work.

    The client asks again by itself, so a lost answer may end as a conflict with one's own commit.
    """
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return int(error.response.status_code) in (409, 412) or is_connection(error)
    return is_connection(error)


def _refused(status: int, repo: str, user: str | None, said: str, unsent: str) -> str:
    """Return the message for a status of the Hub."""
    who = f"you are {user}" if user else "you are logged in"
    answer = f"the Hub answered {status} for {repo}{': ' + said if said else ''}."
    if status == 401 and user is None:
        return f"the Hub does not know your token (401). To push to {repo}, {LOG_IN}."
    if status in (401, 403):
        return (
            f"you may not write to {repo} ({status}): {who}, and the token has no write access "
            f"there. {unsent} Give OWNER/NAME with an owner you belong to, or {LOG_IN}; propose to "
            "the repositories of others with --create-pr."
        )
    if status == 404:
        return (
            f"{repo} is not there, or {who} and cannot see it (404). {unsent} Check the spelling "
            f"and --revision, or {LOG_IN}."
        )
    if status in (409, 412):
        return (
            f"{repo} changed while this was under way ({status}). {unsent} Run the same command "
            "again."
        )
    if status == 429:
        return (
            f"the Hub asks to wait: too many requests for {repo} (429). {unsent} Run the same "
            "command again in some minutes."
        )
    if status == 400:
        return f"{answer} {unsent} Change what it names, and run this again."
    return f"{answer} {unsent} Try again later: what was uploaded already is not sent twice."


def _said(text: object) -> str:
    """Return the first lines of an answer in one, without anything that looks like a token."""
    from huggingface_hub import get_token

    words, token = " ".join(str(text or "").split()), get_token()
    return re.sub(r"hf_\w+", "hf_...", words.replace(token, "...") if token else words)[:300]
