"""What asks for a run again, from the recipe that its folder recorded: a command, or a recipe.

One step is a command, of pruning or of recovery; several are a recipe in YAML.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llmprune.recipe import PruneStep, Recipe, build, default_steps
from llmprune.recipe.dialect import dump
from llmprune.report.origin import beginning_of

FLAGS = {
    "model": "--model",
    "revision": "--revision",
    "prune.method": "--method",
    "prune.pattern": "--pattern",
    "prune.sparsity": "--sparsity",
    "prune.effort": "--effort",
    "calibration.data": "--calib",
    "calibration.num_samples": "--num-samples",
    "calibration.seq_len": "--seq-len",
    "seed": "--seed",
    "device": "--device",
    "dtype": "--dtype",
}
RECOVER_FLAGS = {
    **{
        f"recover.{key}": f"--{key.replace('_', '-')}"
        for key in (
            *("data", "method", "steps", "batch", "seq_len", "learning_rate", "rank", "masks"),
        )
    },
    **{key: f"--{key}" for key in ("seed", "device", "dtype", "revision")},
}
HEEDED = {"method", "sparsities", "min_keep", "propagate"}  # an effort leaves out what they decide


def command_text(wish: Mapping[str, Any]) -> str:
    """Return the command line of a recipe of one step, given as plain data.

    Keys at their defaults are left out.

    >>> command_text({"model": "demo", "steps": [{"prune": {"sparsity": 0.5}}, {"evaluate": {}}]})
    'llmprune --model demo --sparsity 0.5'
    >>> command_text({"model": "x", "steps": [{"recover": {"steps": 9}}, {"evaluate": {}}]})
    'llmprune recover x --steps 9'
    """
    trains = any("recover" in step for step in wish["steps"])
    flags = RECOVER_FLAGS if trains else FLAGS
    asked = dict(_keys(wish))
    usual = dict(_keys(_plain_recovery(wish))) if trains else _defaults(wish)
    words = ["llmprune", *(["recover", str(asked["model"])] if trains else [])]
    for key, flag in flags.items():
        if _is_flag(flags, key, asked.get(key)) and (key not in usual or asked[key] != usual[key]):
            words += [flag, str(asked[key])]
    for name, value in (asked.get("prune.target") or {}).items():
        words += ["--target", f"{name}={value}"]
    if not any("evaluate" in step for step in wish["steps"]):
        words.append("--no-eval")
    if asked.get("trust_remote_code"):
        words.append("--trust-remote-code")
    said = {"trust_remote_code", "prune.target"} | ({"model"} if trains else set())
    for key, value in asked.items():
        known = _is_flag(flags, key, value) or key in said
        if not known and (key not in usual or value != usual[key]):
            words += ["--set", f"{key}={json.dumps(_short(key, value))}"]
    return " ".join(shlex.quote(word) for word in words)


def recipe_text(wish: Mapping[str, Any]) -> str:
    """Return a recipe given as plain data in YAML; keys at their defaults are left out.

    >>> print(recipe_text({"model": "demo", "seed": 0, "steps": [{"prune": {"sparsity": 0.5}}]}))
    model: demo
    steps:
    - prune:
        sparsity: 0.5
    """
    recipe = build(wish)
    short = {"model": recipe.model} | _given(recipe)
    return dump(short if build(short) == recipe else recipe.to_dict()).rstrip()


def wish_of(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe of a run as plain data: of all steps, where it was the last of several."""
    wish, chain, begun = dict(run.get("wish", run["recipe"])), run.get("chain"), beginning_of(run)
    if chain:
        wish |= {"model": chain["model"], "steps": chain["steps"]}
    return wish | {"revision": begun.revision}


def making_text(wishes: Sequence[Mapping[str, Any]]) -> str:
    """Return in Markdown what makes a result, from the recipes that came one after the other.

    Each but the last writes the folder that the next one names as its model.
    """
    outs = [f" --out {shlex.quote(str(wish['model']))}" for wish in wishes[1:]]
    lines, parts = [], []
    for place, (wish, out) in enumerate(zip(wishes, [*outs, ""], strict=True)):
        if num_stages(wish) == 1:
            lines.append(command_text(wish) + out)
            continue
        name = "recipe.yaml" if len(wishes) == 1 else f"recipe-{place + 1}.yaml"
        parts.append(f"`{name}`:\n\n```yaml\n{recipe_text(wish)}\n```")
        lines.append(f"llmprune --recipe {name}{out}")
    return "\n\n".join([*parts, "```bash\n" + "\n".join(lines) + "\n```"])


def num_stages(wish: Mapping[str, Any]) -> int:
    """Return how many models a recipe given as plain data makes one after the other."""
    return sum("evaluate" not in step for step in wish["steps"])


def _given(part: Recipe | PruneStep) -> dict[str, Any]:
    """Return what is not at its default."""
    return part.model_dump(mode="json", exclude_defaults=True)


def _plain_recovery(wish: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe of a recovery that is asked for nothing."""
    steps: list[dict[str, Any]] = [{"recover": {}}, {"evaluate": {}}]
    return build({"model": str(wish["model"]), "steps": steps}).to_dict()


def _short(key: str, value: Any) -> Any:
    """Return a value as it has to be typed: of a wish to prune within a recovery what is given."""
    if key != "recover.prune":
        return value
    step = PruneStep(**value)
    short = _given(step)
    return short if PruneStep(**short) == step else value


def _defaults(wish: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that a run has without being asked for them; an effort sets many."""
    step = next(step["prune"] for step in wish["steps"] if "prune" in step)
    fixed = re.fullmatch(r"\d+:\d+", step.get("pattern", ""))  # its sparsity follows from it
    steps = default_steps()
    given = ("pattern", "effort") if fixed else ("pattern", "effort", "target", "sparsity")
    steps[0]["prune"] = {key: step[key] for key in given if step.get(key) is not None}
    usual = dict(_keys(build({"model": "demo", "steps": steps}).to_dict()))
    if step.get("effort"):
        own = {key: step[key] for key in HEEDED & step.keys() if step[key] != usual[f"prune.{key}"]}
        steps[0]["prune"] |= own
        found = dict(_keys(build({"model": "demo", "steps": steps}).to_dict()))
        usual |= {key: found[key] for key in found if key.removeprefix("prune.") not in HEEDED}
    usual |= {"prune.pattern": "unstructured", "prune.effort": None, "prune.target": None}
    for key in ("model",) if fixed else ("model", "prune.sparsity"):
        del usual[key]
    return usual


def _keys(wish: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the key paths of a recipe as `--set` takes them, with their values."""
    for key, value in wish.items():
        if key == "steps":
            for step in value:
                yield from _keys(step)
        elif isinstance(value, Mapping):
            yield from ((f"{key}.{inner}", content) for inner, content in value.items())
        else:
            yield key, value


def _is_flag(flags: Mapping[str, str], key: str, value: Any) -> bool:
    """Tell whether a flag can say this; a mix of texts, for one, needs `--set`."""
    return key in flags and isinstance(value, str | int | float)
