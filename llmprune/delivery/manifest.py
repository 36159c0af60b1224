"""What a result with other shapes than its source is made of: `llmprune_manifest.json`.

Block by block it says which block of the source it was, which units of it were kept (their indices
lie in `llmprune/masks-*.safetensors`, in the source's numbering) and what it lacks; and what sizes
the model had and has. From it a result can be pruned again, or an adapter for the source be cut.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from llmprune.arch.layout import Layout

MANIFEST = "llmprune_manifest.json"
CONSUMERS = {
    "E0": {
        "transformers": "loads as it is",
        "vllm": "a stock architecture of other sizes; not run here",
        "llama.cpp": "llmprune export --to gguf, for the families it knows",
        "peft": "loads as it is",
    },
    "E1": {
        "transformers": "loads as it is",
        "vllm": "a stock architecture; not run here",
        "llama.cpp": "llmprune export --to gguf, for the families it knows",
        "peft": "loads as it is",
    },
    "E2": {
        "transformers": "with trust_remote_code=True",
        "vllm": "DeciLMForCausalLM with trust_remote_code; its code was read, not run",
        "llama.cpp": "its converter for DeciLM; its code was read, not run",
        "peft": "with trust_remote_code=True and a rank for every width",
    },
    "E3": {
        "transformers": "with trust_remote_code=True",
        "vllm": "no: blocks differ in ways that its classes do not know",
        "llama.cpp": "no",
        "peft": "with trust_remote_code=True",
    },
}


def manifest_of(
    *,
    layout: Layout,
    tier: str,
    reasons: Sequence[tuple[str, str]],
    source: Mapping[str, Any],
    config: Mapping[str, Any],
    method: Mapping[str, Any],
    kept: Sequence[Mapping[str, int]],
    sizes: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the manifest of a result.

    `source` identifies the checkpoint and `config` is its config.json; `method` says what was done,
    with seed and calibration; `kept` are, for every block of the result, the units kept by kind;
    `sizes` are numbers of the dense and of the new model.
    """
    canonical = json.dumps(dict(config), sort_keys=True, separators=(",", ":"))
    return {
        "format": 1,
        "base": dict(source),
        "base_config_sha256": hashlib.sha256(canonical.encode()).hexdigest(),
        "method": dict(method),
        "tier": tier,
        "lower_tiers": {name: why for name, why in reasons},
        "loads": CONSUMERS[tier],
        "blocks": [
            {
                "block": place,
                "source_block": block.source,
                "kept_units": dict(kept[place]),
                "without": list(block.without),
                "sizes": dict(block.sizes),
            }
            for place, block in enumerate(layout.blocks)
        ],
        "sizes": dict(sizes),
    }
