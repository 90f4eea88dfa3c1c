"""The least time of a run on a device: of every operation, that of its arithmetic or that of its memory traffic, whichever is more."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

BYTES = 2
"""Of a number in bfloat16, whatever the tensors at hand are in."""


@dataclass(frozen=True)
class Device:
    name: str
    flops: float
    """Per second, dense, in bfloat16."""
    bytes: float
    """Per second, to and from memory."""


H100 = Device("H100", 989e12, 3.35e12)


class Roofline(TorchDispatchMode):
    """Adds up what runs inside.

    `seconds`: nothing is fused but attention, and every operation reads what it is given and writes what it makes. `fused`: products of
    matrices and convolutions alone, as if all between them came with them.
    """

    def __init__(self, device: Device = H100):
        super().__init__()
        self.device, self.flops, self.bytes, self.seconds, self.fused = device, 0.0, 0.0, 0.0, 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if not func.is_view:
            price = flop_registry.get(func.overloadpacket)
            self.add(price(*args, **(kwargs or {}), out_val=made) if price else 0, args, made)
        return made

    def add(self, flops: float, *moved) -> None:
        traffic = BYTES * sum(each.numel() for each in tree_leaves(moved) if isinstance(each, Tensor))
        self.flops += flops
        self.bytes += traffic
        seconds = max(flops / self.device.flops, traffic / self.device.bytes)
        self.seconds += seconds
        self.fused += seconds if flops else 0


class Attention(torch.autograd.Function):
    """Of a fused kernel, on the meta device: two products of matrices forward, five back."""

    @staticmethod
    def forward(context, roofline: Roofline, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        context.roofline, context.given = roofline, (query, key, value)
        made = query.new_empty(*query.shape[:-1], value.shape[-1])
        roofline.add(2 * Attention.product(query, key), query, key, value, made)
        return made

    @staticmethod
    def backward(context, gradient: Tensor):
        query, key, value = context.given
        context.roofline.add(5 * Attention.product(query, key), *context.given, *context.given, gradient, gradient)
        return None, *map(torch.empty_like, context.given)

    @staticmethod
    def product(query: Tensor, key: Tensor) -> float:
        return 2 * query.numel() * key.shape[-2]


@contextmanager
def fused_attention() -> Iterator[Roofline]:
    """Counts what runs inside on the meta device, where attention is one operation that keeps no scores."""
    counted = Roofline()

    def attention(query: Tensor, key: Tensor, value: Tensor, *_, **__) -> Tensor:
        return Attention.apply(counted, query, key, value)

    with patch.object(torch.nn.functional, "scaled_dot_product_attention", attention), counted:
        yield counted


def roofline(run: Callable[[], object]) -> Roofline:
    """Of what the run does on the meta device."""
    with fused_attention() as counted:
        run()
    return counted
