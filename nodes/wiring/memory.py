"""Chooses precision and batch size for the device, and frees memory on it."""

from collections.abc import Callable, Sequence

import comfy.model_management
import comfy.model_patcher
import torch


def precision(wanted: torch.dtype | None) -> Callable[[torch.dtype], torch.dtype]:
    """A function from the stored precision of weights to the one to load them in.

    It is the wanted one; without one, the stored one if the device computes fast in it, else float32.
    """
    device = comfy.model_management.get_torch_device()
    fast = {
        torch.float16: comfy.model_management.should_use_fp16,
        torch.bfloat16: comfy.model_management.should_use_bf16,
    }

    def choose(stored: torch.dtype) -> torch.dtype:
        return wanted or (stored if stored in fast and fast[stored](device) else torch.float32)

    return choose


def free_memory_for(needed: int) -> torch.device:
    """Free this many bytes on the device if possible. Returns the device."""
    device = comfy.model_management.get_torch_device()
    comfy.model_management.free_memory(needed, device)
    return device


def largest_batch(model: comfy.model_patcher.ModelPatcher, shape: Sequence[int]) -> int:
    """How many samples of this shape fit in the memory of the device with CFG, by ComfyUI's estimate; at least 1."""
    weights_to_come = model.model_size() - model.loaded_size()
    free = (
        comfy.model_management.get_free_memory(model.load_device)
        - weights_to_come
        - comfy.model_management.extra_reserved_memory()
    )
    return max(1, int(free // model.model.memory_required([2, *shape[1:]])))
