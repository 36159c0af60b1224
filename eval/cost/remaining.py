"""Whether the time that a run says is left is what it then takes, from the events of finished runs.

usage: python eval/cost/remaining.py RESULT ... [--least 5] [--help]
A line for each stage of at least 4 steps and `--least` seconds: the time told to be left after the
second step, what the rest of the stage took, and how far all later tellings were off at most. What
was told in the last tenth of a stage is left out, where a moment is many per cent.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import NamedTuple


class Told(NamedTuple):
    """What a stage told after a step: seconds since it began, and seconds left."""

    at: float
    left: float


class Stage(NamedTuple):
    """A stage that ended: its name, seconds, and what it told after each step."""

    name: str
    seconds: float
    told: list[Told]


def stages_of(events: Path) -> Iterator[Stage]:
    """Yield the stages that ended, in the order of their ends."""
    began: dict[str, datetime] = {}
    told: dict[str, list[Told]] = {}
    for line in events.read_text(encoding="utf-8").splitlines():
        event = json.loads(line)
        now, name = datetime.fromisoformat(event["time"]), str(event.get("stage"))
        if event["event"] == "stage_start":
            began[name], told[name] = now, []
        elif event["event"] == "stage_advance" and "left" in event:
            told[name].append(Told((now - began[name]).total_seconds(), event["left"]))
        elif event["event"] == "stage_end" and name in began:
            yield Stage(name, (now - began[name]).total_seconds(), told[name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--least", type=float, default=5.0, help="seconds that a stage takes")
    asked = parser.parse_args()
    print("| result | stage | steps | seconds | told after the second | it took | furthest off |")
    print("|---|---|---|---|---|---|---|")
    for result in asked.results:
        for name, seconds, told in stages_of(result / "llmprune" / "events.jsonl"):
            if len(told) < 4 or seconds < asked.least:
                continue
            second = told[1]
            later = [one for one in told[1:] if one.at <= 0.9 * seconds] or [second]
            off = max((one.at + one.left - seconds) / (seconds - one.at) for one in later)
            under = min((one.at + one.left - seconds) / (seconds - one.at) for one in later)
            print(
                f"| {result.name} | {name} | {len(told)} | {seconds:.1f} | {second.left:.1f} | "
                f"{seconds - second.at:.1f} | {under:+.0%} to {off:+.0%} |"
            )


if __name__ == "__main__":
    main()
