"""How much memory this process holds, and sizes as people write them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmprune.base.errors import LlmpruneError, TooLarge

if TYPE_CHECKING:
    import torch

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
LARGE_PIECE = 4 * 2**20
MOST_MAPPED, TRIMMED = 65536, 128 * 2**10  # as glibc has them where nothing is said
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # glibc's numbers of options
_ours: set[bool] = set()  # holds True once the allocator was told how to go about it
BINARY = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def anonymous_bytes() -> int:
    """Return the anonymous pages of this process: what mapped files do not explain."""
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"RssAnon:\s+(\d+) kB", status.read_text())):
        return int(found[1]) * 1024
    import psutil

    return int(psutil.Process().memory_info().rss)


def free_bytes(device: torch.device) -> dict[str, int]:
    """Return what is free by place: `memory`, and after it the device where that has its own."""
    import psutil
    import torch

    free = {"memory": int(psutil.virtual_memory().available)}
    if device.type == "cuda":
        free[str(device)] = int(torch.cuda.mem_get_info(device)[0])
    return free


def map_large_pieces() -> None:
    """Let the allocator map pieces of 4 MB and more on their own, so that they go when freed.

    glibc would raise this limit to 32 MB by itself and keep the gaps that large tensors leave. A
    setting of the whole process; other C libraries have none and are left alone.
    """
    option = getattr(_libc(), "mallopt", None)
    if option is not None:
        _ours.add(True)
        option(_M_MMAP_MAX, MOST_MAPPED)
        option(_M_TRIM_THRESHOLD, TRIMMED)
        option(_M_MMAP_THRESHOLD, LARGE_PIECE)


@contextmanager
def keeping_pieces() -> Iterator[None]:
    """Let a loop that asks for the same sizes again reuse what it frees; give it back at the end.

    Mapped pieces come back as fresh pages that the system fills with zeros, which takes a sixth of
    a training step. Does nothing where `map_large_pieces` has not been called: the allocator is the
    caller's then.
    """
    option = getattr(_libc(), "mallopt", None)
    if option is None or not _ours:
        yield
        return
    option(_M_MMAP_MAX, 0)
    option(_M_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        map_large_pieces()
        return_freed()


def return_freed() -> None:
    """Give freed memory back to the system where the allocator keeps it (glibc does).

    Blocks come and go in pieces of many sizes; without this the gaps between them add up to whole
    blocks, and memory grows with the depth of the model.
    """
    trim = getattr(_libc(), "malloc_trim", None)
    if trim is not None:
        trim(0)


@cache
def _libc() -> Any:
    """Return the C library that this process uses, where it can be called."""
    import ctypes

    try:
        return ctypes.CDLL(None)
    except (OSError, TypeError):
        return None


def parse_size(text: str | int) -> int:
    """Return bytes of a size such as `8GB`, `512MiB` or `1000000`.

    >>> parse_size("8GB"), parse_size("1KiB")
    (8000000000, 1024)
    """
    if isinstance(text, int):
        return text
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if found is None:
        raise ValueError(f"{text!r} is not a size; type 8GB, 512MiB or a number of bytes")
    unit = found[2].upper()
    return int(float(found[1]) * (BINARY[unit] if found[3] and unit else UNITS[unit]))


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turn an allocator's failure into a message that says what lowers memory."""
    import torch

    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        is_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(
            words in text for words in ("can't allocate memory", "out of memory", "Cannot allocate")
        )
        if not is_memory or isinstance(error, LlmpruneError):
            raise
        raise TooLarge(
            f"out of memory ({text.splitlines()[0] if text else type(error).__name__}). Fewer "
            "--num-samples, a shorter --seq-len or a lower --max-memory need less; the same "
            "command resumes."
        ) from error
