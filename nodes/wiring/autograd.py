"""Gradients inside the inference mode in which ComfyUI runs its prompts."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain
from textwrap import shorten
from typing import Any, cast

import comfy.cli_args
import comfy.model_management
import comfy.model_patcher
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ...guidance.errors import GuidanceError


class GradientPatcher(comfy.model_patcher.ModelPatcher):
    """A small module that gradients flow through: always wholly on its device or wholly off it.

    It is moved outside inference mode, or every step would need other tensors in place of its weights.
    """

    @torch.inference_mode(False)
    def load(self, *args, **kwargs):
        return super().load(*args, **kwargs)

    @torch.inference_mode(False)
    def unpatch_model(self, *args, **kwargs):
        return super().unpatch_model(*args, **kwargs)

    def partially_load(self, device_to, extra_memory=0, force_patch_weights=False):
        return super().partially_load(device_to, 1e32, force_patch_weights)

    def partially_unload(self, device_to, memory_to_free=0, force_patch_weights=False):
        return 0


def manage(module: nn.Module) -> GradientPatcher:
    """Hand a module to ComfyUI's model management."""
    return GradientPatcher(
        module, comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
    )


@contextmanager
def normal_weights(*modules: nn.Module) -> Iterator[None]:
    """Stand in for weights that were loaded under inference mode by normal tensors over the same memory.

    Autograd refuses to save inference tensors. Nothing is copied.
    """
    swapped: list[tuple[dict[str, Any], str, Tensor]] = []
    try:
        for module in chain.from_iterable(m.modules() for m in modules):
            for tensors in cast(list[dict[str, Any]], [module._parameters, module._buffers]):
                for name, tensor in tensors.items():
                    if tensor is not None and tensor.is_inference():
                        swapped.append((tensors, name, tensor))
                        tensors[name] = _alias(tensor)
        yield
    finally:
        for tensors, name, tensor in swapped:
            tensors[name] = tensor


def _alias(tensor: Tensor) -> Tensor:
    """A normal tensor over the same memory. A subclass stays what it is: quantized weights hold their numbers in tensors of their own."""
    kind: Any = type(tensor)
    if hasattr(tensor, "__tensor_flatten__"):
        names, context = tensor.__tensor_flatten__()
        return kind.__tensor_unflatten__(
            {name: _alias(getattr(tensor, name)) for name in names}, context, tensor.size(), tensor.stride()
        )
    alias = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    alias.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())
    if kind not in (Tensor, nn.Parameter):
        alias = alias.as_subclass(kind)
        vars(alias).update(vars(tensor))
    return alias


def normal(values: Any) -> Any:
    """Tensors, and those in a dictionary, as autograd can save them. Nothing is copied but the dictionary."""
    if isinstance(values, dict):
        return {name: normal(value) if isinstance(value, Tensor) else value for name, value in values.items()}
    return _alias(values) if values.is_inference() else values


@contextmanager
def gradients(*modules: nn.Module) -> Iterator[None]:
    """Inside, autograd works through these modules although ComfyUI runs its prompts in inference mode."""
    wanted = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(wanted), normal_weights(*modules):
        yield


def in_current_modes(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function in the inference and gradient modes of where this is called, wherever it is called itself."""
    inference, gradient = torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    def run(*arguments) -> Tensor:
        with torch.inference_mode(inference), torch.set_grad_enabled(gradient):
            return function(*arguments)

    return run


_inside_differentiable_model = False


@contextmanager
def differentiable_model(*models: nn.Module, instead: str = "another model") -> Iterator[None]:
    """Inside, autograd also works through a diffusion model: pure torch kernels, in-place updates of saved tensors allowed, and no compiler
    that reuses memory which the backward pass needs.

    Raises GuidanceError, which advises `instead`, where a kernel of the model has no gradient.
    """
    global _inside_differentiable_model
    within_another = _inside_differentiable_model
    mutation = (
        nullcontext() if within_another else torch.autograd.graph.allow_mutation_on_saved_tensors()
    )  # which cannot be nested
    _inside_differentiable_model = True
    try:
        switches = (
            switched(comfy.model_management, "in_training", True),
            switched(comfy.cli_args.args, "disable_comfy_compiler", True),
        )
        with switches[0], switches[1], normal_weights(*models), mutation:
            yield
    except (RuntimeError, NotImplementedError) as error:
        if not NO_GRADIENT.search(str(error)):
            raise
        reason = shorten(str(error), 160, placeholder=" ...")
        raise GuidanceError(
            f"A part of this model has no gradient, which is needed here: choose {instead}. PyTorch: {reason}"
        ) from error
    finally:
        _inside_differentiable_model = within_another


NO_GRADIENT = re.compile(
    "no autograd formula|derivative for|does not require grad|does not have a grad_fn|[Ii]nference tensor|in-?place operation|version counter|"
    "its data is not allocated"
)
"""In PyTorch's messages where an operation has no backward pass, or not in the way that a model uses it."""


@contextmanager
def switched(holder: Any, name: str, value: object) -> Iterator[None]:
    """Inside, a switch of ComfyUI stands at another value; of a core that does not have it yet, nothing changes."""
    if not hasattr(holder, name):
        yield
        return
    before = getattr(holder, name)
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, before)


def trains_elsewhere() -> bool:
    """Whether another node trains the model, such as Train LoRA: then its predictions are not samples and must not be guided."""
    return comfy.model_management.in_training and not _inside_differentiable_model


def models_of(guider) -> list[nn.Module]:
    """Every model that a guider holds: its own, ControlNets, and whatever else it asks."""
    held = chain.from_iterable(value if isinstance(value, list) else [value] for value in vars(guider).values())
    return [each.model for each in held if isinstance(each, comfy.model_patcher.ModelPatcher)]


@contextmanager
def trainable() -> Iterator[None]:
    """Inside, networks can be trained although ComfyUI runs its prompts in inference mode."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


@contextmanager
def as_nodes_run() -> Iterator[None]:
    """Inside, all is as ComfyUI runs its prompts."""
    with torch.inference_mode():
        yield


def static_clone(patcher: ModelPatcher, what: str, instead: str) -> ModelPatcher:
    """A clone that can be wholly on its device, for `what` takes a gradient through it; where that is impossible, `instead` is advised."""
    if patcher.is_dynamic() and getattr(patcher, "cached_patcher_init", None) is None:
        raise GuidanceError(
            f"{what} takes a gradient through the whole model, and its loader cannot load it a second time for that: choose {instead}, load it by "
            "a loader of ComfyUI's own, or start ComfyUI with --disable-dynamic-vram."
        )
    return patcher.clone(disable_dynamic=True)
