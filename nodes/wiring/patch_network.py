"""Patches a MODEL, or the initial noise, with a guidance network."""

from dataclasses import dataclass, replace

import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.utils
import torch
from torch import Tensor

from ...guidance.errors import GuidanceError
from ...guidance.estimators import Estimator
from ...guidance.network.forms import FORMS
from ...guidance.network.unet import Text
from ...guidance.one_step import tilted_noise
from ...guidance.process import column
from .autograd import gradients, in_current_modes
from .hooks import SamplerHooks, SamplingRun, require_order, serial_numbers
from .latents import samples_of
from .loaded import LoadedNetwork
from .model_info import base_of, process_of, text_of, text_of_conditioning
from .sampling import Sampling


def text_for(loaded: LoadedNetwork, text: Text, like: Tensor) -> Text:
    """The text tensors for a network and latents `like` (B,...). Raises GuidanceError if their width does not fit."""
    wanted = loaded.network.architecture

    def part(tensor: Tensor, width: int) -> Tensor:
        if width and tensor.shape[-1] not in (0, width):
            family = loaded.card.base.model
            raise GuidanceError(
                f"This guidance network was made for {family} and text of {width} channels, "
                f"but the conditioning has {tensor.shape[-1]}."
            )
        known = tensor if tensor.shape[-1] == width else tensor.new_zeros(*tensor.shape[:-1], width)
        return comfy.utils.repeat_to_batch_size(known, len(like))

    return Text(part(text.tokens, wanted.tokens), part(text.pooled, wanted.pooled)).to(like.device)


@dataclass(frozen=True, eq=False)
class NetworkGuidance(SamplerHooks):
    """Guidance of one model by a trained network."""

    loaded: LoadedNetwork
    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self):
        require_order(self.start, self.end)

    def attach(self, model: comfy.model_patcher.ModelPatcher) -> comfy.model_patcher.ModelPatcher:
        """A guided clone of the model; the model itself if the strength or the interval is 0.

        Raises GuidanceError if the network was trained for another kind of model.
        """
        self.loaded.require("data", "Guided Noise or KSampler (Guidance Network)")
        self.loaded.card.base.require(base_of(model, shape=self.loaded.card.shape), "guidance network")
        if self.strength == 0 or self.start == self.end:
            return model
        patched = model.clone()
        key = f"reward_guidance.network.{next(serial_numbers)}"
        self.hook(patched, key)
        patched.set_additional_models(key, [self.loaded.patcher])
        return patched

    def begin(self, guider, shape, model_options, seed):
        sampling = guider.inner_model.model_sampling
        bounds = {
            "first_sigma": sampling.percent_to_sigma(self.start),
            "last_sigma": sampling.percent_to_sigma(self.end),
        }
        return SamplingRun(process=process_of(sampling, shape), **bounds)

    def predict(self, run, guider, executor, x, timestep, model_options, seed):
        form, process = FORMS[self.loaded.card.form], run.process

        def denoise(point: Tensor) -> Tensor:
            return executor(run.moved(x, point), timestep, model_options, seed)

        active = run.active(timestep)  # a batch may have several noise levels, as in Collect Guidance Data
        if self.loaded.card.form == "potential":
            active &= (process.scale(timestep) >= Estimator.min_scale).all()
        if not active.any():
            return executor(x, timestep, model_options, seed)
        text = text_for(self.loaded, text_of(guider.conds.get("positive", ())), x)
        plain_denoise = in_current_modes(denoise)
        with gradients(self.loaded.network):
            strength = self.strength * column(active.to(x), x)
            return form(self.loaded.network, process, plain_denoise, x.clone(), timestep.clone(), text, strength)


def tilt_noise(
    loaded: LoadedNetwork, noise: Tensor, conditioning: list, steps: int, strength: float, mask: Tensor | None = None
) -> Tensor:
    """Noise (B,...) -> noise from which a one-step generator makes pictures with a higher reward.

    Device and dtype stay the same. steps: calls of the network. mask: the noise mask of a LATENT; where it keeps the
    latent, the noise stays unchanged.
    Raises GuidanceError if the network was trained for another kind of model or for data.
    """
    loaded.require("noise", "Apply Guidance Network")
    if noise.shape[1] != loaded.card.base.channels:
        raise GuidanceError(
            f"This guidance network was made for {loaded.card.base.model} with {loaded.card.base.channels} latent "
            f"channels, not {noise.shape[1]}."
        )
    if strength == 0:
        return noise
    comfy.model_management.load_models_gpu([loaded.patcher])
    moved = noise.to(loaded.patcher.load_device, torch.float32)
    text = text_for(loaded, text_of_conditioning(conditioning), moved)
    tilted = tilted_noise(loaded.network, moved, text, steps, strength, loaded.card.form).to(noise)
    return tilted if mask is None else torch.lerp(noise, tilted, comfy.utils.reshape_mask(mask, noise.shape).to(noise))


def guided_sampling(
    sampling: Sampling,
    network: LoadedNetwork,
    strength: float = 1.0,
    start: float = 0.0,
    end: float = 1.0,
    noise_steps: int = 4,
) -> Sampling:
    """A copy of the sampling that a network guides: its model calls or its initial noise, by the network's target."""
    if network.card.base.target == "data":
        return replace(sampling, model=NetworkGuidance(network, strength, start, end).attach(sampling.model))
    network.card.base.require(base_of(sampling.model, "noise", network.card.shape), "guidance network")
    return replace(
        sampling,
        tilt_noise=lambda noise, mask: tilt_noise(network, noise, sampling.positive, noise_steps, strength, mask),
    )


@dataclass(frozen=True)
class GuidedNoise:
    """The value of a NOISE link: noise that a network tilts."""

    network: LoadedNetwork
    conditioning: list
    seed: int
    steps: int
    strength: float

    def generate_noise(self, input_latent: dict) -> Tensor:
        noise = comfy.sample.prepare_noise(samples_of(input_latent), self.seed, input_latent.get("batch_index"))
        mask = input_latent.get("noise_mask")
        return tilt_noise(self.network, noise, self.conditioning, self.steps, self.strength, mask)
