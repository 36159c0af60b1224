"""What tasks said of one model or two, side by side, with how it was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from llmprune.base.text import columns

DENSE, PRUNED, ALONE = "dense", "pruned", "model"


@dataclass(frozen=True, kw_only=True)
class Score:
    """One metric of one task; `filter` says how answers were read ("none" where they were not)."""

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    higher_is_better: bool | None

    @property
    def name(self) -> str:
        """Return the metric with its filter, where there is one."""
        return self.metric if self.filter == "none" else f"{self.metric} ({self.filter})"

    def __str__(self) -> str:
        if self.stderr is None:
            return f"{self.value:.5g}"
        return f"{self.value:.4f} ± {self.stderr:.4f}"


@dataclass(frozen=True, kw_only=True)
class TaskFacts:
    """A task as it was run: its version, worked examples in the prompt, items and all items."""

    version: str
    num_fewshot: int
    num_items: int
    num_items_in_all: int


@dataclass(frozen=True, kw_only=True, repr=False)
class Evaluation:
    """Task scores by model: "dense" and "pruned" of a result, "model" for any other.

    `str(evaluation)` is the table that `llmprune eval --tasks` prints.
    """

    models: Mapping[str, str]
    scores: Mapping[str, tuple[Score, ...]]
    tasks: Mapping[str, TaskFacts]
    settings: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    def value(self, task: str, metric: str, of: str) -> float:
        """Return a score of a model: "dense", "pruned" or "model".

        Raises:
            KeyError: it was not measured.
        """
        for score in self.scores[of]:
            if (score.task, score.metric) == (task, metric):
                return score.value
        raise KeyError(f"no {metric} of {task} was measured")

    def table(self) -> str:
        """Return one line per metric: every model with its standard error, and the difference."""
        both = DENSE in self.scores and PRUNED in self.scores
        head = ["task", "metric", *self.scores, *(["difference"] if both else [])]
        rows = []
        for place, score in enumerate(next(iter(self.scores.values()))):
            row = [score.task, score.name, *(str(found[place]) for found in self.scores.values())]
            if both:
                row.append(_difference(self.scores[DENSE][place], self.scores[PRUNED][place]))
            rows.append(row)
        return columns(head, rows)

    def protocol(self) -> str:
        """Return how it was measured, a line per task."""
        lines = [
            f"{name}: version {facts.version}, {facts.num_items} of {facts.num_items_in_all} "
            f"items, {facts.num_fewshot}-shot"
            for name, facts in self.tasks.items()
        ]
        lines.append(f"lm_eval {self.settings['lm_eval']}, seed {self.settings['seed']}")
        lines += [f"{role}: {name}, {self._computed(role)}" for role, name in self.models.items()]
        return "\n".join(lines)

    def _computed(self, role: str) -> str:
        again = role in self.settings.get("measured before", ())
        return f"{self.settings['computed'][role]}{', measured before' if again else ''}"

    def __repr__(self) -> str:
        return f"{self.table()}\n\n{self.protocol()}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, as evaluations.json keeps it."""
        return {
            "models": dict(self.models),
            "scores": {
                role: [asdict(score) for score in found] for role, found in self.scores.items()
            },
            "tasks": {name: asdict(facts) for name, facts in self.tasks.items()},
            "settings": dict(self.settings),
            "notes": list(self.notes),
        }


def _difference(dense: Score, pruned: Score) -> str:
    """Return pruned minus dense with its sign."""
    change = pruned.value - dense.value
    return f"{change:+.4f}" if dense.stderr is not None else f"{change:+.5g}"
