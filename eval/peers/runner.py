"""What every tool's runner is given and answers: arguments, token ids, one line of JSON.

Imports the standard library alone, so that it runs in the environments of other tools too.
Legend: N sequences, T tokens in each.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def answer(run: Callable[[argparse.Namespace], dict[str, Any]], purpose: str) -> None:
    """Run a tool as the command line asks; print what it measured as the last line."""
    parser = argparse.ArgumentParser(description=purpose)
    parser.add_argument("--model", required=True, help="a folder with a Llama")
    parser.add_argument("--tokens", required=True, type=Path, help="safetensors with `calibration`")
    parser.add_argument("--method", default="wanda", choices=("wanda", "sparsegpt"))
    parser.add_argument("--pattern", default="0.5", help="a sparsity, or N:M: N kept of every M")
    parser.add_argument("--batch", type=int, help="sequences at once; absent: the tool's default")
    parser.add_argument("--dtype", default="float32", help="what the tool computes in")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    import torch

    torch.set_num_threads(asked.threads)
    print(json.dumps(run(asked)), flush=True)


def calibration(asked: argparse.Namespace) -> Any:
    """Return the token ids (N, T) int64."""
    from safetensors.torch import load_file

    return load_file(asked.tokens)["calibration"].long()


def share_and_groups(pattern: str) -> tuple[float, int, int]:
    """Return the share that goes, and (kept, of how many) in every group; (0, 0) without groups.

    >>> share_and_groups("0.5"), share_and_groups("2:4")
    ((0.5, 0, 0), (0.5, 2, 4))
    """
    if ":" not in pattern:
        return float(pattern), 0, 0
    kept, group = (int(part) for part in pattern.split(":"))
    return 1 - kept / group, kept, group
