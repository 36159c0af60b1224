"""Runs alone in a fresh process: load a folder as any user would, and time it whenever asked.

Nothing of llmprune is imported, so a model measured shares its process with nothing else. The job
is the first line of stdin; each later line asks for one repetition, and each answer is a line of
JSON. Legend: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
import json
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SAMPLE_SECONDS = 0.001  # between two looks at the memory of this process


class Refused(Exception):
    """What cannot be measured: a kind that the asking process has words for, and the reason."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


def load(job: dict[str, Any]) -> tuple[Any, torch.device]:
    """Load the model of a job onto its device, the stock way, its weights in memory.

    Raises:
        Refused: the device is not there, or the folder does not load whole.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        device = torch.device(default_device() if job["device"] == "auto" else job["device"])
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise Refused("device", str(error)) from error
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        job["folder"],
        dtype="auto" if job["dtype"] == "auto" else getattr(torch, job["dtype"]),
        output_loading_info=True,
        trust_remote_code=job["trust_remote_code"],
    )
    model, info = loaded
    if strange := sorted(map(str, (*info["missing_keys"], *info["mismatched_keys"]))):
        raise Refused("load", f"no tensor of the right shape for {strange[0]}")
    if device.type == "cpu":
        settle(model)
    return model.eval().to(device), device


def settle(model: Any) -> None:
    """Copy weights that are mapped from their file into memory of this process.

    Stored in the wanted dtype they stay mapped, at odd addresses, in whatever pages the system has
    cached: two copies of one model then may differ in speed.
    """
    for value in model.parameters():
        value.data = value.data.clone()


def default_device() -> str:
    """Return CUDA, else MPS, else the CPU."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def facts(model: Any, device: torch.device) -> dict[str, Any]:
    """Return what is true of a loaded model whatever is asked of it."""
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "device": name,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "dtype": str(model.dtype).removeprefix("torch."),
        "num_params": sum(value.numel() for value in model.parameters()),
    }


def repetition(model: Any, ids_BT: Tensor, new: int) -> dict[str, float]:
    """Read a prompt, then decode `new` tokens greedily, ends of text ignored; return seconds.

    `prefill` is the forward over the prompt, `first` the time until the first token is on the host,
    `decode` that of `new` further forwards over one token per sequence with the cache.

    Raises:
        Refused: the model gives no cache back.
    """
    import torch

    # as generate does: the prompt's other logits, V numbers for every token, are not wanted
    wants = {"logits_to_keep": 1} if "logits_to_keep" in _parameters(model) else {}
    device = ids_BT.device
    with torch.inference_mode():
        wait(device)
        start = time.perf_counter()
        output = model(input_ids=ids_BT, use_cache=True, **wants)
        wait(device)
        prefilled = time.perf_counter()
        token_B1 = output.logits[:, -1:].argmax(-1)
        token_B1.tolist()
        first = time.perf_counter()
        for _ in range(new):
            cache = getattr(output, "past_key_values", None)
            if cache is None:
                raise Refused("cache", type(model).__name__)
            output = model(input_ids=token_B1, past_key_values=cache, use_cache=True, **wants)
            token_B1 = output.logits[:, -1:].argmax(-1)
        wait(device)
        end = time.perf_counter()
    return {"prefill": prefilled - start, "first": first - start, "decode": end - first}


def _parameters(model: Any) -> Any:
    return inspect.signature(model.forward).parameters


def wait(device: torch.device) -> None:
    """Wait until the device has done what was asked of it."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_memory(model: Any, device: torch.device, work: Callable[[], object]) -> int:
    """Return the most bytes that weights, cache and activations take while `work` runs.

    On CUDA what torch has allocated at most. Elsewhere the bytes of weights and buffers and, on top
    of them, by how much this process grew meanwhile, sampled every millisecond: Python and its
    libraries, which are larger than a small model, are left out.
    """
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return int(torch.cuda.max_memory_allocated(device))
    held: dict[int, int] = {
        value.data_ptr(): value.nbytes for value in (*model.parameters(), *model.buffers())
    }
    return sum(held.values()) + growth(work)


def growth(work: Callable[[], object]) -> int:
    """Return by how many bytes this process grew at most while `work` ran."""
    import psutil

    process, done = psutil.Process(), threading.Event()
    return_freed()  # what the allocator kept would be taken again without a trace
    before = int(process.memory_info().rss)
    seen = [before]

    def watch() -> None:
        while not done.wait(SAMPLE_SECONDS):
            seen.append(process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        work()
        seen.append(process.memory_info().rss)
    finally:
        done.set()
        watcher.join()
    return max(seen) - before


def return_freed() -> None:
    """Give freed memory back to the system where the C library can (glibc)."""
    import ctypes

    try:
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    except (OSError, TypeError):
        return
    if trim is not None:
        trim(0)


def answer(model: Any, device: torch.device, asked: dict[str, Any]) -> dict[str, Any]:
    """Carry out one request: a repetition, or one whose memory is watched instead of its time."""
    import torch

    vocab = model.config.get_text_config(decoder=True).vocab_size
    draw = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(0, vocab, (asked["batch"], asked["prompt"]), generator=draw).to(device)
    work = partial(repetition, model, ids_BT, asked["new"])
    return {"memory": peak_memory(model, device, work)} if asked["watch"] else dict(work())


def serve(requests: TextIO, say: Callable[[dict[str, Any]], None]) -> None:
    """Load the job of the first line, tell its facts, and answer every further line."""
    stage = "load"
    try:
        model, device = load(json.loads(requests.readline()))
        say(facts(model, device))
        stage = "run"
        for line in requests:
            say(answer(model, device, json.loads(line)))
    except Refused as error:
        say({"refused": error.kind, "reason": str(error)})
    except Exception as error:  # whatever a model's own code raises ends in words, not a traceback
        full = isinstance(error, MemoryError) or "out of memory" in str(error).lower()
        kind = "memory" if full or "can't allocate memory" in str(error) else stage
        say({"refused": kind, "reason": f"{type(error).__name__}: {error}"})


def main() -> None:
    """Answer on the stdout that was given; what libraries print goes to stderr."""
    out, sys.stdout = sys.stdout, sys.stderr

    def say(words: dict[str, Any]) -> None:
        print(json.dumps(words), file=out, flush=True)

    serve(sys.stdin, say)


if __name__ == "__main__":
    main()
