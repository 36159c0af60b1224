"""Commands that look: at a model, the methods, a result, and whether it loads."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from llmprune.base.errors import CheckpointError, TooLarge
from llmprune.commands.options import Folder, dtype_of


def inspect(
    model: Annotated[str, typer.Argument(help="A folder, a Hub id, or demo.")],
    revision: Annotated[str | None, Option(help="Branch, tag or commit on the Hub.")] = None,
    trust_remote_code: Annotated[bool, Option("--trust-remote-code")] = False,
    as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print a model's blocks, taps, couplings, experts, and what is eligible; reads no weight."""
    from llmprune import api

    found = api.inspect(model, revision=revision, trust_remote_code=trust_remote_code)
    print(json.dumps(found.to_dict(), indent=2) if as_json else found)


def methods(
    recovery: Annotated[
        bool, Option("--recovery", help="Those of training after a cut, or around it.")
    ] = False,
) -> None:
    """List the methods with what they need and where they come from."""
    from llmprune.base.text import columns
    from llmprune.catalog import METHODS
    from llmprune.engine.parts import needs_of
    from llmprune.mask.pattern import parse_pattern

    if recovery:
        from llmprune.report.offer import recovery_tables

        print(recovery_tables())
        return
    rows = [
        (
            row.name,
            ", ".join(needs_of(row, row.allocation, pattern=parse_pattern(row.pattern)).names)
            or "nothing",
            row.group,
            row.allocation,
            ", ".join(filter(None, (row.refine, row.solver, row.repair))),
            ", ".join(row.patterns),
            row.paper,
        )
        for row in METHODS.values()
    ]
    head = ("method", "needs", "compared in", "allocation", "weights", "patterns", "paper")
    print(columns(head, rows))


def show(
    folder: Folder,
    sites: Annotated[bool, Option("--sites", help="Every site.")] = False,
    coverage: Annotated[
        bool, Option("--coverage", help="The tokens that each block's experts saw.")
    ] = False,
    html: Annotated[
        Path | None,
        Option(metavar="FILE", help="Where the page goes. [default: FOLDER/llmprune/report.html]"),
    ] = None,
) -> None:
    """Print the report of a result, and write it as a page for a browser."""
    from llmprune.pages.result import write_page
    from llmprune.report.run import Report

    report = Report.read(folder)
    print(report)
    if sites:
        print()
        print(report.table())
    if coverage:
        print()
        print(report.coverage())
    try:
        print(f"page: {write_page(folder, html)}")
    except (CheckpointError, TooLarge) as error:
        if html is not None:
            raise
        print(f"the page is not renewed: {error}", file=sys.stderr)  # of a folder that is only read


def gate(
    folders: Annotated[list[Path], typer.Argument(help="Folders to prove.")],
    dtype: Annotated[str, Option(help="float32, bfloat16 or float16.")] = "float32",
    trust_remote_code: Annotated[bool, Option("--trust-remote-code")] = False,
    as_json: Annotated[bool, Option("--json", help="Print the verdicts as JSON.")] = False,
) -> None:
    """Prove in a fresh process that folders load the stock way and compute what they should."""
    from llmprune import api

    for folder in folders:
        verdict = api.gate(folder, dtype=dtype_of(dtype), trust_remote_code=trust_remote_code)
        if as_json:
            print(json.dumps(verdict.to_dict()))
        else:
            print(f"{folder}: {verdict.text()}")
