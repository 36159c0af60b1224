"""Prune a miniature of every causal-LM type of the installed transformers, and say what came of it.

Each is saved, pruned with Wanda at 0.5 from disk, and proven by the gate: a fresh process loads it
with `from_pretrained` and its logits agree. `python eval/families/sweep.py` prints a line per type;
`--write docs/FAMILIES.md` writes the table; types as arguments restrict it to these.
"""

from __future__ import annotations

import argparse
import re
import signal
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

LIMIT = 120  # seconds for one type
GIVEN: dict[str, dict[str, Any]] = {  # keys without which the default config makes no model
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "reformer": {"is_decoder": True},
}  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What came of one type: `pruned`, `refused` (by the tool) or `no miniature`."""

    model_type: str
    outcome: str
    reason: str
    known: bool = False
    linears: str = ""
    left: str = ""


def sweep_type(model_type: str) -> Outcome:
    """Prune a miniature of one type."""
    import torch
    from transformers import AutoConfig
    from transformers.utils import logging

    from llmprune.arch.miniature import miniature_model
    from llmprune.arch.table import row_of
    from llmprune.base.errors import LlmpruneError

    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(LIMIT)
    known = row_of(model_type) is not None
    try:
        try:
            model = miniature_model(AutoConfig.for_model(model_type, **GIVEN.get(model_type, {})))
        except Exception as error:
            return Outcome(model_type, "no miniature", _first(error), known)
        with tempfile.TemporaryDirectory() as home:
            return _prune(model, model_type, Path(home), known)
    except LlmpruneError as error:
        return Outcome(model_type, "refused", _first(error), known)
    except Exception as error:
        return Outcome(model_type, "failed", f"{type(error).__name__}: {_first(error)}", known)
    finally:
        signal.alarm(0)


def _prune(model: Any, model_type: str, home: Path, known: bool) -> Outcome:
    """Save a model, prune it from disk into a proven folder, and say what was pruned."""
    import torch

    from llmprune.api import make_recipe
    from llmprune.arch.anatomy import left_out
    from llmprune.base.progress import Progress
    from llmprune.engine.opening import open_plan
    from llmprune.steps import run_streamed

    source = home / "source"
    with torch.no_grad():
        for value in model.parameters():
            if value.dim() > 1:
                value.mul_(5)  # the default spread of 0.02 leaves blocks almost without effect
    model.save_pretrained(source)
    recipe = make_recipe(
        str(source), sparsity=0.5, out=str(home / "out"), seq_len=24, num_samples=4, device="cpu",
        settings=["evaluate.perplexity=false"],
    )  # fmt: skip
    opened = open_plan(recipe)
    vocab = model.config.get_text_config(decoder=True).vocab_size
    tokens = torch.randint(3, vocab, (4, 24), generator=torch.Generator().manual_seed(0))
    report = run_streamed(opened, Progress("quiet"), tokens=tokens)
    assert report.sparsity == opened.plan.sparsity and abs(report.sparsity - 0.5) < 0.01
    family, left = opened.blocks.family, set()
    for index in range(len(opened.blocks)):
        anatomy, shapes = opened.blocks.anatomy(index), opened.blocks.skeleton.shapes(index)
        rest = left_out(anatomy, shapes)
        left |= {name for name in rest if not rest[name].startswith("norm")}
    taps = "; ".join(_together(tap.readers) for tap in family.taps)
    return Outcome(model_type, "pruned", "", known, taps, ", ".join(sorted(left)))


def _together(names: tuple[str, ...]) -> str:
    """Return the linears of a tap with what their names begin with written once."""
    owner = names[0].rpartition(".")[0]
    if len(names) < 2 or any(name.rpartition(".")[0] != owner for name in names):
        return " + ".join(names)
    return f"{owner}.({' + '.join(name.rpartition('.')[2] for name in names)})"


def _too_long(number: int, frame: object) -> None:
    raise TimeoutError(f"not done after {LIMIT} s")


def _first(error: BaseException) -> str:
    """Return the first line of an error, short enough for a table."""
    from llmprune.base.errors import first_line

    text = first_line(error)
    return re.sub(r"\S*/(source|out\.partial)\b", "it", text)[:300]


def all_types() -> list[str]:
    """Return the causal-LM types of the installed transformers."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def page(found: list[Outcome]) -> str:
    """Return docs/FAMILIES.md."""
    import torch
    import transformers

    pruned = [row for row in found if row.outcome == "pruned"]
    others = [row for row in found if row.outcome != "pruned"]
    lines = [
        HEAD.format(
            types=len(found),
            pruned=len(pruned),
            others=len(others),
            built=sum(row.outcome != "no miniature" for row in found),
            transformers=transformers.__version__,
            torch=torch.__version__.partition("+")[0],
        ),
        "| type | known by | linears, those of one tap together | not eligible beside norms |",
        "|---|---|---|---|",
    ]
    for row in pruned:
        known = "table" if row.known else "probe"
        lines.append(f"| `{row.model_type}` | {known} | {row.linears} | {row.left} |")
    lines += ["", "## Not pruned", "", "| type | outcome | reason |", "|---|---|---|"]
    for row in others:
        reason = row.reason.replace("|", "\\|")
        lines.append(f"| `{row.model_type}` | {row.outcome} | {reason} |")
    return "\n".join(lines) + "\n"


HEAD = """\
# Families

Made by `python eval/families/sweep.py --write docs/FAMILIES.md` with transformers {transformers}
and torch {torch}. It takes every model type that `AutoModelForCausalLM` knows ({types}), builds a
random miniature from the type's default config where that is possible ({built}), prunes it from
disk with Wanda at 0.5, and has a fresh process load the result with `from_pretrained` and compare
logits.

**{pruned} types were pruned and proven; {others} were not**, for the reasons below. A miniature
says nothing about how good a pruned model is.

*Known by table*: the family has a row in `llmprune/arch/table.py`, which a test compares with what
the probe finds. *Known by probe*: it has none; its blocks and taps are found when a model is
opened, by running a miniature of its config. `llmprune inspect MODEL` prints them for a model.
Types that are encoders by origin (BERT and its kin) see both sides of a token unless their config
says `is_decoder`.

What is pruned: linears inside the blocks. `{{expert}}` stands for each expert's own. A weight is
*not eligible* where it is a router, a convolution, or no matrix whose product with an activation is
watched (`einsum` is not).

"""


def main() -> None:
    """Sweep, print, and write the page if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*", help="model types; all when absent")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--write", type=Path, help="the Markdown page to write")
    given = parser.parse_args()
    start = time.time()
    found = []
    with ProcessPoolExecutor(given.jobs, mp_context=get_context("spawn")) as pool:
        for outcome in pool.map(sweep_type, given.types or all_types()):
            print(f"{outcome.model_type:28} {outcome.outcome:13} {outcome.reason}", flush=True)
            found.append(outcome)
    kinds = dict.fromkeys(row.outcome for row in found)
    counts = ", ".join(f"{sum(row.outcome == kind for row in found)} {kind}" for kind in kinds)
    print(f"{len(found)} types: {counts}; {time.time() - start:.0f} s")
    if given.write:
        given.write.write_text(page(found), encoding="utf-8")


if __name__ == "__main__":
    main()
