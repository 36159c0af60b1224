"""Which linears are ranked against each other where the model is ranked module by module."""

from __future__ import annotations

import re
from typing import Literal

Module = Literal["attention_in", "attention_out", "ffn"]

_FFN = re.compile(r"(^|\.)(\w*(mlp|ffn|feed_forward|moe|expert)\w*|fc\d|fc_in|fc_out|ff)(\.|$)")
_ATTENTION_OUT = re.compile(r"(^|\.)(o|wo|o_proj|out_proj|c_proj|dense)$")


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
