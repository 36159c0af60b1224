"""What a run spends its time on and what waits for what: spans by thread, kept cheaply."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

WAITS = ("wait for read", "wait for write")
MAIN = "main"


class Span(NamedTuple):
    """What a thread did from `start` to `end`, in seconds since the run began."""

    name: str
    thread: str
    start: float
    end: float
    block: int | None


class Timeline:
    """The spans of a run. Threads may add to it at the same time.

    >>> timeline = Timeline()
    >>> with timeline.span("solve", block=3):
    ...     pass
    >>> [(span.name, span.thread, span.block) for span in timeline.spans]
    [('solve', 'main', 3)]
    """

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self._began = time.perf_counter()

    @contextmanager
    def span(self, name: str, block: int | None = None) -> Iterator[None]:
        """Record what the body takes, also where it fails."""
        start = time.perf_counter()
        try:
            yield
        finally:
            end = time.perf_counter()
            self.spans.append(Span(name, _thread(), start - self._began, end - self._began, block))

    def seconds(self) -> dict[str, dict[str, float]]:
        """Return the seconds by thread and name; what lies within a span is not counted in it."""
        found: dict[str, dict[str, float]] = {}
        for thread in dict.fromkeys(span.thread for span in self.spans):
            mine = [span for span in self.spans if span.thread == thread]
            found[thread] = _own_seconds(sorted(mine, key=lambda span: (span.start, -span.end)))
        return found

    def summary(self) -> dict[str, Any]:
        """Return the seconds by thread and name, and those from the first span to the last."""
        first = min((span.start for span in self.spans), default=0.0)
        last = max((span.end for span in self.spans), default=0.0)
        rounded = {
            thread: {name: round(value, 3) for name, value in names.items()}
            for thread, names in self.seconds().items()
        }
        return {"wall": round(last - first, 3), "seconds": rounded}

    def trace(self) -> dict[str, Any]:
        """Return the spans in Chrome's trace format, which Perfetto opens; in microseconds."""
        threads = {name: number for number, name in enumerate(self.seconds(), start=1)}
        events: list[dict[str, Any]] = [
            {"ph": "M", "pid": 1, "tid": number, "name": "thread_name", "args": {"name": name}}
            for name, number in threads.items()
        ]
        for span in sorted(self.spans, key=lambda span: span.start):
            event = {
                **{"ph": "X", "pid": 1, "tid": threads[span.thread], "name": span.name},
                **{"ts": round(span.start * 1e6), "dur": round((span.end - span.start) * 1e6)},
            }
            events.append(event | ({} if span.block is None else {"args": {"block": span.block}}))
        return {"traceEvents": events, "displayTimeUnit": "ms"}


class Clock(dict[str, float]):
    """Seconds by name of one block or one run, which go to a timeline as well."""

    def __init__(self, timeline: Timeline | None = None, block: int | None = None) -> None:
        super().__init__()
        self.timeline = timeline or Timeline()
        self.block = block

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add what the body takes to a name."""
        start = time.perf_counter()
        try:
            with self.timeline.span(name, self.block):
                yield
        finally:
            self[name] = self.get(name, 0.0) + time.perf_counter() - start


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Keep what a stage of a run takes, in a timeline as well where the seconds are a clock's."""
    start = time.perf_counter()
    timeline = seconds.timeline if isinstance(seconds, Clock) else Timeline()
    try:
        with timeline.span(name):
            yield
    finally:
        seconds[name] = round(time.perf_counter() - start, 3)


def _own_seconds(spans: list[Span]) -> dict[str, float]:
    """Return the seconds by name of one thread's spans, outer ones before those within them."""
    found: dict[str, float] = {}
    around: list[Span] = []
    for span in spans:
        while around and around[-1].end <= span.start:
            around.pop()
        took = span.end - span.start
        found[span.name] = found.get(span.name, 0.0) + took
        if around:
            found[around[-1].name] -= took
        around.append(span)
    return found


def _thread() -> str:
    """Return the name of this thread; of one in a pool without its number."""
    if threading.current_thread() is threading.main_thread():
        return MAIN
    return threading.current_thread().name.rpartition("_")[0] or threading.current_thread().name
