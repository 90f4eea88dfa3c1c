"""What a peer is given: a model to ask through any sampler of ComfyUI, and a reward of its latents through the full VAE."""

from collections.abc import Callable
from dataclasses import dataclass

import comfy.samplers
import torch
from bench.cost.world import World
from comfy.patcher_extension import WrappersMP
from reward_guidance.guidance.process import Process
from reward_guidance.nodes.decoders import Decoder
from reward_guidance.nodes.runtime import LatentReward, differentiable_model, process_of
from torch import Tensor

Denoise = Callable[[Tensor], Tensor]
Change = Callable[[Denoise, Tensor, float], Tensor]
"""(denoise, x, σ) -> the denoised estimate that the sampler goes on with."""


class PlainVAE(Decoder):
    """The full VAE as it is, without checkpoints, as the peers decode."""

    upscale = 8

    def __init__(self, vae, latent_format):
        self.vae, self.latent_format = vae, latent_format
        self.modules = (vae.first_stage_model,)
        self.bytes_per_pixel = 2 * vae.memory_used_decode((1, 1, 1, 1), vae.vae_dtype) // 64

    def pixels(self, latents: Tensor) -> Tensor:
        return (self.vae.first_stage_model.decode(self.latent_format.process_out(latents).to(self.vae.vae_dtype)).float() + 1) / 2


@dataclass(frozen=True)
class Problem:
    world: World
    side: int
    steps: int
    reward: LatentReward

    @property
    def process(self) -> Process:
        return process_of(self.world.model.get_model_object("model_sampling"))

    def sample(self, count: int = 1, steps: int | None = None, change: Change | None = None, function: Callable | None = None, cfg=None) -> Tensor:
        """Latents (count,...) of so many images."""
        model = self.world.model.clone()
        if change is not None:
            model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "peer", changed(change))
        sampler = comfy.samplers.KSAMPLER(function) if function else None
        return self.world.sample(self.world.noise(self.side, count), steps or self.steps, model, sampler, cfg)

    def with_gradient(self, denoise: Denoise, x: Tensor) -> tuple[Tensor, Tensor]:
        """D(x) and r(D(x)), with a graph back to x through the model, which must be within `through_model`."""
        denoised = denoise(x)
        return denoised, self.reward(denoised)

    def through_model(self):
        return differentiable_model(self.world.model.model)


def changed(change: Change) -> Callable:
    def wrapper(executor, x, timestep, model_options=None, seed=None):
        return change(lambda point: executor(point, timestep, model_options or {}, seed), x, float(timestep.flatten()[0]))

    return wrapper


def scores(problem: Problem, latents: Tensor) -> Tensor:
    with torch.no_grad():
        return problem.reward(latents)
