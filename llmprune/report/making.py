"""How a result was made: what to type, on which text, with which versions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmprune.report.coverage import coverage_line
from llmprune.report.origin import Origin, beginning_of
from llmprune.report.recoveries import (
    Read,
    cut_while_trained,
    is_pruned,
    last_wish,
    texts_of,
)
from llmprune.report.reproduction import making_text, wish_of


def how_made(data: Mapping[str, Any], runs: Sequence[Mapping[str, Any]], origin: Origin) -> str:
    """Return the commands or recipes of the runs, the text, dtype, versions and warnings."""
    run, wishes, begun = runs[-1], [wish_of(each) for each in runs], beginning_of(runs[0])
    first = runs[0].get("origin") or runs[0]["source"]
    is_base = begun.fingerprint is not None and begun.fingerprint == first.get("fingerprint")
    local = not begun.is_public
    if local and is_base and origin.hub_id:
        wishes[0]["model"], local = origin.hub_id, False
    text = [
        making_text(wishes),
        f"The whole recipe is in `llmprune/run.json`. {_texts(data)}",
    ]
    if local:
        text.append(f"{code(wishes[0]['model'])} stands for {_stand_in(data, is_base)}.")
    versions = {"llmprune": data["llmprune"], **run.get("versions", {})}
    text.append(
        f"Computed in {run.get('dtype', 'its own dtype')} on {run.get('processor', 'a processor')} "
        "with " + ", ".join(f"{name} {version}" for name, version in versions.items()) + "."
    )
    if data["warnings"]:
        text.append("Warnings of the run:\n\n" + "\n".join(f"- {w}" for w in data["warnings"]))
    return "\n\n".join(text)


def _stand_in(data: Mapping[str, Any], is_base: bool) -> str:
    """Return which folder a command begins with that others do not have."""
    if is_base:
        return "the folder that the base model was read from"
    if is_pruned(data) and last_wish(data) is not None and cut_while_trained(data) is None:
        how = f"{code(data['method'])}, pattern {code(data['pattern'])}, {data['sparsity']:.4g}"
        return f"the pruned model that was trained ({how}), whose own run was not found"
    return "the earlier result of llmprune that this one was made from"


def _texts(data: Mapping[str, Any]) -> str:
    """Return what the result learnt from; texts in files are not part of it."""
    found = texts_of(data)
    if not found:
        return "No calibration text was used."
    return " ".join(_text(read, data) for read in found)


def _text(read: Read, data: Mapping[str, Any]) -> str:
    record, trained = read.record, read.use == "training"
    done = "Trained" if trained else "Calibrated"
    text = f"{done} on {record['num_windows']} windows of {record['seq_len']} tokens"
    if len(record["texts"]) == 1:
        text += f" of {code(record['texts'][0]['data'])}"
    elif record["texts"]:
        names = (f"{one['num_windows']} of {code(one['data'])}" for one in record["texts"])
        text += f": {', '.join(names)}"
    else:
        text += f" that were given in Python ({record['data']}), which the command does not know"
    if any("repo" not in one and one["data"] != "demo" for one in record["texts"]):
        text += "; files are not part of this repository"
    if trained:
        return f"{text}, some of them held out to see whether it learns."
    experts = coverage_line(data)
    return f"{text}. Experts: {experts}." if experts else f"{text}."


def code(text: str) -> str:
    """Return text set as code, cut to one line."""
    return "`" + " ".join(text.replace("`", "'").split()) + "`"
