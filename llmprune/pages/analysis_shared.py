"""An analysis as it may leave this computer: made anew without paths, and without private text."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmprune.analysis.types import Finding, absent, finding_from
from llmprune.calibration.selection import place_of
from llmprune.checkpoint.source import read_json
from llmprune.pages.analysis_result import CONTENT, Analysis, csv_text

QUOTING = "worst"  # the analysis whose table quotes the text that was read


def analysis_files(folder: Path, clean: Callable[[Any], Any]) -> dict[str, bytes]:
    """Return what of an analysis goes with a result, by name: page, data, tables, then pictures.

    `clean` cuts paths out of plain data. Of a text that is a file of one's own no word goes.

    Raises:
        CheckpointError: the folder holds an analysis that cannot be read.
    """
    if not (folder / CONTENT).is_file():
        return {}
    told = read_json(folder / CONTENT)
    found = {name: finding_from(name, each) for name, each in told["findings"].items()}
    own_text = told["settings"].get("data")
    if QUOTING in found and own_text is not None and place_of(str(own_text)) == "local":
        found[QUOTING] = _silent(found[QUOTING])
    analysis = Analysis(
        model=clean(told["model"]),
        settings=clean(told["settings"]),
        findings={n: replace(each, means=tuple(clean(each.means))) for n, each in found.items()},
        command=clean(told["command"]),
    )
    texts = {"analysis.html": analysis.page(), CONTENT: _json(analysis.to_dict())}
    texts |= {f"{name}.csv": csv_text(each) for name, each in found.items() if each.rows}
    pictures = {
        path.name: path.read_bytes()
        for path in sorted(folder.glob("*.png"))
        if path.stem in found and found[path.stem].charts
    }
    return {name: text.encode() for name, text in texts.items()} | pictures


def _silent(finding: Finding) -> Finding:
    """Return a finding that quotes nothing."""
    why = "its table quotes a text of one's own, which does not go with the result"
    return absent(finding.name, finding.title, why)


def _json(data: Mapping[str, Any]) -> str:
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"
