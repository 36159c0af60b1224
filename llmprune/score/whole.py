"""How units that run through all blocks are judged: channels of the residual stream, token ids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class WholeScore:
    """What is kept of units of a `kind` ("hidden" or "vocabulary") that no block has alone.

    `needs` names what is learnt of the calibration text before anything is cut. With `flows` it is
    learnt by sending the text through the model, else by reading the text. With `rotates` the units
    are axes that the model is turned onto first. `says` is what becomes of the weights that stay.
    """

    kind: str
    needs: tuple[str, ...]
    flows: bool
    rotates: bool
    says: str
    paper: str
    options: Mapping[str, float] = field(default_factory=dict)
