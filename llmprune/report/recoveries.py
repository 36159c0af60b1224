"""The trainings behind a result, as its report records them: what was done, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from llmprune.recovery.methods import RECOVERIES


class Recovery(NamedTuple):
    """One training: what the report recorded, and what was asked for where that is known.

    `name` tells it from others of the same result.
    """

    name: str
    record: Mapping[str, Any]
    wish: Mapping[str, Any]

    @property
    def title(self) -> str:
        row = RECOVERIES.get(self.record["method"])
        return row.title if row else str(self.record["method"])

    @property
    def paper(self) -> str:
        row = RECOVERIES.get(self.record["method"])
        return row.paper if row else ""


class Read(NamedTuple):
    """A text that a result has read: for what, and what is known of it."""

    use: str
    record: Mapping[str, Any]


class Side(NamedTuple):
    """A model that perplexity was measured of, and what it is called beside the others."""

    label: str
    entry: Mapping[str, Any]


def recoveries_of(data: Mapping[str, Any]) -> list[Recovery]:
    """Return the trainings of a result, the earliest first.

    The run that made the result knows what was asked for in its own steps, which are the last.
    """
    records, asked = data.get("recovery") or (), _asked(data)
    unknown = len(records) - len(asked)
    return [
        Recovery(
            "recovery" if len(records) == 1 else f"recovery {place + 1}",
            record,
            {**asked[place - unknown], **_taught(record)} if place >= unknown else {},
        )
        for place, record in enumerate(records)
    ]


def _taught(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return whether the dense model taught, where that was left to the run."""
    return {"distill": record["distill"]} if "distill" in record else {}


