"""Task scores of a checkpoint, kept by what it holds and what was asked, so nothing is run twice.

    ~/.cache/llmprune/scores/KEY.json   one model on one set of tasks

The key is a hash of every byte of the model and its tokenizer (of a model from the Hub, of its
commit), of the tasks with all their items, of the settings, and of the libraries' versions.
`LLMPRUNE_CACHE` moves the folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from llmprune.base.errors import LlmpruneError
from llmprune.base.places import cache_folder
from llmprune.checkpoint.sink import write_json
from llmprune.checkpoint.source import read_json
from llmprune.evaluation.scores import Score, TaskFacts

if TYPE_CHECKING:
    from llmprune.checkpoint.source import Source

READ = (".json", ".txt", ".model", ".jinja", ".py", ".safetensors")  # what a model is made from

Told = tuple[tuple[Score, ...], dict[str, TaskFacts], tuple[str, ...]]  # scores, facts, notes


def model_key(source: Source) -> str:
    """Return a hash of all that a model is loaded from; of one on the Hub its name and commit."""
    if source.revision:
        return f"{source.name}@{source.revision}"
    digest = hashlib.sha256()
    for path in sorted(source.folder.iterdir()):
        if path.is_file() and path.suffix in READ:
            digest.update(path.name.encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def tasks_key(tasks: Mapping[str, Any]) -> str:
    """Return a hash of what lm_eval's tasks ask, and of the examples that they may show."""
    digest = hashlib.sha256()
    for name in sorted(tasks["tasks"]):
        task = tasks["tasks"][name]
        digest.update(json.dumps([name, task.dump_config()], default=str, sort_keys=True).encode())
        documents = [task.eval_docs]
        if task.get_config("num_fewshot"):
            documents.append(task.fewshot_docs())
        for items in documents:
            for item in items or ():
                digest.update(json.dumps(item, default=str, sort_keys=True).encode())
    return digest.hexdigest()


def score_key(model: str, tasks: str, settings: Mapping[str, Any]) -> str:
    """Return the name that scores are kept under."""
    return hashlib.sha256(
        json.dumps([model, tasks, dict(settings)], default=str, sort_keys=True).encode()
    ).hexdigest()


def recall(key: str) -> Told | None:
    """Return the scores kept under a key; none where there are none, or they cannot be read."""
    path = cache_folder("scores") / f"{key}.json"
    try:
        data = read_json(path) if path.exists() else None
        if data is None:
            return None
        return (
            tuple(Score(**score) for score in data["scores"]),
            {name: TaskFacts(**facts) for name, facts in data["tasks"].items()},
            tuple(data["notes"]),
        )
    except (LlmpruneError, OSError, KeyError, TypeError):
        return None  # measured again, and written anew


def remember(key: str, told: Told) -> None:
    """Keep scores; where the folder cannot be written they are measured again next time."""
    scores, facts, notes = told
    data = {
        "scores": [asdict(score) for score in scores],
        "tasks": {name: asdict(one) for name, one in facts.items()},
        "notes": list(notes),
    }
    try:
        cache_folder("scores").mkdir(parents=True, exist_ok=True)
        write_json(cache_folder("scores") / f"{key}.json", data)
    except OSError:
        return
