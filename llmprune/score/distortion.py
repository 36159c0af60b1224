"""Scores that weigh each weight by how much of its linear is lost with it, without any data.

Legend: O outputs, I inputs, N all weights of a linear, from the largest down.
"""

from __future__ import annotations

import re
from typing import Literal

import torch
from torch import Tensor

from llmprune.stats.types import Stats

Module = Literal["attention_in", "attention_out", "ffn"]

_PIECE = 2**20
_FFN = re.compile(r"(^|\.)(\w*(mlp|ffn|feed_forward|moe|expert)\w*|fc\d|fc_in|fc_out|ff)(\.|$)")
_ATTENTION_OUT = re.compile(r"(^|\.)(o|wo|o_proj|out_proj|c_proj|dense)$")


def relative_distortion(weight_OI: Tensor, stats: Stats) -> Tensor:
    """Return every squared weight over the sum of the squares of its linear that are as large or
    larger, float32 (O, I); 0/0 is 0. The statistics are not read.

    It is the squared relative distortion ||W - W'||_F / ||W||_F of the step that removes this
    weight after all smaller ones, which bounds what the model's output changes by. So it may be
    compared across linears, and the largest weight of each scores 1. Sums are in float64.

    Source: He & Zhou, Data-independent Module-Aware Pruning for Hierarchical Vision Transformers,
    eq. 10. The number is that of Lee et al. (LAMP); what is new there is who is compared, which
    `module_of` tells.

    >>> weight_OI = torch.tensor([[10.0, -10.0], [1.0, 0.0]])
    >>> relative_distortion(weight_OI, Stats(num_tokens=0, values={}))
    tensor([[0.5000, 0.5000],
            [0.0050, 0.0000]])
    """
    score_OI = weight_OI.detach().contiguous().to(torch.float32, copy=True).abs_()
    score_N = score_OI.view(-1)
    negative_N = torch.sort(-score_N).values
    on_mps = score_N.device.type == "mps"  # which has no float64
    sum_N = negative_N.to(torch.float32 if on_mps else torch.float64).square_().cumsum(0)
    for part_N in score_N.split(_PIECE):
        last_N = torch.searchsorted(negative_N, -part_N, right=True) - 1  # of those as large
        sums_N = sum_N[last_N]
        square_N = part_N.to(sums_N.dtype).square_()
        part_N.copy_(torch.where(sums_N > 0, square_N / sums_N, 0.0))
    return score_OI


def module_of(linear: str) -> Module:
    """Return the module of a linear (name relative to its block): whom it is ranked against.

    A module is the linears of one kind of all blocks: those that read what attention is given,
    those that write what it returns, or those of the FFN. Each module loses the same share.

    Source: He & Zhou, Data-independent Module-Aware Pruning for Hierarchical Vision Transformers,
    appendix B (QKV-M, PRJ-M, MLP-M); told by names, as the families of transformers use them.

    >>> module_of("self_attn.q_proj"), module_of("attn.c_proj"), module_of("mlp.c_proj")
    ('attention_in', 'attention_out', 'ffn')
    """
    if _FFN.search(linear):
        return "ffn"
    return "attention_out" if _ATTENTION_OUT.search(linear) else "attention_in"
