"""Which matrix is multiplied with what: the products of a forward, seen where torch computes them.

Modules are not asked: a linear that is a slice of a stacked parameter (one expert) is seen like any
other. Legend: E experts, T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# What is multiplied with what, by position, and whether the right one is (O, I) instead of (I, O).
OPERANDS: Mapping[Any, tuple[int, int, bool]] = {
    torch.nn.functional.linear: (0, 1, True),
    torch.addmm: (1, 2, False),
    torch.mm: (0, 1, False),
    torch.matmul: (0, 1, False),
    torch.bmm: (0, 1, False),
    torch.baddbmm: (1, 2, False),
    torch.Tensor.matmul: (0, 1, False),
    torch.Tensor.mm: (0, 1, False),
    torch.Tensor.bmm: (0, 1, False),
    torch.Tensor.__matmul__: (0, 1, False),
}
Seen = Callable[[Tensor, Tensor], None]


class Products(TorchFunctionMode):
    """Hands every product to `seen(left, right_OI)` before it is computed.

    `right_OI` is a view of the operand's own memory. Of a product of stacks both have one more
    dimension in front, (E, T, I) and (E, O, I): `slices` takes them apart.
    """

    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in OPERANDS and (found := _operands(func, args, kwargs)):
            self.seen(*found)
        return func(*args, **kwargs)


def slices(left: Tensor, right: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the products (left, right_OI) of matrices that a product of stacks consists of."""
    if right.dim() == 2:
        yield left, right
    else:
        yield from zip(left.expand(len(right), -1, -1), right, strict=True)


def _operands(
    func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Tensor, Tensor] | None:
    """Return what is multiplied; nothing where an operand is no matrix or stack of them."""
    first, second, output_first = OPERANDS[func]
    if kwargs and len(args) <= second:
        names = ("input", "weight" if func is torch.nn.functional.linear else "mat2")
        args = (*args, *(kwargs.get(name) for name in names[len(args) :]))
    left, right = args[first], args[second]
    if not (isinstance(left, Tensor) and isinstance(right, Tensor)) or right.dim() not in (2, 3):
        return None
    if right.dim() == 3 and (left.dim() != 3 or len(left) not in (1, len(right))):
        return None
    return left, right if output_first else right.mT
