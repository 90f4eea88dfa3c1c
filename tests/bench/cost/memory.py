"""The most memory that a run holds beside what was there before it, whatever the device: also on the meta device, which has none."""

import weakref
from collections.abc import Callable

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from .roofline import BYTES


class Held(TorchDispatchMode):
    """Counts what is made inside until nobody refers to it."""

    def __init__(self):
        super().__init__()
        self.bytes = self.most = 0
        self.known = WeakIdKeyDictionary(ref_type=weakref.ref)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {id(each.untyped_storage()) for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        made = func(*args, **(kwargs or {}))
        for each in tree_leaves(made):
            if isinstance(each, Tensor) and id(each.untyped_storage()) not in given:
                self.add(each)
        return made

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self.known:
            return
        size = BYTES * storage.nbytes() // tensor.element_size()
        self.known[storage] = size
        weakref.finalize(storage, self.release, size)
        self.bytes += size
        self.most = max(self.most, self.bytes)

    def release(self, size: int) -> None:
        self.bytes -= size


def held(run: Callable[[], object]) -> int:
    """Bytes, at most at once."""
    with Held() as counted:
        run()
    return counted.most
