"""The model card of a result: front matter for the Hub, and what a reader wants to know."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmprune.catalog import METHODS
from llmprune.delivery.heterogeneous import is_own_code
from llmprune.report.evaluations import Measured, measured, metric_results
from llmprune.report.kinds import by_kind
from llmprune.report.licences import terms_of
from llmprune.report.making import code, how_made
from llmprune.report.origin import Origin, kept_facts, origin_of
from llmprune.report.recoveries import (
    cut_method,
    cut_while_trained,
    is_pruned,
    last_wish,
    sides,
    texts_of,
)
from llmprune.report.stages import (
    accepted_line,
    fallback_line,
    repair_line,
    stages_line,
    target_line,
    verdict_line,
)
from llmprune.report.training import (
    limits_of_training,
    linked,
    removal_kept,
    training_list,
    training_sentence,
    training_words,
)

OWN = "llmprune"


def card_text(
    folder: Path,
    data: Mapping[str, Any],
    runs: Sequence[Mapping[str, Any]],
    later: Mapping[str, Any],
    *,
    repo: str,
    base_model: str | None = None,
    beside: Collection[str] = (),
) -> str:
    """Return README.md for a result as it will lie in a repository of the Hub.

    `data` is report.json, `later` evaluations.json, and `runs` the run.json of the result after
    those of the results that it came from, all without paths of this machine; the folder gives what
    the base model's own card says. `beside` names further files that go there: a picture and pages
    are shown and linked.
    """
    origin = origin_of(runs[-1], base_model=base_model)
    results = measured(data, later)
    terms = terms_of(kept_facts(folder, origin))
    parts = [
        f"# {repo.rpartition('/')[2]}",
        f"**{terms.shown}.** {terms.notice}" if terms else "",
        _summary(data, origin),
        _section("How to load", _loading(data, folder, repo)),
        _section("What was removed", _removed(data)),
        _section("What became of the rest", _rest(data)),
        _section("Training", training_list(data)),
        _section("Quality", _quality(data, results)),
        _section("Pictures", _pictures(data, beside)),
        _section("What it is not", _limits(data)),
        _section("How it was made", how_made(data, runs, origin)),
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
        tags=list(filter(None, ("llmprune", *_tags(data)))),
    )
    return str(card.to_yaml()).strip()


def _tags(data: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a result is, as one may search for it."""
    if is_pruned(data):
        yield "pruned"
        yield "pruned-structured" if data["form"] == "shrunk" else "sparse"
        yield from (cut_method(data), data["pattern"])
    if records := data.get("recovery"):
        yield from ("recovered", records[-1]["method"])


def _summary(data: Mapping[str, Any], origin: Origin) -> str:
    unnamed = "" if origin.hub_id or origin.bundled else " The base model was a local folder."
    if not is_pruned(data):
        return (
            f"{origin.markdown}, trained with llmprune {data['llmprune']}: {training_words(data)}."
            f"{unnamed}{removal_kept(data)}"
        )
    method = METHODS.get(cut_method(data))
    title = f"{method.title} ({linked(method.paper)})" if method else code(cut_method(data))
    before, after = data["parameters_before"], data["parameters_after"]
    if data["form"] == "masked":
        what = f"are exact zeros ({data['sparsity_of_all']:.1%} of all {before:,} parameters)"
    else:
        what = f"were cut out: {after:,} of {before:,} parameters are left"
    tokens = data["pattern"] == "vocabulary"
    eligible = "the rows of tokens" if tokens else "the linears inside the decoder blocks"
    cut_last = last_wish(data) is None or cut_while_trained(data) is not None
    again = origin.pruned_before and cut_last
    earlier = " The model had been pruned before; the numbers are of both." * again
    when = "while it was trained," if cut_while_trained(data) is not None else "after training"
    return (
        f"{origin.markdown}, pruned {when} with llmprune {data['llmprune']} by {title}, "
        f"pattern {code(data['pattern'])}. **{data['sparsity']:.4g}** of the eligible "
        f"weights ({eligible}) {what}.{unnamed}{earlier}{training_sentence(data)}"
        + removal_kept(data)
    )


def _loading(data: Mapping[str, Any], folder: Path, repo: str) -> str:
    """Return how the result is loaded; code of ours beside it needs trust, and says why."""
    own, tier = is_own_code(folder), data.get("tier", "E0")
    shape = " The config has the smaller sizes." if data["form"] == "shrunk" else ""
    if own:
        shape = (
            f" Its blocks have sizes of their own (tier {tier}), which no class of `transformers` "
            "has: the code that builds them lies beside the weights. It is short and imports "
            "`transformers` alone; read it before you trust it."
        )
    flag = ", trust_remote_code=True" if own else ""
    remote = "# the model brings Python code: pass trust_remote_code=True to both\n"
    return (
        "As any model of `transformers`; llmprune is not needed." + shape + "\n\n"
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        + (remote if _trusts(data) and not own else "")
        + f'model = AutoModelForCausalLM.from_pretrained("{repo}", dtype="auto"{flag})\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{repo}")\n'
        "```\n\n"
        f'With llmprune, `llmprune.load("{repo}")`.'
    )


