"""One commit that brings a result to the Hub, and a look whether it arrived.

Nothing is sent before the card, the token and the repository are checked, and no text of ours ever
holds a token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from llmprune.base.errors import CheckpointError, RecipeError
from llmprune.checkpoint.source import INDEX
from llmprune.report.hub_errors import (
    COMMITTED,
    LOG_IN,
    UNCERTAIN,
    check_card,
    has_left,
    told_by_hub,
)
from llmprune.report.licences import better_name, misnamed
from llmprune.report.publishing import OWN, Package, renamed

if TYPE_CHECKING:
    from pathlib import Path

    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """What a push did: where the commit or pull request is, and how many files were found there."""

    url: str
    repo: str
    commit: str
    num_checked: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def upload(
    package: Package,
    *,
    private: bool = False,
    message: str | None = None,
    create_pr: bool = False,
    revision: str | None = None,
) -> Pushed:
    """Bring a package to the Hub in one commit, and compare what is there with what was sent.

    The repository is made where there is none. Weights and records of an earlier push that this one
    does not replace go in the same commit.

    Raises:
        RecipeError: the repository holds something else, is public where `private` is asked for, or
            has a name that the base model's licence does not allow.
        CheckpointError: the Hub refuses or cannot be reached; says whether anything was committed.
    """
    from huggingface_hub import HfApi

    check_branch(create_pr=create_pr, revision=revision)
    _check_licence(package, private=private)
    api = HfApi()
    with told_by_hub(package.repo):
        user = check_token(api, package.repo)
        if "/" not in package.repo:  # a name of one's own; the card needs it whole
            package = renamed(package, f"{user}/{package.repo}")
        check_card(package.card, api.endpoint)
    with told_by_hub(package.repo, user):
        repo = api.create_repo(package.repo, private=private or None, exist_ok=True).repo_id
        branch = None if create_pr else revision
        if branch is not None:
            api.create_branch(repo, branch=branch, exist_ok=True)
        there, head = _look(api, repo, branch, private=private, aside=_is_aside(create_pr, branch))
        added, removed = _operations(package, there)
    told = message or f"Push {package.folder.resolve().name} with llmprune"
    with told_by_hub(repo, user, unsent=UNCERTAIN):
        url, commit = _commit(
            *(api, repo, added, removed, told),
            create_pr=create_pr, branch=branch, head=head,
        )  # fmt: skip
    with told_by_hub(repo, user, unsent=COMMITTED.format(url=url)):
        _check_arrived(api, repo, commit, added, url)
    return Pushed(url=url, repo=repo, commit=commit, num_checked=len(added))


def check_repository(
    repo: str, *, private: bool = False, create_pr: bool = False, revision: str | None = None
) -> None:
    """Check before any work that a push can be made later: token, its rights, the repository.

    Nothing is made on the Hub.

    Raises:
        RecipeError, CheckpointError: as `upload` would.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    check_branch(create_pr=create_pr, revision=revision)
    api = HfApi()
    with told_by_hub(repo):
        user = check_token(api, repo)
    whole = repo if "/" in repo else f"{user}/{repo}"
    branch = None if create_pr else revision
    with told_by_hub(whole, user):
        try:
            _look(api, whole, branch, private=private, aside=_is_aside(create_pr, branch))
        except (RepositoryNotFoundError, RevisionNotFoundError):
            return  # it will be made


def check_branch(*, create_pr: bool, revision: str | None) -> None:
    """Check that a pull request is not asked for on another branch than main.

    Raises:
        RecipeError: it is.
    """
    if create_pr and revision not in (None, "main"):
        raise RecipeError(
            f"revision: a pull request goes to the main branch, not to {revision!r}. Leave out "
            "--revision or --create-pr."
        )


def check_token(api: HfApi, repo: str) -> str:
    """Return who the token belongs to.

    Raises:
        CheckpointError: the Hub says that it may only read.
    """
    found = api.whoami()
    token = (found.get("auth") or {}).get("accessToken") or {}
    if _only_reads(token):
        raise CheckpointError(
            f"the token for the Hub may only read: you are {found['name']}, and to push to {repo} "
            f"it must be allowed to write. Make such a token at huggingface.co/settings/tokens and "
            f"{LOG_IN}. Nothing was sent."
        )
    return str(found["name"])


def _only_reads(token: Mapping[str, Any]) -> bool:
    """Tell whether the Hub says that a token has no right to write, anywhere."""
    if token.get("role") == "read":
        return True
    rights = token.get("fineGrained")
    if token.get("role") != "fineGrained" or not isinstance(rights, Mapping):
        return False
    named = [*(rights.get("global") or ())]
    for scope in rights.get("scoped") or ():
        named += scope.get("permissions") or ()
    return not any("write" in str(right) for right in named)


