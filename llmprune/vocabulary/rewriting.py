"""A checkpoint rewritten with fewer tokens: their rows cut shard by shard, its files renumbered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from llmprune.base.errors import CheckpointError, UnsupportedModel
from llmprune.checkpoint.sink import copy_side_files, side_files, write_json
from llmprune.checkpoint.skeleton import read_config
from llmprune.checkpoint.source import Source, check_free_space, read_json
from llmprune.vocabulary.identifiers import renumbering, rewrite_ids
from llmprune.vocabulary.renumbering import new_numbers, rewrite_tokenizer
from llmprune.vocabulary.required import whole_config
from llmprune.vocabulary.rows import token_axes, write_shards

# The same tokens in other formats: tokenizer.json serves, and these would still hold all of them.
OTHER_VOCABULARIES = (
    *("*.model", "vocab.json", "vocab.txt", "merges.txt", "tekken.json", "*.tiktoken", "*.spm"),
)


@dataclass(frozen=True, kw_only=True)
class Rewritten:
    """What became of a checkpoint; `sliced` are the tensors on disk that lost rows.

    `renumbered` are the files written anew, `removed` those that the result lacks.
    """

    num_before: int
    num_kept: int
    sliced: tuple[str, ...]
    renumbered: tuple[str, ...]
    removed: tuple[str, ...]


def prune_vocabulary(
    source: Source, out: Path, kept: Sequence[int], *, trust_remote_code: bool = False
) -> Rewritten:
    """Write `source` with the kept ids alone into the folder `out`, one shard at a time.

    Tokenizer, configs and index follow. Files that hold the tokens in other formats (see
    `OTHER_VOCABULARIES`: SentencePiece models, vocab.json and merges.txt) are left out.

    Raises:
        UnsupportedModel: no tokenizer.json, a file names an id that is not kept, or tensors do not
            follow the vocabulary by one entry per token.
        CheckpointError: a file is damaged, or `out` is the source.
        TooLarge: the disk has no room.
    """
    folder = source.folder
    if out.resolve() == folder.resolve():
        raise CheckpointError(f"{out} is the checkpoint itself. Choose another folder with --out.")
    num_before = num_rows(folder, trust_remote_code=trust_remote_code)
    files = renumbered_files(folder, kept, num_before, trust_remote_code=trust_remote_code)
    check_free_space(out, source.num_bytes, "a copy of the checkpoint")
    out.mkdir(parents=True, exist_ok=True)
    copy_side_files(folder, out)
    removed = [path for path in side_files(out) if _is_other_vocabulary(path.name)]
    for path in removed:
        path.unlink()
    for name, data in files.items():
        write_json(out / name, data)
    rows = sorted(set(kept))
    axes = token_axes(
        source,
        out,
        num_before=num_before,
        num_kept=len(rows),
        trust_remote_code=trust_remote_code,
    )
    write_shards(source, out, axes, rows)
    return Rewritten(
        num_before=num_before,
        num_kept=len(rows),
        sliced=tuple(sorted(axes)),
        renumbered=tuple(sorted(files)),
        removed=tuple(path.name for path in removed),
    )


def num_rows(folder: Path, *, trust_remote_code: bool = False) -> int:
    """Return the size of a checkpoint's vocabulary in ids, tokens or not."""
    config = read_config(folder, trust_remote_code=trust_remote_code)
    return int(config.get_text_config(decoder=True).vocab_size)


def renumbered_files(
    folder: Path, kept: Sequence[int], num_before: int, *, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Return the JSON files of a checkpoint that number its tokens, in new numbering, by name.

    Raises:
        UnsupportedModel: no tokenizer.json, an id that does not exist is to be kept, or one that
            some file names is not.
    """
    if not (folder / "tokenizer.json").is_file():
        raise UnsupportedModel(
            f"{folder} has no tokenizer.json, which is where tokens are renumbered. Write one with "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...), and prune that folder."
        )
    if strange := [index for index in kept if not 0 <= index < num_before]:
        raise UnsupportedModel(
            f"token {strange[0]} cannot be kept: the vocabulary of {folder} has {num_before} ids, "
            "from 0 on."
        )
    mapping = new_numbers(kept)
    sources: dict[str, Mapping[str, Any]] = {
        name: read_json(folder / name)
        for name in ("generation_config.json", "tokenizer_config.json")
        if (folder / name).is_file()
    }
    sources["config.json"] = whole_config(folder, trust_remote_code=trust_remote_code)
    files: dict[str, Any] = {
        name: rewrite_ids(data, mapping, where=name, num_before=num_before)
        for name, data in sources.items()
    }
    files["tokenizer.json"] = rewrite_tokenizer(read_json(folder / "tokenizer.json"), kept)
    if (folder / "added_tokens.json").is_file():
        change = renumbering(mapping, "added_tokens.json")
        added = read_json(folder / "added_tokens.json")
        files["added_tokens.json"] = {token: change(token, added[token]) for token in added}
    return files


def _is_other_vocabulary(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in OTHER_VOCABULARIES)
