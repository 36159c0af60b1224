"""Runs alone in a fresh process: load a folder as any user would, and write its logits.

Nothing of llmprune is imported, so what is proven does not depend on it. With `on_disk` weights
stay on disk until a module needs them, so a model larger than memory loads as well. Experts are
multiplied as transformers does by default, or with `eager` one at a time.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

PROMPT, NEW = 16, 8
SAME = "the same with a cache as without"


def main(job_file: str) -> None:
    """Load, run the given tokens, write `stock.safetensors` and `loaded.json` beside the job."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    scratch = Path(job["scratch"])
    placed: dict[str, Any] = {}
    if job["on_disk"]:
        placed = {"device_map": {"": "disk"}, "offload_folder": str(scratch / "offload")}
    if job.get("eager"):
        placed["experts_implementation"] = "eager"
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        job["folder"],
        dtype=getattr(torch, job["dtype"]),
        **placed,
        output_loading_info=True,
        trust_remote_code=job["trust_remote_code"],
    )
    model, info = loaded
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor(job["tokens"]), use_cache=False).logits
    save_file({"logits": logits.cpu().contiguous()}, str(scratch / "stock.safetensors"))
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    found = {kind: sorted(str(key) for key in info.get(kind, ())) for kind in kinds}
    beside: dict[str, Any] = {"experts": getattr(model.config, "_experts_implementation", None)}
    even = job["dtype"] == "float32" or not beside["experts"]  # else rounding changes experts
    if job.get("generate") and even and not job["on_disk"]:
        beside["generation"] = generation(model, job["tokens"])
    if job.get("own_code"):
        beside["ran_unasked"] = runs_unasked(job["folder"])
    (scratch / "loaded.json").write_text(json.dumps(found | beside), encoding="utf-8")


def generation(model: Any, tokens: list[list[int]]) -> str:
    """Say whether greedy generation is the same with a cache as without."""
    import torch

    ids = torch.tensor(tokens)[:, :PROMPT]
    options = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW, "num_beams": 1}
    told = torch.ones_like(ids)
    with torch.no_grad():
        cached, plain = (
            model.generate(ids, attention_mask=told, use_cache=cached, **options)
            for cached in (True, False)
        )
    if torch.equal(cached, plain):
        return SAME
    apart = (cached != plain).any(dim=0).nonzero()
    return f"they part at token {int(apart[0]) - PROMPT + 1} of {NEW}"


def runs_unasked(folder: str) -> bool:
    """Tell whether a folder that brings code loads where that is not allowed to run."""
    from transformers import AutoModelForCausalLM

    try:
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    except Exception:
        return False
    return True


if __name__ == "__main__":
    main(sys.argv[1])