def _check_licence(package: Package, *, private: bool) -> None:
    """Check that a public model is named as the base model's licence asks.

    Raises:
        RecipeError: it is not.
    """
    wrong = misnamed(package.terms, package.repo)
    if wrong and package.terms is not None and not private:
        raise RecipeError(
            f"repo: {wrong}. Name it {better_name(package.terms, package.repo)}, or keep it to "
            "yourself with --private. Nothing was sent."
        )


def _is_aside(create_pr: bool, branch: str | None) -> bool:
    """Tell whether the main branch stays as it is."""
    return create_pr or branch not in (None, "main")


def _look(
    api: HfApi, repo: str, branch: str | None, *, private: bool, aside: bool
) -> tuple[set[str], str]:
    """Return the files of a repository and its head, once it is one that may take a result.

    Raises:
        RecipeError: it is public where private is asked for, or holds what llmprune did not push.
    """
    info = api.model_info(repo, revision=branch)
    there = {file.rfilename for file in info.siblings or ()}
    if private and not info.private:
        raise RecipeError(
            f"private: {repo} is there already and public, and --private only makes new "
            f"repositories private. Make it private in its settings, or choose another name. "
            "Nothing was sent."
        )
    foreign = sorted(_stale(there) | (there & {"config.json"}))
    if foreign and f"{OWN}/report.json" not in there and not aside:
        raise RecipeError(
            f"repo: {repo} holds a model that llmprune did not push ({foreign[0]}), which this "
            "would replace. Choose another name, or propose it with --create-pr. Nothing was sent."
        )
    return there, str(info.sha)


def _stale(names: set[str]) -> set[str]:
    """Return the names that a result of other shards must not leave behind."""
    return {n for n in names if n.endswith(".safetensors") or n == INDEX or n.startswith(f"{OWN}/")}


def _operations(
    package: Package, there: set[str]
) -> tuple[list[CommitOperationAdd], list[CommitOperationDelete]]:
    """Return what a commit adds, and what of an earlier push it removes."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    contents: dict[str, Path | bytes] = {**package.files, **package.texts}
    added = [CommitOperationAdd(name, content) for name, content in contents.items()]
    return added, [CommitOperationDelete(n) for n in sorted(_stale(there) - set(contents))]


def _commit(
    api: HfApi,
    repo: str,
    added: Sequence[CommitOperationAdd],
    removed: Sequence[CommitOperationDelete],
    message: str,
    *,
    create_pr: bool,
    branch: str | None,
    head: str,
) -> tuple[str, str]:
    """Make the commit; return its address and id.

    An answer that got lost is no failure: where all that was sent is there, the commit was made.
    """
    try:
        made = api.create_commit(
            repo,
            [*removed, *added],
            commit_message=message,
            create_pr=create_pr,
            revision=branch,
            parent_commit=head,
        )
        return str(made.pr_url or made.commit_url), str(made.oid)
    except Exception as error:
        found = None if create_pr or not has_left(error) else _arrived(api, repo, branch, added)
        if found is None or found == head:
            raise
        return f"{api.endpoint}/{repo}/commit/{found}", found


def _arrived(
    api: HfApi, repo: str, branch: str | None, added: Sequence[CommitOperationAdd]
) -> str | None:
    """Return the head of a branch if all that was sent is there; None where it is not, or the Hub
    does not say.
    """
    try:
        head = str(api.model_info(repo, revision=branch).sha)
        return None if _differing(api, repo, head, added) else head
    except Exception:  # the failure that led here says it better
        return None


def _check_arrived(
    api: HfApi, repo: str, commit: str, added: Sequence[CommitOperationAdd], url: str
) -> None:
    """Check that a commit holds every file that was sent, by size and hash.

    Raises:
        CheckpointError: one is missing there or another.
    """
    if wrong := _differing(api, repo, commit, added):
        raise CheckpointError(
            f"{wrong[0]} is not in {repo} as it was sent, and {len(wrong) - 1} further files. The "
            f"commit is {url}: do not use it. Run the same command again, which sends what differs."
        )


def _differing(
    api: HfApi, repo: str, commit: str, added: Sequence[CommitOperationAdd]
) -> list[str]:
    """Return the files that a commit lacks, or has with another size or hash than here."""
    tree = api.list_repo_tree(repo, recursive=True, revision=commit)
    found = {entry.path: entry for entry in tree if hasattr(entry, "size")}
    return [
        one.path_in_repo
        for one in added
        if one.path_in_repo not in found or not _is_same(found[one.path_in_repo], one)
    ]


def _is_same(entry: Any, sent: CommitOperationAdd) -> bool:
    """Tell whether a file of the Hub has the content that was sent; large ones by their SHA-256."""
    if entry.size != sent.upload_info.size:
        return False
    if entry.lfs is not None:
        return str(entry.lfs.sha256) == sent.upload_info.sha256.hex()
    with sent.as_file() as file:
        content = file.read()
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
    return str(entry.blob_id) == blob.hexdigest()
