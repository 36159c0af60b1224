"""A text cut into windows: what a model reads, and which tokens it is asked to predict.

Legend: N windows, T tokens of a window; a target of `IGNORED` is not asked for.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

from llmprune.base.errors import RecipeError

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100  # what cross_entropy leaves out
Bos = bool | str  # True, False, or "auto": as the tokenizer does


class Windows(NamedTuple):
    """What a model reads, and the token that each position is to predict; both (N, T) int64."""

    inputs_NT: Tensor
    targets_NT: Tensor


def cut_windows(
    token_ids: list[int],
    seq_len: int,
    *,
    stride: int | None = None,
    num_windows: int | None = None,
    bos_id: int | None = None,
) -> Windows:
    """Cut windows of `seq_len` tokens from the start of a text; with `bos_id` each begins with it.

    Without `stride` by the papers' protocol: windows do not overlap, each predicts its own tokens
    but the first, and the rest of the text, too short for a window, is left out. With BOS the first
    is predicted too, from BOS alone.

    With `stride` by the protocol that Hugging Face documents: window k begins at token k * stride
    and predicts what no window before it did. So the first window predicts its tokens but the
    first, every other one its last `stride` tokens, and a last window, which may be shorter (filled
    with token 0, which no earlier position can see), the rest. The first token of the text is never
    predicted, except from BOS. A stride as long as a window overlaps nothing and leaves nothing to
    see before a window's first token: the papers' protocol, and the rest of the text.

    Raises:
        RecipeError: the text is shorter than one window, or the stride would skip tokens.

    >>> cut_windows(list(range(7)), 4, stride=2).targets_NT.tolist()
    [[1, 2, 3, -100], [-100, 4, 5, -100], [-100, 6, -100, -100]]
    """
    import torch

    content = seq_len if bos_id is None else seq_len - 1
    step = content if stride is None else stride
    if not 1 <= step <= content:
        raise RecipeError(
            f"stride: {step}, where a window holds {content} tokens of the text. Give 1 or more, "
            f"and at most {content}, so that no token is skipped: --stride {max(content // 2, 1)}."
        )
    if len(token_ids) < content:
        raise RecipeError(
            f"the text has {len(token_ids)} tokens, fewer than one window of {seq_len}. "
            "Give a longer text, or a smaller --seq-len."
        )
    first = seq_len - content  # of the text's tokens in a window: 1 after BOS
    starts = list(range(0, len(token_ids) - content + 1, step))
    rest = len(token_ids) - starts[-1] - content
    if stride is not None and rest > (step == content and not first):  # one alone has no context
        starts.append(starts[-1] + step)
    starts = starts[:num_windows]
    inputs = torch.zeros(len(starts), seq_len, dtype=torch.int64)
    targets = torch.full_like(inputs, IGNORED)
    if bos_id is not None:
        inputs[:, 0] = bos_id
    done = 0  # tokens of the text that are predicted or that nothing precedes
    for row, start in enumerate(starts):
        ids = torch.tensor(token_ids[start : start + content], dtype=torch.int64)
        inputs[row, first : first + len(ids)] = ids
        new = max(done - start, 0 if first else 1)  # where in the window prediction begins
        targets[row, new + first - 1 : len(ids) + first - 1] = ids[new:]
        done = start + len(ids)
    return Windows(inputs, targets)


def rolling_windows(token_ids: list[int], seq_len: int, prefix_id: int) -> Windows:
    """Cut windows that predict every token of a text once, the first from a prefix token.

    Each window reads at most `seq_len` tokens and predicts the next `seq_len` ones; the last reads
    as much before its tokens as it can. This is the `loglikelihood_rolling` of
    lm-evaluation-harness.

    Raises:
        RecipeError: the text is empty.

    >>> rolling_windows([5, 6, 7, 8, 9], 3, 0).inputs_NT.tolist()
    [[0, 5, 6], [6, 7, 8]]
    """
    import torch

    if not token_ids:
        raise RecipeError("the text has no tokens. Give a text to measure.")
    stream = torch.tensor([prefix_id, *token_ids], dtype=torch.int64)
    length = min(seq_len, len(token_ids))
    ends = [*range(length, len(token_ids), length), len(token_ids)]
    inputs = torch.stack([stream[end - length : end] for end in ends])
    targets = torch.stack([stream[end - length + 1 : end + 1] for end in ends])
    if repeated := length * len(ends) - len(token_ids):  # in the last window
        targets[-1, :repeated] = IGNORED
    return Windows(inputs, targets)


def next_tokens(inputs_NT: Tensor) -> Tensor:
    """Return the targets (N, T) of windows that predict all their tokens but the first."""
    import torch

    return torch.nn.functional.pad(inputs_NT[:, 1:], (0, 1), value=IGNORED)


def adds_bos(tokenizer: Any) -> bool:
    """Tell whether a tokenizer begins a text with BOS by itself."""
    bos_id = tokenizer.bos_token_id
    return bos_id is not None and list(tokenizer("a")["input_ids"])[:1] == [bos_id]


def bos_token(tokenizer: Any, policy: Bos) -> int | None:
    """Return the token that begins every window, or none; `auto` is what the tokenizer does.

    Raises:
        RecipeError: BOS is asked of a tokenizer that has none, or the policy is no policy.
    """
    if policy not in (True, False, "auto"):
        raise RecipeError(f"bos: {policy!r} is no choice. There are: auto, true, false.")
    if policy == "auto":
        policy = adds_bos(tokenizer)
    if not policy:
        return None
    if tokenizer.bos_token_id is None:
        raise RecipeError("bos: this tokenizer has no BOS token; leave bos out.")
    return int(tokenizer.bos_token_id)


def count_words(text: str) -> int:
    """Count the words of a text as lm-evaluation-harness does: the pieces between white space."""
    return len(re.split(r"\s+", text))
