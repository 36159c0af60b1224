"""Spans of threads: what lies within is counted once, and the trace is one that Perfetto opens."""

from __future__ import annotations

import pytest

from llmprune.base.errors import TooLarge
from llmprune.base.timeline import Clock, Span, Timeline
from llmprune.base.worker import Worker
from llmprune.report.tables import profile_line


def known_spans() -> Timeline:
    timeline = Timeline()
    timeline.spans += [  # in the order in which they end
        Span("read", "main", 1.0, 2.0, 0),
        Span("wait for write", "main", 3.0, 3.5, 0),
        Span("write shard", "writer", 2.0, 9.0, 0),
        Span("solve", "main", 2.0, 5.0, 0),
        Span("cut", "main", 0.0, 10.0, None),
    ]
    return timeline


def test_what_lies_within_a_span_is_not_counted_in_it() -> None:
    main = {"cut": 6.0, "read": 1.0, "solve": 2.5, "wait for write": 0.5}
    assert known_spans().summary() == {
        "wall": 10.0,
        "seconds": {"main": main, "writer": {"write shard": 7.0}},
    }


def test_the_report_says_what_the_main_thread_waited_for() -> None:
    line = profile_line(known_spans().summary())
    assert line == "waited for reads 0.0 %, for writes 5.0 %; cut 60 %, solve 25 %, read 10 %"
    assert profile_line(None) == ""


def test_the_trace_has_an_event_per_span_on_its_thread() -> None:
    events = known_spans().trace()["traceEvents"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    spans = [event for event in events if event["ph"] == "X"]
    assert [(names[e["tid"]], e["name"], e["ts"], e["dur"]) for e in spans] == [
        ("main", "cut", 0, 10_000_000),
        ("main", "read", 1_000_000, 1_000_000),
        ("writer", "write shard", 2_000_000, 7_000_000),
        ("main", "solve", 2_000_000, 3_000_000),
        ("main", "wait for write", 3_000_000, 500_000),
    ]
    assert [event.get("args") for event in spans] == [None, *[{"block": 0}] * 4]


def test_a_clock_adds_up_and_keeps_spans_of_bodies_that_fail() -> None:
    clock = Clock(block=3)
    for _ in range(2):
        with pytest.raises(KeyError), clock.timed("solve"):
            raise KeyError
    assert clock["solve"] > 0
    assert [(span.name, span.block) for span in clock.timeline.spans] == [("solve", 3)] * 2


def test_after_a_job_that_failed_none_is_begun_and_the_fault_is_told() -> None:
    done: list[int] = []

    def fail() -> None:
        raise TooLarge("the disk is full")

    worker = Worker("writer")
    for job in (lambda: done.append(1), fail, lambda: done.append(2)):
        worker._pending.append(worker._pool.submit(worker._do, job))
    for ask in (worker.settle, worker.settle, lambda: worker.begin(fail)):
        with pytest.raises(TooLarge, match="disk is full"):
            ask()
    assert done == [1]
