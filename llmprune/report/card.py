"""The model card of a result: front matter for the Hub, and what a reader wants to know."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmprune.catalog import METHODS
from llmprune.report.coverage import coverage_line
from llmprune.report.evaluations import Measured, measured, metric_results
from llmprune.report.kinds import by_kind
from llmprune.report.origin import Origin, kept_facts, origin_of
from llmprune.report.reproduction import command_text
from llmprune.report.stages import (
    accepted_line,
    fallback_line,
    repair_line,
    stages_line,
    target_line,
    verdict_line,
)


def card_text(
    folder: Path,
    data: Mapping[str, Any],
    run: Mapping[str, Any],
    later: Mapping[str, Any],
    *,
    repo: str,
    base_model: str | None = None,
) -> str:
    """Return README.md for a result as it will lie in a repository of the Hub.

    `data` is report.json, `run` run.json and `later` evaluations.json, all without paths of this
    machine; the folder gives what the base model's own card says.
    """
    origin = origin_of(run, base_model=base_model)
    results = measured(data, later)
    parts = [
        f"# {repo.rpartition('/')[2]}",
        _summary(data, origin),
        _section("How to load", _loading(data, repo)),
        _section("What was removed", _removed(data)),
        _section("What became of the rest", _rest(data)),
        _section("Quality", _quality(data, results)),
        _section("What it is not", _limits(data)),
        _section("How it was made", _making(data, run, origin)),
        _section("Proof", _proof(data)),
        _section("Masks", _masks(data, repo)),
    ]
    body = "\n\n".join(part for part in parts if part)
    return f"---\n{_front_matter(folder, data, origin, results, repo)}\n---\n\n{body}\n"


def _front_matter(
    folder: Path, data: Mapping[str, Any], origin: Origin, results: Sequence[Measured], repo: str
) -> str:
    """Return the metadata as YAML; of the relations that the Hub knows, `finetune` fits best."""
    from huggingface_hub import ModelCardData

    shape = "sparse" if data["form"] == "masked" else "pruned-structured"
    facts: dict[str, Any] = {}
    if origin.hub_id:
        facts = {"base_model": origin.hub_id, "base_model_relation": "finetune"}
    if results:
        facts |= {"model_name": repo.rpartition("/")[2], "eval_results": metric_results(results)}
    card = ModelCardData(
        **facts,
        **kept_facts(folder, origin),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["llmprune", "pruned", shape, data["method"], _step(data)["pattern"]],
    )
    return str(card.to_yaml()).strip()


def _summary(data: Mapping[str, Any], origin: Origin) -> str:
    method = METHODS.get(data["method"])
    title = f"{method.title} ({_linked(method.paper)})" if method else code(data["method"])
    before, after = data["parameters_before"], data["parameters_after"]
    if data["form"] == "masked":
        what = f"are exact zeros ({data['sparsity_of_all']:.1%} of all {before:,} parameters)"
    else:
        what = f"were cut out: {after:,} of {before:,} parameters are left"
    tokens = _step(data)["pattern"] == "vocabulary"
    eligible = "the rows of tokens" if tokens else "the linears inside the decoder blocks"
    unnamed = "" if origin.hub_id or origin.bundled else " The base model was a local folder."
    earlier = " The model had been pruned before; the numbers are of both." * origin.pruned_before
    return (
        f"{origin.markdown}, pruned after training with llmprune {data['llmprune']} by {title}, "
        f"pattern {code(_step(data)['pattern'])}. **{data['sparsity']:.4g}** of the eligible "
        f"weights ({eligible}) {what}.{unnamed}{earlier}"
    )


def _loading(data: Mapping[str, Any], repo: str) -> str:
    shape = "" if data["form"] == "masked" else " The config has the smaller sizes."
    remote = "    # the model brings Python code: pass trust_remote_code=True to both\n"
    return (
        "As any model of `transformers`; llmprune is not needed." + shape + "\n\n"
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        + (remote.lstrip() if _trusts(data) else "")
        + f'model = AutoModelForCausalLM.from_pretrained("{repo}", dtype="auto")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{repo}")\n'
        "```"
    )


def _removed(data: Mapping[str, Any]) -> str:
    rows = [
        (code(k.name), k.where, f"{k.weights:,}", f"{k.removed:,}", f"{k.sparsity:.4f}")
        for k in by_kind(data)
    ]
    text = markdown_table(("kind", "blocks", "weights", "removed", "sparsity"), rows)
    left = [row for row in data["skipped"] if row["num_params"]]
    if left:
        names = (f"{code(r['what'])} ({r['num_params']:,}; {r['reason']})" for r in left)
        text += "\n\nNot pruned: " + ", ".join(names) + "."
    return text


def _rest(data: Mapping[str, Any]) -> str:
    """Return what else than cutting was done, and what it gained; empty where nothing was."""
    done = []
    if data.get("target"):
        done.append(f"The sparsity was looked for: {target_line(data)}.")
    if data.get("allocation", "uniform") != "uniform":
        verdict = verdict_line(data)
        done.append(f"Allocation {code(data['allocation'])}{verdict and f': {verdict}'}.")
    if data.get("permute"):
        done.append(
            "FFN channels were put into another order, in which N:M keeps more; what the model "
            "computes does not depend on it."
        )
    if data.get("refine"):
        done.append(f"Masks were refined by {code(data['refine'])}.")
    if data.get("solver", "zero") != "zero":
        kept = accepted_line(data)
        done.append(
            f"Weights that stay were updated by {code(data['solver'])}{kept and f': {kept}'}."
        )
    if stages := stages_line(data):
        done.append(f"After each stage: {stages}.")
    if data.get("repair"):
        done.append(f"Blocks were trained one at a time by {repair_line(data) or data['repair']}.")
    if fallbacks := fallback_line(data):
        done.append(f"Cut by a simpler rule: {fallbacks}.")
    return "\n".join(f"- {line}" for line in done)


def _quality(data: Mapping[str, Any], results: Sequence[Measured]) -> str:
    if not results:
        return "Not measured."
    rows = [
        (r.what, r.protocol, _number(r.dense, r.dense_stderr), _number(r.value, r.stderr))
        for r in results
    ]
    text = markdown_table(("measured", "how", "dense", "pruned"), rows)
    if leak := (data.get("calibration") or {}).get("leak"):
        text += f"\n\n{leak:.1%} of the text that perplexity was measured on was calibrated on."
    return text


def _limits(data: Mapping[str, Any]) -> str:
    if data["form"] == "masked":
        speed = (
            "It is not smaller on disk or in memory and not faster than the base model: the zeros "
            "are stored, and dense kernels multiply by them. They are for kernels, formats and "
            "research that use them."
        )
    else:
        speed = "No speed was measured; its tensors are smaller, so it needs less work and memory."
    trained = (
        "Its blocks were trained one at a time on calibration text; as a whole it was not trained "
        "after pruning."
        if data.get("repair")
        else "It was not trained after pruning."
    )
    return (
        f"{speed} {trained} Limits, biases and terms of use of the base model hold for it as well."
    )


def _making(data: Mapping[str, Any], run: Mapping[str, Any], origin: Origin) -> str:
    wish = dict(run.get("wish", run["recipe"]))
    source = run["source"]
    local = source.get("revision") is None and source["name"] != "demo"
    if not local:
        wish["revision"] = source.get("revision")
    elif origin.hub_id and not origin.pruned_before:
        wish["model"], local = origin.hub_id, False
    text = [
        "```bash\n" + command_text(wish) + "\n```",
        f"The whole recipe is in `llmprune/run.json`. {_calibration(data)}",
    ]
    if local:
        text.append(
            f"{code(wish['model'])} stands for the folder that the base model was read from."
        )
    versions = {"llmprune": data["llmprune"], **run.get("versions", {})}
    text.append(
        f"Computed in {run.get('dtype', 'its own dtype')} on {run.get('processor', 'a processor')} "
        "with " + ", ".join(f"{name} {version}" for name, version in versions.items()) + "."
    )
    if data["warnings"]:
        text.append("Warnings of the run:\n\n" + "\n".join(f"- {w}" for w in data["warnings"]))
    return "\n\n".join(text)


def _calibration(data: Mapping[str, Any]) -> str:
    """Return what the statistics were learnt from; texts in files are not part of the result."""
    record = data.get("calibration")
    if not record:
        return "No calibration text was used."
    text = f"Calibrated on {record['num_windows']} windows of {record['seq_len']} tokens"
    if len(record["texts"]) == 1:
        text += f" of {code(record['texts'][0]['data'])}"
    elif record["texts"]:
        names = (f"{one['num_windows']} of {code(one['data'])}" for one in record["texts"])
        text += f": {', '.join(names)}"
    else:
        text += f" that were given in Python ({record['data']}), which the command does not know"
    if any("repo" not in one and one["data"] != "demo" for one in record["texts"]):
        text += "; files are not part of this repository"
    experts = coverage_line(data)
    return f"{text}. Experts: {experts}." if experts else f"{text}."


def _proof(data: Mapping[str, Any]) -> str:
    gate = data["gate"]
    agreement = gate["agreement"]
    same = (
        f", and the {gate['untouched_equal']} tensors that no mask touches are the base model's, "
        "bit for bit"
        if gate.get("untouched_equal") is not None
        else ""
    )
    return (
        "Before this result got its name, a fresh process that knows only `transformers` loaded "
        f"it: all {gate['num_tensors']} tensors found, none missing or left over{same}. Its logits "
        f"({gate['dtype']}) are within {agreement['relative']:.1e} of the largest of what llmprune "
        "computed block by block."
    )


def _masks(data: Mapping[str, Any], repo: str) -> str:
    if data["form"] != "masked":
        return (
            "`llmprune/masks-*.safetensors` hold, by site, the indices of the units that stayed, "
            "in the numbering of the base model."
        )
    return (
        "One bit per weight, True = kept, by linear; they say what was removed without looking for "
        "zeros.\n\n"
        "```python\n"
        "import json, math\n"
        "from pathlib import Path\n\n"
        "import numpy as np\n"
        "from huggingface_hub import hf_hub_download\n"
        "from safetensors.numpy import load_file\n\n"
        f'repo = "{repo}"\n'
        'index = json.loads(Path(hf_hub_download(repo, "llmprune/masks.json")).read_text())\n'
        'name, entry = next(iter(index["masks"].items()))\n'
        'packed = load_file(hf_hub_download(repo, "llmprune/" + entry["file"]))[name]\n'
        'bits = np.unpackbits(packed, count=math.prod(entry["shape"]))\n'
        'keep = bits.reshape(entry["shape"]).astype(bool)\n'
        "```"
    )


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of GitHub's Markdown; bars in cells are escaped.

    >>> print(markdown_table(("a", "b"), [("x|y", "1")]))
    | a | b |
    |---|---|
    | x\\|y | 1 |
    """
    lines = [list(head), *(list(row) for row in rows)]
    text = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
    return "\n".join([text[0], "|" + "---|" * len(head), *text[1:]])


def code(text: str) -> str:
    """Return text set as code, cut to one line."""
    return "`" + " ".join(text.replace("`", "'").split()) + "`"


def _section(title: str, content: str) -> str:
    return f"## {title}\n\n{content}" if content else ""


def _step(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the step of the recorded recipe that pruned."""
    steps = data["run"]["recipe"]["steps"]
    return dict(next(step["prune"] for step in steps if "prune" in step))


def _trusts(data: Mapping[str, Any]) -> bool:
    return bool(data["run"].get("wish", {}).get("trust_remote_code"))


def _number(value: float | None, stderr: float | None) -> str:
    """Return a value with its standard error, as far as there are."""
    if value is None:
        return ""
    text = f"{value:.4f}" if abs(value) < 1 else f"{value:,.3f}"
    return text if stderr is None else f"{text} ± {stderr:.4f}"


def _linked(paper: str) -> str:
    """Return a reference whose arXiv number leads there."""
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", paper)
