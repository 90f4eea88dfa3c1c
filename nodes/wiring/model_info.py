"""Facts about a MODEL and a CONDITIONING: noising process, model family, file name, text tensors."""

import os
from collections.abc import Sequence

import comfy.model_patcher
import comfy.model_sampling
import comfy.sampler_helpers
import torch
from comfy.patcher_extension import WrappersMP

from ...guidance.errors import GuidanceError
from ...guidance.network.card import Base
from ...guidance.network.unet import Text
from ...guidance.process import Diffusion, Flow, Process

GRADIENT_KEY = "reward_guidance.gradient."


def process_of(model_sampling, shape: Sequence[int]) -> Process:
    """The noising process of a model for latents of this shape (B,C,...)."""
    require_noise_to_picture(model_sampling)
    if isinstance(model_sampling, comfy.model_sampling.CONST):
        pure = model_sampling.noise_scaling(torch.ones(()), torch.ones(tuple(shape)), torch.zeros(tuple(shape)))
        return Flow(noise_scale=float(pure.flatten()[0]))
    return Diffusion()


def require_noise_to_picture(model_sampling) -> None:
    """Raise GuidanceError for models that start from an image instead of noise."""
    if any(kind.__name__.startswith("IMG_TO_IMG") for kind in type(model_sampling).__mro__):
        raise GuidanceError("Reward guidance needs a model that denoises from noise; this one maps picture to picture.")


NOMINAL = 64
"""Side of a latent if the size does not matter."""


def base_of(model: comfy.model_patcher.ModelPatcher, target: str = "data", shape: Sequence[int] = ()) -> Base:
    """The base that samples of a model belong to. shape: (C,...) of a latent; the noise scale may depend on it."""
    latents = model.get_model_object("latent_format")
    size = (1,) * (latents.latent_dimensions - 2) + (NOMINAL, NOMINAL)
    process = process_of(model.get_model_object("model_sampling"), (1, *(shape or (latents.latent_channels, *size))))
    return Base(
        type(model.model.model_config).__name__, type(latents).__name__, latents.latent_channels, process.name, target
    )


def name_of(model: comfy.model_patcher.ModelPatcher) -> str:
    """The model's file, and the number and strength of its patches, such as those of a LoRA."""
    loading = getattr(model, "cached_patcher_init", None)
    file = os.path.basename(str(loading[1][0])) if loading else type(model.model).__name__
    strengths = [patch[0] for patches in model.patches.values() for patch in patches]
    return f"{file} with {len(strengths)} patches of strength {sum(strengths):g}" if strengths else file


def require_unguided(model: comfy.model_patcher.ModelPatcher) -> None:
    """Raise GuidanceError for a model with Reward Guidance, whose predictions depend on earlier steps."""
    if any(key.startswith(GRADIENT_KEY) for key in model.wrappers.get(WrappersMP.PREDICT_NOISE, {})):
        raise GuidanceError("Samples are collected from the model itself: connect it before Reward Guidance.")


def text_of(conditions: Sequence[dict]) -> Text:
    """The tokens (B,T,E) and the pooled text (B,P) of the first condition of a guider; width 0 if there are none."""
    first = conditions[0] if conditions else {}
    tokens, pooled = first.get("cross_attn"), first.get("pooled_output")
    batch = next((len(part) for part in (tokens, pooled) if part is not None), 1)
    none = Text.none(batch)
    return Text(none.tokens if tokens is None else tokens, none.pooled if pooled is None else pooled)


def text_of_conditioning(conditioning: list) -> Text:
    """The tokens (B,T,E) and the pooled text (B,P) of a CONDITIONING."""
    return text_of(comfy.sampler_helpers.convert_cond(conditioning))
