"""Parameters for a narrower residual stream, as pure functions: turned and cut, or channels chosen.

An RMS norm over K channels divides by K instead of D. So that it gives out what one over D gave
where the other D - K are zero, its result is multiplied by sqrt(D / K), and the eps in the config
becomes eps D / K.
Legend: D hidden size, K channels that are left, R rows, O outputs, I inputs.

Source: Ashkboos et al., SliceGPT (ICLR 2024), with one rotation for all blocks, so that residual
connections need no matrices of their own and the model stays a stock one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from llmprune.hidden.roles import Blueprint, Roles

_PIECE = 2**22  # values that are multiplied in float64 at a time
Params = Mapping[str, Tensor]
Scales = Mapping[str, float]


def rotate_hidden(
    params: Params, roles: Roles, rotation_DK: Tensor, scales: Scales | None = None
) -> dict[str, Tensor]:
    """Return parameters on a stream turned by the orthogonal columns of `rotation_DK`.

    The weight of a norm and sqrt(D / K) are folded into the matrices that read it (W diag(g) Q),
    writers become Q^T W, and the norm's own weight becomes one: a factor that the norm held would
    be rounded to the same wrong number for all channels in 16 bits, here each weight rounds on its
    own. Computed in float64, returned in each parameter's dtype. `scales` multiply single writers.

    With K = D the model computes what it did. The order of the columns decides what a smaller K
    drops.

    >>> roles = Roles(width=2, readers={"up": (1, "norm")}, norms={"norm": 0.0})
    >>> params = {"up": torch.tensor([[1.0, 2.0]]), "norm": torch.tensor([2.0, 3.0])}
    >>> swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    >>> rotate_hidden(params, roles, swap)
    {'up': tensor([[6., 2.]]), 'norm': tensor([1., 1.])}
    """
    rotation_DK = rotation_DK.double()
    found = {}
    for name, value in params.items():
        if name in roles.readers:
            axis, norm = roles.readers[name]
            gain_D = _gain(params[norm], roles, norm).to(rotation_DK.device)
            found[name] = _contract(
                value, axis, gain_D[:, None] * rotation_DK * _factor(roles, rotation_DK.shape[1])
            )
        elif name in roles.writers:
            scale = (scales or {}).get(name, 1.0)
            found[name] = _contract(value, roles.writers[name], scale * rotation_DK)
        elif name in roles.norms:
            found[name] = value.new_full((rotation_DK.shape[1],), 1.0 - roles.norms[name])
        else:
            found[name] = value
    return found


def select_hidden(
    params: Params, roles: Roles, kept_K: Tensor, scales: Scales | None = None
) -> dict[str, Tensor]:
    """Return parameters on the channels that are kept, in the order given.

    Matrices keep their bits; only the weights of norms are multiplied by sqrt(D / K). `scales`
    multiply single writers and norms beside that.

    >>> roles = Roles(width=4, writers={"bias": 0}, norms={"norm": 0.0})
    >>> params = {"bias": torch.tensor([5.0, 6, 7, 8]), "norm": torch.ones(4)}
    >>> select_hidden(params, roles, torch.tensor([3]))
    {'bias': tensor([8.]), 'norm': tensor([2.])}
    """
    found = {}
    for name, value in params.items():
        axis = roles.axes.get(name)
        if axis is None:
            found[name] = value
            continue
        kept = value.index_select(axis, kept_K.to(value.device)).contiguous()
        scale = (scales or {}).get(name, 1.0)
        if name in roles.norms:
            gain_K = _gain(kept, roles, name) * _factor(roles, len(kept_K)) * scale
            kept = (gain_K - roles.norms[name]).to(value.dtype)
        elif scale != 1.0:
            kept = (kept.double() * scale).to(value.dtype)
        found[name] = kept
    return found


def narrow_block(params: Params, roles: Roles, basis: Tensor) -> dict[str, Tensor]:
    """Return a block's parameters on a basis: `rotation_DK` of float64, or `kept_K` of indices."""
    way = rotate_hidden if basis.dim() == 2 else select_hidden
    return way(params, roles, basis)


def narrow_trunk(
    params: Params, blueprint: Blueprint, basis: Tensor, *, entrance: float = 1.0
) -> dict[str, Tensor]:
    """Return embeddings, last norm and head on a basis.

    Where the head is not among the parameters it is tied to the embeddings. A rotation unties them:
    the last norm's weight, which stands between them, goes into the head alone. Channels that are
    chosen leave them tied. `entrance` multiplies the embeddings, for models that multiply them by a
    number that depends on the hidden size (Gemma: by sqrt(D), so the factor is sqrt(D / K)); of a
    tied head it is taken away in the last norm.
    """
    given = dict(params)
    embedding, norm, head = blueprint.embedding, blueprint.norm, blueprint.head
    tied = head not in given
    roles = blueprint.trunk(given[embedding].shape[1])
    if basis.dim() == 2:
        if tied:
            given[head] = given[embedding]
        return rotate_hidden(given, roles, basis, {embedding: entrance})
    scales = {embedding: entrance} | ({norm: 1 / entrance} if tied else {})
    return select_hidden(given, roles, basis, scales)


def _factor(roles: Roles, num_kept: int) -> float:
    """Return what makes an RMS norm over fewer channels what it was where the others are zero.

    Of x = (3, 4, 0, 0) the norm is (1.2, 1.6, 0, 0), of its first two (0.8485, 1.1314); times the
    root of 2 that is (1.2, 1.6) again.
    """
    return math.sqrt(roles.width / num_kept)


def _gain(weight_D: Tensor, roles: Roles, norm: str) -> Tensor:
    """Return what a norm multiplies with, in float64."""
    return weight_D.double() + roles.norms[norm]


def _contract(value: Tensor, axis: int, matrix_DK: Tensor) -> Tensor:
    """Return a parameter multiplied along one axis: a few rows in float64 at a time, then cast."""
    rows = value.movedim(axis, -1)
    rows_RD = rows.reshape(-1, rows.shape[-1])
    found_RK = rows_RD.new_empty(len(rows_RD), matrix_DK.shape[1])
    step = max(1, _PIECE // max(matrix_DK.shape))
    for start in range(0, len(rows_RD), step):
        piece_RD = rows_RD[start : start + step].to(matrix_DK.device, torch.float64)
        found_RK[start : start + step] = (piece_RD @ matrix_DK).to(value.device, value.dtype)
    return found_RK.reshape(*rows.shape[:-1], -1).movedim(-1, axis).contiguous()
