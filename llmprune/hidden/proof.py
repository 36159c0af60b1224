"""The proof on a miniature that a family's hidden size can be cut: nothing is taken on trust.

A random miniature is turned and cut as the model will be. Turned only, it must compute what it did;
cut, and held by the stock class with a smaller config, it must compute what the large one does when
all that writes the stream is projected onto what is kept.
Legend: D hidden size, K channels that are left.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from llmprune.arch.miniature import SEQ_LEN, miniature_model
from llmprune.arch.probe import find_family
from llmprune.arch.types import Family
from llmprune.base.errors import UnsupportedModel, first_line
from llmprune.checkpoint.skeleton import use_eager_experts
from llmprune.hidden.roles import Blueprint
from llmprune.hidden.sizes import config_of_width, entrance_scale, fitting_width, hidden_size

if TYPE_CHECKING:
    from torch import Tensor

CLOSE = 1e-4  # of the largest logit; what is wrong is wrong by far more
REMOVED = 0.25


def prove_narrowing(config: Any, *, trust_remote_code: bool = False) -> Blueprint:
    """Return who reads and writes the residual stream, once a miniature has proven it.

    Raises:
        UnsupportedModel: the hidden size of this family cannot be cut exactly; says why.
    """
    import torch

    from llmprune.hidden.tracing import trace_roles

    hidden_size(config)
    family = find_family(config, trust_remote_code=trust_remote_code)
    model = miniature_model(config, trust_remote_code=trust_remote_code)
    _shake(model)
    blueprint = trace_roles(model, family)
    width = hidden_size(model.config)
    small = fitting_width(model.config, REMOVED)
    rotation_DD = random_rotation(width)
    kept_K = torch.arange(width)[-small:]
    for basis in (rotation_DD, rotation_DD[:, :small], kept_K):
        try:
            expected = _logits(masked(model, family, blueprint, basis))
            found = _logits(narrowed_model(model, family, blueprint, basis))
        except Exception as error:  # any line of any model may depend on the hidden size
            raise _unproven(config, small, first_line(error)) from error
        apart = float((found - expected).abs().max() / expected.abs().max())
        if not apart <= CLOSE:
            reason = f"its logits are off by {apart:.1e} of the largest"
            raise _unproven(config, basis.shape[-1], reason)
    return blueprint


def random_rotation(width: int, *, seed: int = 0) -> Tensor:
    """Return rotation_DD, float64: random, orthogonal, the same for the same seed."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    normal_DD = torch.randn(width, width, generator=generator, dtype=torch.float64)
    rotation_DD: Tensor = torch.linalg.qr(normal_DD)[0].contiguous()
    return rotation_DD


def narrowed_model(model: Any, family: Family, blueprint: Blueprint, basis: Tensor) -> Any:
    """Return a model of the same class with a smaller config, which holds a model on a basis.

    Raises:
        UnsupportedModel: other sizes than the hidden size differ.
    """
    import torch

    from llmprune.hidden.turning import narrow_block, narrow_trunk

    config = config_of_width(model.config, basis.shape[-1], untie=basis.dim() == 2)
    config._attn_implementation = model.config._attn_implementation
    with torch.random.fork_rng(devices=[]):
        small = type(model)(config).to(model.dtype).eval()
    use_eager_experts(small)
    params: dict[str, Tensor] = {}
    width = hidden_size(model.config)
    for index, block in enumerate(model.get_submodule(family.blocks)):
        own = {name: value.data for name, value in block.named_parameters()}
        roles = blueprint.block({name: tuple(v.shape) for name, v in own.items()}, width)
        start = f"{family.blocks}.{index}."
        params |= {start + name: v for name, v in narrow_block(own, roles, basis).items()}
    scales = (entrance_scale(each, each.get_submodule(family.blocks)) for each in (model, small))
    entrance = next(scales) / next(scales)
    inside = family.blocks + "."
    trunk = {n: v.data for n, v in model.named_parameters() if not n.startswith(inside)}
    params |= narrow_trunk(trunk, blueprint, basis, entrance=entrance)
    for name, value in small.named_parameters():
        if params[name].shape != value.shape:
            raise UnsupportedModel(
                f"{name} would have shape {list(value.shape)}, because other sizes of this family "
                "follow from the hidden size"
            )
        value.data = params[name]
    return small


def masked(model: Any, family: Family, blueprint: Blueprint, basis: Tensor) -> Any:
    """Return a copy of a model whose stream is projected onto what a basis keeps.

    A head that is tied to the embeddings gets weights of its own where the basis is a rotation.
    """
    import torch

    copied = copy.deepcopy(model)
    head, embedding = copied.get_output_embeddings(), copied.get_input_embeddings()
    if basis.dim() == 2 and head.weight is embedding.weight:
        head.weight = torch.nn.Parameter(head.weight.data.clone())
    width = hidden_size(model.config)
    one_DD = torch.eye(width, dtype=torch.float64)
    projector_DD = basis @ basis.T if basis.dim() == 2 else one_DD[basis].T @ one_DD[basis]
    writers = {blueprint.embedding: 1}
    for index, block in enumerate(copied.get_submodule(family.blocks)):
        shapes = {name: tuple(value.shape) for name, value in block.named_parameters()}
        roles = blueprint.block(shapes, width)
        writers |= {f"{family.blocks}.{index}.{n}": axis for n, axis in roles.writers.items()}
    for name, axis in writers.items():
        value = copied.get_parameter(name)
        rows = value.data.movedim(axis, -1).double() @ projector_DD
        value.data.copy_(rows.movedim(-1, axis))
    return copied


def _shake(model: Any) -> None:
    """Give every parameter a value that matters: norms and biases would be ones and zeros."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.parameters():
            if value.dim() > 1:
                value.mul_(5)  # the usual spread leaves blocks almost without effect
            else:
                value.add_(0.3 * torch.randn(value.shape, generator=generator))


def _logits(model: Any) -> Tensor:
    """Return the logits of fixed tokens."""
    import torch

    vocab = model.config.vocab_size
    generator = torch.Generator().manual_seed(1)
    ids_BT = torch.randint(min(3, vocab - 1), vocab, (2, SEQ_LEN), generator=generator)
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids_BT, use_cache=False).logits.double()
    return logits


def _unproven(config: Any, width: int, reason: str) -> UnsupportedModel:
    """Return the error for a family that computes something else when it is cut."""
    return UnsupportedModel(
        f"the hidden size of {config.model_type!r} cannot be cut: on a miniature of hidden size "
        f"{width} the result was not what it should be ({reason}). Prune widths inside the blocks "
        "instead: --pattern ffn-channels or heads."
    )