def last_wish(data: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return what the last step asked for, where that trained; None where it pruned."""
    steps = data.get("run", {}).get("recipe", {}).get("steps", ())
    found: Mapping[str, Any] | None = next((s["recover"] for s in steps if "recover" in s), None)
    return found


def cut_while_trained(data: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the wish to prune of the last step, where that trained and pruned in one."""
    return (last_wish(data) or {}).get("prune")


def cut_method(data: Mapping[str, Any]) -> str:
    """Return the method by which a result was pruned, empty where llmprune did not."""
    if cut_while_trained(data) is None:
        return str(data.get("method") or "")
    return _judge(recoveries_of(data)[-1])


def is_pruned(data: Mapping[str, Any]) -> bool:
    """Tell whether llmprune removed anything of a result; else its zeros are another tool's."""
    return bool(data.get("method"))


def texts_of(data: Mapping[str, Any]) -> list[Read]:
    """Return the texts that a result was calibrated and trained on, those known, by `use`."""
    calibrated = [Read("calibration", data["calibration"])] if data.get("calibration") else []
    records = data.get("recovery") or ()
    return calibrated + [Read("training", one["text"]) for one in records if one.get("text")]


def recovery_lines(data: Mapping[str, Any]) -> dict[str, str]:
    """Return a line for each training: method, course, held-out loss, and the merge's distance."""
    return {one.name: _line(one) for one in recoveries_of(data)}


def trained_text(one: Recovery) -> str:
    """Return what was trained on how much, and how much of the model that was."""
    record = one.record
    adapters = f", rank {record['rank']}" if record.get("rank") else ""
    norms = ", norms too" if adapters and record.get("norms") else ""
    return (
        f"{record['method']}{adapters}{norms}, {record['steps']:,} steps, "
        f"{record['tokens']:,} tokens"
    )


def loss_text(one: Recovery) -> str:
    """Return the loss held out before and after; empty where none was measured."""
    held = one.record["history"]["held"]
    if not held:
        return ""
    (_, before), (_, after) = held[0], held[-1]
    return f"held-out loss {before:.4f} before, {after:.4f} after"


def merge_text(one: Recovery) -> str:
    """Return how far the stored model is from the trained one."""
    merge = one.record["merge"]
    cut = " (cut at the merge)" if one.record["method"] == "lora-prune" else ""
    return (
        f"stored within {merge['stored']:.1e} of the largest logit of what was trained{cut}, "
        f"KL {merge['kl']:.1e}"
    )


def shaping_words(one: Recovery) -> list[str]:
    """Return what moved masks meanwhile and who taught, in the words of the recipe.

    >>> cut = {"method": "wanda", "sparsity": 0.8, "pattern": "unstructured"}
    >>> shaping_words(Recovery("recovery", {"method": "full"}, {"prune": cut}))
    ['pruned to 0.8 meanwhile by wanda, schedule cubic']
    """
    wish, words = one.wish, []
    if cut := wish.get("prune"):
        fixed = ":" in cut["pattern"]
        amount = cut["pattern"] if fixed else f"{cut['sparsity']:.4g}"
        words.append(f"pruned to {amount} meanwhile by {_judge(one)}")
        schedule = wish.get("schedule", "cubic")
        if not wish.get("fade") and (not fixed or schedule == "staircase"):
            words[-1] += f", schedule {schedule}"
    if wish.get("regrow"):
        words.append(f"regrowth {wish['regrow']}")
    if wish.get("soft"):
        words.append(f"soft mask {wish['soft']}")
    if wish.get("fade"):
        words.append({"march": "on a line to zero", "pull": "drawn to zero"}[wish["fade"]])
    if wish.get("rewind", "none") != "none":
        words.append(f"{wish['rounds']} rounds, each from the first {wish['rewind']}")
    if wish.get("distill"):
        words.append(f"taught by the dense model ({wish['distill']})")
    return words


def sides(data: Mapping[str, Any]) -> list[Side]:
    """Return the models whose perplexity a run measured, the result last; empty where none was.

    A dense model that is not there any more was not measured.
    """
    quality, wish = data.get("perplexity"), last_wish(data)
    if not quality:
        return []
    if wish is None:
        names = {"dense": "dense", "pruned": "pruned"}
    else:
        cut, zeros = wish.get("prune"), wish.get("masks") == "zeros"
        was_dense = not zeros and _source_is_origin(data)
        before = (
            "dense" if was_dense else "pruned" if not cut and _follows_a_cut(data) else "before"
        )
        result = "pruned" if cut else "trained" if was_dense else "recovered"
        names = {"dense": "dense", "before": before, "pruned": result}
        if "vocabulary" in str(data.get("pattern")):
            del names["dense"]  # it was asked in tokens that mean others to it
    found = {names[key]: quality[key] for key in names if key in quality}
    return [Side(label, entry) for label, entry in found.items()]


def _line(one: Recovery) -> str:
    words = [trained_text(one), *shaping_words(one), loss_text(one), merge_text(one)]
    return "; ".join(filter(None, words))


def _judge(one: Recovery) -> str:
    """Return what says which weights go while a model is trained.

    Soft masks know magnitude alone, and some trainings what their adapters learn.
    """
    row = RECOVERIES.get(one.record["method"])
    if row is not None and row.units:
        return str(one.record["method"])
    return "magnitude" if one.wish.get("soft") else str(one.wish["prune"]["method"])


def _asked(data: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the wishes of the steps that train, of all stages where the run was one of several."""
    run = data.get("run", {})
    steps = (run.get("chain") or run.get("recipe") or {}).get("steps", ())
    return [step["recover"] for step in steps if "recover" in step]


def _follows_a_cut(data: Mapping[str, Any]) -> bool:
    """Tell whether the step before the last, which trained, is known to have pruned."""
    chain = data.get("run", {}).get("chain")
    if chain:
        kinds = [kind for step in chain["steps"] for kind in step if kind != "evaluate"]
        return len(kinds) > 1 and kinds[-2] == "prune"
    return len(data.get("recovery") or ()) == 1


def _source_is_origin(data: Mapping[str, Any]) -> bool:
    """Tell whether the last step began at the model that all began with."""
    run = data.get("run", {})
    source, origin = run.get("source", {}), run.get("origin", {})
    return bool(source) and source.get("fingerprint") == origin.get("fingerprint")
