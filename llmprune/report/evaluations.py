"""What was measured of a result: by its own run, and later by `llmprune eval`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from llmprune.report.recoveries import last_wish, sides

if TYPE_CHECKING:
    from huggingface_hub import EvalResult


class Measured(NamedTuple):
    """A number of a result, how it was measured, and that of other models where it is known.

    `dense` is of the model that all began with, `before` of the one that was trained last.
    """

    what: str
    metric: str
    data: str
    protocol: str
    value: float
    dense: float | None = None
    stderr: float | None = None
    dense_stderr: float | None = None
    before: float | None = None


def measured(data: Mapping[str, Any], later: Mapping[str, Any]) -> list[Measured]:
    """Return what report.json and evaluations.json hold, given as data, in order."""
    found = _own(data)
    rolling = data.get("rolling")
    if rolling and last_wish(data) is None:  # else it is of the model before the training
        found += _rolling(rolling["pruned"], dense=rolling["dense"])
    found += [_tokens(entry) for entry in later.get("perplexity", ())]
    for entry in later.get("rolling", ()):
        found += _rolling(entry)
    for entry in later.get("tasks", ()):
        found += _tasks(entry)
    kept: dict[tuple[str, str, str], Measured] = {}
    for one in found:  # measured again: the newer value counts, beside a known dense one
        key = one.what, one.data, one.protocol
        if one.dense is None and key in kept:
            one = one._replace(dense=kept[key].dense, dense_stderr=kept[key].dense_stderr)
        if key in kept:
            one = one._replace(before=kept[key].before)
        kept[key] = one
    return list(kept.values())


def metric_results(results: Sequence[Measured]) -> list[EvalResult]:
    """Return the results as the Hub's metadata has them: of this model, the dense one's as note."""
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=one.data,
            dataset_name=one.data,
            metric_type=one.metric,
            metric_name=f"{one.what} ({one.protocol})",
            metric_value=one.value,
            metric_args=None if one.dense is None else {"dense_base_model": one.dense},
        )
        for one in results
    ]


def _own(data: Mapping[str, Any]) -> list[Measured]:
    """Return the perplexity that the run itself measured."""
    found = sides(data)
    if not found:
        return []
    others = {side.label: side.entry["value"] for side in found[:-1]}
    dense = others.pop("dense", None)
    one = _tokens(found[-1].entry, dense=dense)
    return [one._replace(before=next(iter(others.values()), None))]


def _tokens(entry: Mapping[str, Any], dense: float | None = None) -> Measured:
    """Return a perplexity of tokens with its protocol."""
    stride = f", stride {entry['stride']}" if entry.get("stride") else ""
    bos = "BOS first" if entry.get("bos") else "no BOS"
    protocol = f"{entry['num_windows']} windows of {entry['seq_len']} tokens{stride}, {bos}"
    protocol += _unusual(entry)
    data = str(entry["data"])
    return Measured(f"perplexity of {data}", "perplexity", data, protocol, entry["value"], dense)


def _unusual(entry: Mapping[str, Any]) -> str:
    """Return the dtype that was computed in, where it is not float32."""
    dtype = entry.get("dtype", "float32")
    return "" if dtype == "float32" else f", {dtype}"


def _rolling(
    entry: Mapping[str, Any], dense: Mapping[str, Any] | None = None
) -> Iterator[Measured]:
    """Yield what a whole text measured by word and by byte says."""
    data = str(entry["data"])
    protocol = f"every token once, windows of {entry['seq_len']} tokens after `{entry['prefix']}`"
    protocol += _unusual(entry)
    for metric in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        what = f"{metric.replace('_', ' ')} of {data}"
        beside = None if dense is None else dense[metric]
        yield Measured(what, metric, data, protocol, entry[metric], beside)


def _tasks(entry: Mapping[str, Any]) -> Iterator[Measured]:
    """Yield the metrics of tasks of lm-evaluation-harness."""
    scores = entry["scores"]
    dense = {_key(score): score for score in scores.get("dense", ())}
    for score in scores.get("pruned") or scores.get("model", ()):
        facts = entry["tasks"].get(score["task"], {})
        parts = [f"lm-eval {entry['settings']['lm_eval']}"]
        if facts:
            parts.append(f"version {facts['version']}, {facts['num_fewshot']}-shot")
            parts.append(f"{facts['num_items']:,} of {facts['num_items_in_all']:,} items")
        beside = dense.get(_key(score), {})
        reading = "" if score["filter"] == "none" else f" ({score['filter']})"
        yield Measured(
            what=f"{score['task']}: {score['metric']}{reading}",
            metric=score["metric"],
            data=score["task"],
            protocol=", ".join(parts),
            value=score["value"],
            dense=beside.get("value"),
            stderr=score["stderr"],
            dense_stderr=beside.get("stderr"),
        )


def _key(score: Mapping[str, Any]) -> tuple[str, str, str]:
    return score["task"], score["metric"], score["filter"]
