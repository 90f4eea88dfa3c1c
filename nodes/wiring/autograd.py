"""Gradients inside ComfyUI's inference mode: normal tensors, differentiable models, patchers that load completely."""

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
    """A patcher for a small module with gradients: the module is loaded completely or not at all.

    It is moved outside inference mode, so that its weights are normal tensors that autograd can save.
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
    """Replace inference tensors in the modules by normal tensors that share their memory, and restore them at the end.

    Autograd cannot save inference tensors. Attributes of a module are replaced too, because rewards of other packs
    may keep tensors there.
    """
    swapped: list[tuple[dict[str, Any], str, Tensor, Tensor]] = []
    try:
        for module in chain.from_iterable(m.modules() for m in modules):
            for tensors in cast(list[dict[str, Any]], [module._parameters, module._buffers, vars(module)]):
                for name, tensor in tensors.items():
                    if isinstance(tensor, Tensor) and tensor.is_inference():
                        tensors[name] = alias = _alias(tensor)
                        swapped.append((tensors, name, tensor, alias))
        yield
    finally:
        for tensors, name, tensor, alias in swapped:
            if tensors.get(name) is alias:  # what the module itself replaced meanwhile, as a cache, stays
                tensors[name] = tensor


def _alias(tensor: Tensor) -> Tensor:
    """A normal tensor that shares the memory.

    A subclass is kept: quantized weights consist of several inner tensors.
    """
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
    """Normal tensors in place of inference tensors, also inside a dictionary. They share the memory."""
    if isinstance(values, dict):
        return {name: normal(value) if isinstance(value, Tensor) else value for name, value in values.items()}
    return _alias(values) if values.is_inference() else values


@contextmanager
def gradients(*modules: nn.Module) -> Iterator[None]:
    """Leave inference mode, so that gradients can pass through these modules. Keeps the gradient mode."""
    wanted = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(wanted), normal_weights(*modules):
        yield


def in_current_modes(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Bind the current inference and gradient modes to the function: it runs in them wherever it is called."""
    inference, gradient = torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    def run(*arguments) -> Tensor:
        with torch.inference_mode(inference), torch.set_grad_enabled(gradient):
            return function(*arguments)

    return run


_inside_differentiable_model = False


@contextmanager
def differentiable_model(*models: nn.Module, instead: str = "another model") -> Iterator[None]:
    """Make diffusion models differentiable.

    ComfyUI then uses pure PyTorch kernels and no compiler that reuses memory of the backward pass, and the model may
    update saved tensors in place. Raises GuidanceError, which advises `instead`, if an operation has no gradient.
    """
    global _inside_differentiable_model
    nested = _inside_differentiable_model
    # allow_mutation_on_saved_tensors cannot be nested.
    mutation = nullcontext() if nested else torch.autograd.graph.allow_mutation_on_saved_tensors()
    _inside_differentiable_model = True
    try:
        with (
            switched(comfy.model_management, "in_training", True),
            switched(comfy.cli_args.args, "disable_comfy_compiler", True),
            normal_weights(*models),
            mutation,
        ):
            yield
    except (RuntimeError, NotImplementedError) as error:
        if not NO_GRADIENT.search(str(error)):
            raise
        reason = shorten(str(error), 160, placeholder=" ...")
        raise GuidanceError(
            f"A part of this model has no gradient, which is needed here: choose {instead}. PyTorch: {reason}"
        ) from error
    finally:
        _inside_differentiable_model = nested


NO_GRADIENT = re.compile(
    "no autograd formula|derivative for|does not require grad|does not have a grad_fn|[Ii]nference tensor|"
    "in-?place operation|version counter|its data is not allocated"
)
"""Matches PyTorch's messages about an operation that has no gradient as the model uses it."""


@contextmanager
def switched(holder: Any, name: str, value: object) -> Iterator[None]:
    """Set an attribute of ComfyUI and restore it at the end. An older ComfyUI may lack it: then nothing is set."""
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
    """Whether another node, such as Train LoRA, trains the model. Its predictions must then not be guided."""
    return comfy.model_management.in_training and not _inside_differentiable_model


def models_of(guider) -> list[nn.Module]:
    """All models that a guider holds: the diffusion model, ControlNets, and others."""
    held = chain.from_iterable(value if isinstance(value, list) else [value] for value in vars(guider).values())
    return [each.model for each in held if isinstance(each, comfy.model_patcher.ModelPatcher)]


@contextmanager
def trainable() -> Iterator[None]:
    """Leave inference mode and enable gradients, to train networks."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


@contextmanager
def as_nodes_run() -> Iterator[None]:
    """Enter inference mode, in which ComfyUI runs its nodes."""
    with torch.inference_mode():
        yield


def static_clone(patcher: ModelPatcher, what: str, instead: str) -> ModelPatcher:
    """A clone that is loaded completely, so that gradients can pass through it.

    what: the feature that needs it. Raises GuidanceError, which advises `instead`, if the model cannot be loaded so.
    """
    if patcher.is_dynamic() and getattr(patcher, "cached_patcher_init", None) is None:
        raise GuidanceError(
            f"{what} takes a gradient through the whole model, and its loader cannot load it a second time for that: "
            f"choose {instead}, load it by a loader of ComfyUI's own, or start ComfyUI with --disable-dynamic-vram."
        )
    return patcher.clone(disable_dynamic=True)