def _pictures(data: Mapping[str, Any], beside: Collection[str]) -> str:
    """Return the picture of the run, and where the pages with the others are."""
    text = []
    if f"{OWN}/report.png" in beside:
        what = "Sparsity and output error by block" if is_pruned(data) else "Losses of the training"
        text.append(f"![{what}]({OWN}/report.png)")
    if f"{OWN}/report.html" in beside:
        text.append(
            f"[report.html]({OWN}/report.html) has more of them: download it and open it in a "
            "browser."
        )
    if f"{OWN}/analysis/analysis.html" in beside:
        text.append(
            f"[analysis.html]({OWN}/analysis/analysis.html) says what became of the weights, the "
            "hidden states and the predictions; its tables lie beside it as CSV."
        )
    return "\n\n".join(text)


def _removed(data: Mapping[str, Any]) -> str:
    rows = [
        (code(k.name), k.where, f"{k.weights:,}", f"{k.removed:,}", f"{k.sparsity:.4f}")
        for k in by_kind(data)
    ]
    if not rows:
        return ""
    text = markdown_table(("kind", "blocks", "weights", "removed", "sparsity"), rows)
    left = [row for row in data["skipped"] if row["num_params"]]
    if left:
        names = (f"{code(r['what'])} ({r['num_params']:,}; {r['reason']})" for r in left)
        text += "\n\nNot pruned: " + ", ".join(names) + "."
    return text


def _rest(data: Mapping[str, Any]) -> str:
    """Return what else the cut did, and what that gained; empty where it did nothing."""
    if not is_pruned(data) or cut_while_trained(data) is not None:
        return ""
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
    labels = [side.label for side in sides(data) if side.label != "dense"]
    is_there = any(r.before is not None for r in results)
    before = [labels[0]] if is_there else []
    rows = [
        (
            *(r.what, r.protocol, _number(r.dense, r.dense_stderr)),
            *(_number(r.before, None) for _ in before),
            _number(r.value, r.stderr),
        )
        for r in results
    ]
    head = ("measured", "how", "dense", *before, labels[-1] if labels else _result(data))
    text = markdown_table(head, rows)
    for use, record in texts_of(data):
        if leak := record.get("leak"):
            learnt = "calibrated" if use == "calibration" else "trained"
            text += f"\n\n{leak:.1%} of the text that perplexity was measured on was {learnt} on."
    return text


def _result(data: Mapping[str, Any]) -> str:
    """Return what the result is called beside the dense model."""
    return "recovered" if data.get("recovery") else "pruned"


def _limits(data: Mapping[str, Any]) -> str:
    if data["form"] == "shrunk":
        speed = "No speed was measured; its tensors are smaller, so it needs less work and memory."
    elif is_pruned(data) or removal_kept(data):
        speed = (
            "It is not smaller on disk or in memory and not faster than the base model: the zeros "
            "are stored, and dense kernels multiply by them. They are for kernels, formats and "
            "research that use them."
        )
    else:
        speed = "It has the size and the speed of the base model."
    untrained = (
        "Its blocks were trained one at a time on calibration text; as a whole it was not trained "
        "after pruning."
        if data.get("repair")
        else "It was not trained after pruning."
    )
    trained = limits_of_training(data) or untrained
    return (
        f"{speed} {trained} Limits, biases and terms of use of the base model hold for it as well."
    )


def _proof(data: Mapping[str, Any]) -> str:
    gate = data["gate"]
    agreement = gate["agreement"]
    same = _untouched(data, gate.get("untouched_equal"))
    return (
        "Before this result got its name, a fresh process that knows only `transformers` loaded "
        f"it: all {gate['num_tensors']} tensors found, none missing or left over{same}. Its logits "
        f"({gate['dtype']}) are within {agreement['relative']:.1e} of the largest of what llmprune "
        "computed block by block."
    )


def _untouched(data: Mapping[str, Any], count: int | None) -> str:
    """Return how many tensors are those of the model before, and which should be."""
    if count is None:
        return ""
    if last_wish(data) is None:
        return f", and the {count} tensors that no mask touches are the base model's, bit for bit"
    if count == 1:
        return ", and the one tensor that training left alone is as it was, bit for bit"
    return f", and the {count} tensors that training left alone are as they were, bit for bit"


def _masks(data: Mapping[str, Any], repo: str) -> str:
    if not is_pruned(data):
        return ""
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


def _section(title: str, content: str) -> str:
    return f"## {title}\n\n{content}" if content else ""


def _trusts(data: Mapping[str, Any]) -> bool:
    return bool(data["run"].get("wish", {}).get("trust_remote_code"))


def _number(value: float | None, stderr: float | None) -> str:
    """Return a value with its standard error, as far as there are."""
    if value is None:
        return ""
    text = f"{value:.4f}" if abs(value) < 1 else f"{value:,.3f}"
    return text if stderr is None else f"{text} ± {stderr:.4f}"
