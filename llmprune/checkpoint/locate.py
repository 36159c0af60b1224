"""Where a model is: the bundled demo, a local folder, or a repository on the Hub."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from llmprune.base.errors import CheckpointError
from llmprune.checkpoint.hub import is_hub_id, open_hub
from llmprune.checkpoint.sink import check_links
from llmprune.checkpoint.source import Source, open_folder


def open_source(model: str, *, revision: str | None = None) -> Source:
    """Open a checkpoint named by folder, Hub id, or `demo`; reads headers only.

    Raises:
        CheckpointError: the folder is missing, empty, damaged, hostile or without safetensors.
    """
    if model == "demo":
        return open_folder(Path(str(files("llmprune") / "demo" / "model")), name="demo")
    path = Path(model).expanduser()
    if path.is_dir():
        found = open_folder(path, name=str(path))
        check_links(path)
        return found
    if path.exists():
        raise CheckpointError(
            f"--model {model} is a file. Give the folder that holds config.json and the "
            "safetensors."
        )
    if not is_hub_id(model):
        raise CheckpointError(
            f"--model {model}: no such folder, and not a Hub id of the form owner/name. "
            "Give a local folder, a Hub id, or `demo` for the bundled model."
        )
    return open_hub(model, revision)
