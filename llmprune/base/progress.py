"""The one progress display of a run: what people see, and the events that machines read."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

from llmprune.base.timeline import Timeline

if TYPE_CHECKING:  # rich is imported on the first display, so that importing this file is cheap
    from rich.console import Console
    from rich.progress import Progress as Bars

Mode = Literal["rich", "quiet", "json"]

_PIPE_WIDTH = 120


class Progress:
    """Show a run to people and record it as events, one JSON object each.

    ``rich`` draws bars and tables on a terminal and prints plain lines into a pipe or a notebook;
    ``quiet`` shows warnings only; ``json`` prints each event as a line. Warnings go to stderr in
    every mode, the display to ``stream`` (stdout when it is None). ``timeline`` is what threads of
    the run do when; with ``profile`` it is written beside the report.

    >>> progress = Progress("quiet")
    >>> with progress.stage("cut", total=2) as stage:
    ...     stage.advance("block 0", sparsity=0.5)
    >>> progress.warnings
    []
    """

    def __init__(
        self, mode: Mode = "rich", stream: TextIO | None = None, *, profile: bool = False
    ) -> None:
        self.mode = mode
        self.profile = profile
        self.timeline = Timeline()
        self.warnings: list[str] = []
        self._stream = stream
        self._path: Path | None = None
        self._waiting: list[str] = []
        self._bars: Bars | None = None

    def bind(self, path: str | Path) -> None:
        """Append all events to the file ``path`` from now on, those buffered so far first."""
        self._path = Path(path)
        self._flush()

    def event(self, name: str, /, **fields: Any) -> None:
        """Record that ``name`` happened; fields are made JSON-able (tensors of one value too)."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"time": now, "event": name} | _plain(fields))
        self._waiting.append(line)
        self._flush()
        if self.mode == "json":
            self._print(line)

    def note(self, text: str) -> None:
        """Tell the user something that needs no action."""
        self.event("note", text=text)
        self._say(text)

    def warn(self, text: str) -> None:
        """Tell the user something that may need action; it is kept in ``warnings``."""
        self.warnings.append(text)
        self.event("warning", text=text)
        with suppress(OSError, ValueError):
            print(f"warning: {text}", file=sys.stderr, flush=True)

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Stage]:
        """Open a stage of ``total`` steps; call ``advance`` on what this yields after each step."""
        stage = Stage(self, name, total)
        self.event("stage_start", stage=name, total=total)
        owner = self.mode == "rich" and self._bars is None and self._is_terminal
        try:
            if owner:
                self._bars = self._new_bars()
                self._bars.start()
            stage.open(self._bars)
            yield stage
        finally:
            if owner and self._bars is not None:
                self._bars.stop()
                self._bars = None
            seconds = round(time.monotonic() - stage.began, 3)
            self.event("stage_end", stage=name, done=stage.done, total=total, seconds=seconds)

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Print a table (in ``rich`` mode only); columns of numbers are aligned to the right."""
        if self.mode != "rich":
            return
        from rich.table import Table
        from rich.text import Text

        rows = [list(row) for row in rows]
        table = Table(title=Text(title), title_justify="left")
        for position, column in enumerate(columns):
            numeric = all(isinstance(row[position], int | float) for row in rows)
            table.add_column(Text(column), justify="right" if numeric else "left")
        for row in rows:
            table.add_row(*(Text(_cell(value)) for value in row))
        with suppress(OSError, ValueError):
            (self._bars.console if self._bars else self._console()).print(table)

    @property
    def _out(self) -> TextIO:
        return sys.stdout if self._stream is None else self._stream

    @property
    def _is_terminal(self) -> bool:
        return self._out.isatty()

    def _flush(self) -> None:
        """Write what waits; while the bound folder is renamed, events wait for a new bind."""
        if self._path is None or not self._path.parent.is_dir():
            return
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(line + "\n" for line in self._waiting)
        except OSError:  # a full disk: what the run itself says about it matters more
            return
        self._waiting.clear()

    def _say(self, text: str) -> None:
        if self.mode != "rich":
            return
        if self._bars is not None:  # above the bars, which would otherwise be torn
            self._bars.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            self._print(text)

    def _print(self, text: str) -> None:
        """Print a line; a run does not end because nobody reads on: `llmprune ... | head`."""
        with suppress(OSError, ValueError):  # a broken pipe, a full disk, a closed file
            print(text, file=self._out, flush=True)

    def _console(self) -> Console:
        from rich.console import Console

        tty = self._is_terminal
        width = None if tty else _PIPE_WIDTH
        # A notebook gets text, as a pipe does: rich's notebook display needs further packages.
        return Console(file=self._out, force_terminal=tty, force_jupyter=False, width=width)

    def _new_bars(self) -> Bars:
        from rich import progress as parts

        return parts.Progress(
            parts.TextColumn("{task.description}", markup=False),
            parts.BarColumn(bar_width=24),
            parts.MofNCompleteColumn(),
            parts.TimeElapsedColumn(),
            parts.TextColumn("{task.fields[left]}", markup=False),
            parts.TextColumn("{task.fields[shown]}", markup=False),
            console=self._console(),
            redirect_stderr=sys.stderr.isatty(),  # warnings stay in `2> file`
        )


class Stage:
    """One stage of a run; made by ``Progress.stage``."""

    def __init__(self, progress: Progress, name: str, total: int) -> None:
        self.name, self.total, self.done = name, total, 0
        self.began = time.monotonic()
        self._times: list[float] = []  # of each step, seconds; work that was found done has none
        self._last = self.began
        self._progress = progress
        self._advance_bar: Any = None

    def open(self, bars: Bars | None) -> None:
        """Add this stage's bar to ``bars``, where a terminal shows any."""
        if bars is not None:
            task = bars.add_task(self.name, total=self.total, shown="", left="")
            self._advance_bar = lambda shown, left: bars.update(
                task, completed=self.done, shown=shown, left=left
            )

    def advance(self, label: str = "", *, whole: bool = False, **fields: Any) -> None:
        """Count one step as done; ``fields`` (sparsity, error, memory) are shown and recorded.

        A step that an earlier run had finished is ``whole``: it tells nothing of those to come.
        """
        self.done += 1
        now = time.monotonic()
        if not whole:
            self._times.append(now - self._last)
        self._last = now
        place = {"stage": self.name, "index": self.done, "total": self.total, "label": label}
        left = self.left()
        told = {} if left is None else {"left": round(left, 3)}
        self._progress.event("stage_advance", **place | fields | told)
        shown = "  ".join([label] * bool(label) + [_field(*item) for item in fields.items()])
        to_go = f"{human_seconds(left)} left" if left else ""
        if self._advance_bar is not None:
            self._advance_bar(shown, to_go)
        elif self._crossed_a_tenth():
            elapsed = human_seconds(now - self.began)
            head = f"{self.name} {self.done}/{self.total}"
            parts = (head, elapsed, to_go, shown)
            self._progress._say("  ".join(part for part in parts if part))

    def left(self) -> float | None:
        """Return the seconds that the rest of this stage will take; None before the first step.

        Steps cost what those so far did on average. The first is left out once there is a second:
        it also pays for what is loaded and allocated once.
        """
        if not self._times:
            return None
        known = self._times[1:] or self._times
        return sum(known) / len(known) * (self.total - self.done)

    def _crossed_a_tenth(self) -> bool:
        total = max(self.total, 1)
        return self.done * 10 // total > (self.done - 1) * 10 // total


