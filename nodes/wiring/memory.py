"""Memory and precision of the device."""

from collections.abc import Callable, Sequence

import comfy.model_management
import comfy.model_patcher
import torch


def precision(wanted: torch.dtype | None) -> Callable[[torch.dtype], torch.dtype]:
    """The precision to load weights in, from the one they are stored in: the wanted, or the stored where the device is fast at it."""
    device = comfy.model_management.get_torch_device()
    fast = {
        torch.float16: comfy.model_management.should_use_fp16,
        torch.bfloat16: comfy.model_management.should_use_bf16,
    }

    def choose(stored: torch.dtype) -> torch.dtype:
        return wanted or (stored if stored in fast and fast[stored](device) else torch.float32)

    return choose


def room_for(needed: int) -> torch.device:
    """The device, with so many bytes free where that is possible."""
    device = comfy.model_management.get_torch_device()
    comfy.model_management.free_memory(needed, device)
    return device


def as_many_as_fit(model: comfy.model_patcher.ModelPatcher, shape: Sequence[int]) -> int:
    """How many samples of that shape the model's device has memory for at once, by ComfyUI's own estimate, with CFG; at least 1."""
    weights_to_come = model.model_size() - model.loaded_size()
    free = (
        comfy.model_management.get_free_memory(model.load_device)
        - weights_to_come
        - comfy.model_management.extra_reserved_memory()
    )
    return max(1, int(free // model.model.memory_required([2, *shape[1:]])))
