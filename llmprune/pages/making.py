"""What of a page tells how a result was made: command, sizes, text, versions, what was left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from llmprune.base.progress import human_bytes
from llmprune.pages.document import Section, folded, listed, paragraph, preformatted, together
from llmprune.pages.tables import facts, table
from llmprune.report.origin import beginning_of
from llmprune.report.recoveries import Read, texts_of
from llmprune.report.reproduction import command_text, num_stages, recipe_text, wish_of


def beginning_part(data: Mapping[str, Any]) -> Section | None:
    """Return the command that makes the result again, and its sizes; of models in memory these."""
    run, parts = data.get("run") or {}, []
    if run.get("recipe"):
        wish = wish_of(run)
        recipe = preformatted(recipe_text(wish), label="Recipe")
        if num_stages(wish) == 1:
            parts.append(preformatted(command_text(wish), label="Command", wrap=True))
            parts.append(folded("The same as a recipe", recipe))
        else:
            parts.append(preformatted("llmprune --recipe recipe.yaml", label="Command"))
            parts += [paragraph("where recipe.yaml holds"), recipe]
        begun = beginning_of(run)
        if not begun.is_public:
            parts.append(
                paragraph(f"{begun.name} is a folder of the machine that ran it.", kind="note")
            )
    rows = _sizes(data)
    if rows:
        parts.append(table(("", "before", "after"), rows, caption="Sizes"))
    if not parts:
        return None
    lead = "The command makes the same result again from the same text and versions."
    return Section("How to make it again", together(parts), lead if run.get("recipe") else "")


def left_part(data: Mapping[str, Any]) -> Section | None:
    """Return what was not pruned, and why; what was cut by a simpler rule, and why."""
    rows = [
        (row["what"], f"{row['num_params']:,}", row["reason"])
        for row in data.get("skipped", ())
        if row["num_params"]
    ]
    simpler = [
        (row["site"], f"{row['tokens']:,}", str(row["fallback"]))
        for block in data["blocks"]
        for row in block["sites"]
        if row.get("fallback")
    ]
    parts = []
    if rows:
        parts.append(table(("what", "parameters", "why"), rows, caption="Not pruned"))
    if simpler:
        lines = table(("linear", "tokens seen", "cut by"), simpler, caption="Cut by a simpler rule")
        title = f"{len(simpler):,} linears were cut by a simpler rule"
        parts.append(lines if len(simpler) <= 12 else folded(title, lines))
    return Section("What was left alone", together(parts)) if parts else None


def warnings_part(data: Mapping[str, Any]) -> Section:
    """Return what the run warned of."""
    found = [str(warning) for warning in data.get("warnings", ())]
    return Section("Warnings", listed(found) if found else paragraph("The run warned of nothing."))


def data_part(data: Mapping[str, Any]) -> Section | None:
    """Return text, seed, hashes, versions, device and times."""
    run = data.get("run") or {}
    parts = [facts(_text(read), caption=f"Text of {read.use}") for read in texts_of(data)]
    machine = list(_machine(data, run))
    parts.append(facts(machine, caption="Versions and device"))
    hashes = list(_hashes(run))
    if hashes:
        parts.append(facts(hashes, caption="Hashes"))
    if data.get("files"):
        files = facts(data["files"].items(), caption="SHA-256")
        parts.append(folded(f"{len(data['files'])} files of weights and masks", files))
    return Section("Text, versions and hashes", together(parts))


def _sizes(data: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return rows of what was counted before and after."""
    rows = []
    names = {"params": "parameters", "size": "bytes of tensors", "kv": "cache values per token"}
    for key, name in names.items():
        found = data.get("sizes", {}).get(key, {})
        if found.get("before") is not None and found.get("after") is not None:
            show = human_bytes if key == "size" else "{:,}".format
            rows.append((name, show(found["before"]), show(found["after"])))
    removed = [
        (row["weights"], row["removed_weights"]) for b in data["blocks"] for row in b["sites"]
    ]
    if removed:
        weights, gone = map(sum, zip(*removed, strict=True))
        rows.append(("weights that may go", f"{weights:,}", f"{weights - gone:,}"))
    return rows


def _text(read: Read) -> Iterator[tuple[str, str]]:
    record = read.record
    yield read.use, f"{record['num_windows']:,} windows of {record['seq_len']:,} tokens"
    for one in record["texts"]:
        split = f", {one['split']}" if one.get("split") else ""
        yield "from", f"{one['data']}{split} ({one['num_windows']:,} windows)"
    if not record["texts"]:
        yield "from", str(record["data"])
    if record.get("tokens"):
        yield "SHA-256 of its token ids", str(record["tokens"])
    if record.get("leak") is not None:
        yield "measured on as well", f"{record['leak']:.1%} of the text of the perplexity"


def _machine(data: Mapping[str, Any], run: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "llmprune", str(data["llmprune"])
    yield from ((name, str(version)) for name, version in run.get("versions", {}).items())
    names = {
        **{"device": "device", "processor": "processor", "threads": "threads"},
        **{"dtype": "computed in", "attention": "attention", "world_size": "processes"},
    }
    yield from ((name, str(run[key])) for key, name in names.items() if run.get(key) is not None)
    wish = run.get("wish") or run.get("recipe") or {}
    if "seed" in wish:
        yield "seed", str(wish["seed"])
    for name, value in data.get("seconds", {}).items():
        yield f"time, {name}", f"{value:,.1f} s"


def _hashes(run: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, name in (("source", "model that was read"), ("origin", "model it began with")):
        found = run.get(key) or {}
        if found.get("fingerprint"):
            revision = f", revision {found['revision']}" if found.get("revision") else ""
            yield f"{name} ({found['name']}{revision})", str(found["fingerprint"])
    if run.get("tokens"):
        yield "token ids", str(run["tokens"])