def human_bytes(num_bytes: float) -> str:
    """Return a size in decimal units with three digits.

    >>> human_bytes(812e6)
    '812 MB'
    """
    return _scaled(num_bytes, ("B", "kB", "MB", "GB", "TB", "PB"))


def human_count(count: float) -> str:
    """Return a count with three digits.

    >>> human_count(5_770_000)
    '5.77 M'
    """
    return _scaled(count, ("", "k", "M", "B", "T")).rstrip()


def human_seconds(seconds: float) -> str:
    """Return a duration in its two largest units.

    >>> human_seconds(185)
    '3 min 05 s'
    """
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _scaled(number: float, units: Sequence[str]) -> str:
    for unit in units[:-1]:
        if abs(number) < 999.5:  # what three digits would round to 1000 belongs to the next unit
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.0f} {units[-1]}"


def _field(name: str, value: Any) -> str:
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"{name} {value}"
    if name in _SHOWN:
        return f"{name} {_SHOWN[name](value)}"
    return f"{name} {_cell(value)}"


_SHOWN = {
    "sparsity": lambda value: f"{100 * value:.1f} %",
    "error": lambda value: f"{value:.1e}",
    "memory": human_bytes,
    "seconds": human_seconds,
}


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> Any:
    """Turn a value into what JSON can hold; inf and nan, which it cannot, become words."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | None) else str(value)
