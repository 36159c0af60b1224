"""Checkpoints on the Hugging Face Hub: headers by range request, shards when they are needed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

from llmprune.base.errors import CheckpointError
from llmprune.checkpoint.source import (
    INDEX,
    SINGLE,
    Entry,
    Source,
    check_free_space,
    no_weights,
    open_folder,
    safe_name,
)

WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack")
UNWANTED = (*WEIGHTS, "*.onnx", "*.tflite", "*.mlpackage/*", "*.ot", "original/*")


def open_hub(model: str, revision: str | None) -> Source:
    """Open a Hub repository at one commit; small files are fetched now, shards on first use.

    Raises:
        CheckpointError: no such repository or revision, no access, no connection, no safetensors.
        TooLarge: the cache's disk has no room for the shards.
    """
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    with _hub_errors(model, revision):
        try:
            info = HfApi().model_info(model, revision=revision, files_metadata=True)
        except Exception as error:
            if (cached := _cached(model, revision)) is not None and is_connection(error):
                return cached
            raise
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        if "config.json" not in sizes:
            raise no_weights(model, list(sizes), f"the Hub repository {model}")
        # By revision, not by commit: so the cache learns what the revision means, for work offline.
        folder = Path(snapshot_download(model, revision=revision, ignore_patterns=list(UNWANTED)))
        commit = folder.name
        files = _shards(model, folder, sizes)
        entries = _headers(model, commit, files)
    missing = sum(sizes[file] for file in files if not _is_cached(model, commit, file))
    check_free_space(folder, missing, f"downloading {model}")

    @cache
    def fetch(file: str) -> Path:
        with _hub_errors(model, revision):
            return Path(hf_hub_download(model, file, revision=commit))

    return Source(name=model, folder=folder, entries=entries, revision=commit, fetch=fetch)


def is_hub_id(name: str) -> bool:
    """Tell whether a name has the form of a repository's.

    >>> is_hub_id("owner/name"), is_hub_id("./folder"), is_hub_id("a/b/c")
    (True, False, False)
    """
    return re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name) is not None


def fetch_whole(model: str, revision: str | None, mark: str) -> Path | None:
    """Return the folder of a Hub repository, all of it fetched, if it holds the file `mark`.

    Raises:
        CheckpointError: no such repository or revision, no access, no connection.
    """
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError

    with _hub_errors(model, revision):
        try:
            commit = Path(hf_hub_download(model, mark, revision=revision)).parent.name
        except EntryNotFoundError:  # offline it is not in the cache
            return None
        return Path(snapshot_download(model, revision=commit))


def _shards(model: str, folder: Path, sizes: dict[str, int]) -> list[str]:
    """Return the safetensors files of the model; the single file wins, as in transformers."""
    if SINGLE in sizes:
        return [SINGLE]
    if INDEX not in sizes:
        raise no_weights(model, list(sizes), f"the Hub repository {model}")
    weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
    files = sorted({safe_name(str(file), model) for file in weight_map.values()})
    if absent := [file for file in files if file not in sizes]:
        raise CheckpointError(
            f"the Hub repository {model} has no {absent[0]}, which its index names."
        )
    return files


def _headers(model: str, commit: str, files: list[str]) -> dict[str, Entry]:
    """Return the tensors of all shards, reading no more than their headers."""
    from huggingface_hub import HfApi

    entries: dict[str, Entry] = {}
    for file in files:
        header = HfApi().parse_safetensors_file_metadata(model, file, revision=commit)
        for name, tensor in header.tensors.items():
            entries[name] = Entry(file=file, dtype=str(tensor.dtype), shape=tuple(tensor.shape))
    return entries


def _is_cached(model: str, commit: str, file: str) -> bool:
    """Tell whether a file was downloaded before."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(model, file, revision=commit), str)


def _cached(model: str, revision: str | None) -> Source | None:
    """Return a repository that is wholly in the local cache."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(
            snapshot_download(
                model, revision=revision, ignore_patterns=list(UNWANTED), local_files_only=True
            )
        )
        return replace(open_folder(folder, name=model), revision=folder.name)
    except Exception:  # whatever the cache lacks, the connection error says it better
        return None


def is_connection(error: Exception) -> bool:
    """Tell whether an error means that the Hub could not be reached."""
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    if isinstance(error, HfHubHTTPError):
        return bool(error.response.status_code >= 500)
    known = (OfflineModeIsEnabled, LocalEntryNotFoundError, ConnectionError, TimeoutError)
    if isinstance(error, known):
        return True
    # The client's own HTTP library differs between releases of huggingface_hub; the names do not.
    return any(kind.__name__ == "TransportError" for kind in type(error).__mro__)


@contextmanager
def _hub_errors(model: str, revision: str | None) -> Iterator[None]:
    """Turn the Hub client's errors into messages that say what to do; tokens are never shown."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except CheckpointError:
        raise
    except GatedRepoError:
        raise CheckpointError(
            f"{model} is gated. Accept its terms on its page at huggingface.co, log in with "
            "`hf auth login`, and run this again."
        ) from None
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"{model} is neither a local folder nor a Hub repository that you can see. Check the "
            "spelling; for a private one log in with `hf auth login`."
        ) from None
    except RevisionNotFoundError:
        raise CheckpointError(
            f"{model} has no revision {revision!r}; leave --revision out."
        ) from None
    except HFValidationError:
        raise CheckpointError(
            f"--model {model}: no such folder, and not a Hub id of the form owner/name."
        ) from None
    except Exception as error:
        if isinstance(error, HfHubHTTPError) and not is_connection(error):
            raise CheckpointError(
                f"the Hub answered {error.response.status_code} for {model}. Try again later, log "
                "in with `hf auth login`, or give a local folder."
            ) from None
        if isinstance(error, UnicodeEncodeError):
            raise CheckpointError(
                "the token for the Hub holds characters that none has. Log in again with "
                "`hf auth login`, or correct HF_TOKEN."
            ) from None
        if not is_connection(error):
            raise
        raise CheckpointError(
            f"{model} is no local folder, the Hub cannot be reached for it "
            f"({type(error).__name__}), and the local cache does not hold it. Go online, give a "
            "local folder, or try `--model demo`."
        ) from None
