"""Runs alone in a fresh process: load a folder as any user would, and write its logits.

Nothing of llmprune is imported, so what is proven does not depend on it. With `on_disk` weights
stay on disk until a module needs them, so a model larger than memory loads as well.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


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
    (scratch / "loaded.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
