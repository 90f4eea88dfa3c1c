"""What a peer is given: a model to ask through any sampler of ComfyUI, and a reward of its latents."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from reward_guidance.guidance.process import Process
from reward_guidance.nodes.wiring.autograd import differentiable_model, gradients
from reward_guidance.nodes.wiring.latent_reward import LatentReward
from reward_guidance.nodes.wiring.model_info import process_of
from reward_guidance.nodes.wiring.vae_decoder import Decoder
from torch import Tensor, nn

Denoise = Callable[[Tensor], Tensor]
Change = Callable[[Denoise, Tensor, float], Tensor]
"""(denoise, x, σ) -> the denoised estimate that the sampler goes on with."""
Draw = Callable[[ModelPatcher, comfy.samplers.KSAMPLER | None, int], Tensor]
"""(model, sampler or the usual one, number) -> latents, so many for each picture."""


class PlainVAE(Decoder):
    """The full VAE as it is, without checkpoints, as the peers decode."""

    upscale = 8

    def __init__(self, vae, latent_format):
        self.vae, self.latent_format = vae, latent_format
        self.modules = (vae.first_stage_model,)
        self.bytes_per_pixel = 2 * vae.memory_used_decode((1,) * (vae.latent_dim + 2), vae.vae_dtype) // 64

    def pixels(self, latents: Tensor) -> Tensor:
        shaped = self.latent_format.process_out(latents.unsqueeze(2) if self.vae.latent_dim == 3 else latents)
        pixels = (self.vae.first_stage_model.decode(shaped.to(self.vae.vae_dtype)).float() + 1) / 2
        return pixels[:, :, -1] if pixels.ndim == 5 else pixels


@dataclass(frozen=True)
class Problem:
    model: ModelPatcher
    reward: LatentReward
    draw: Draw

    @property
    def process(self) -> Process:
        return process_of(self.model.get_model_object("model_sampling"), (1, 1))

    def sample(self, count: int = 1, change: Change | None = None, function: Callable | None = None) -> Tensor:
        """Latents; of each picture so many. `function` samples in place of the usual sampler's."""
        model = self.model.clone()
        if change is not None:
            model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "peer", changed(change))
        return self.draw(model, comfy.samplers.KSAMPLER(function) if function else None, count)

    @contextmanager
    def gradient(self, *through: nn.Module) -> Iterator[None]:
        """Inside, gradients flow through the reward, and through these models."""
        with gradients(*self.reward.modules), differentiable_model(*through), torch.enable_grad():
            yield

    def with_gradient(self, denoise: Denoise, x: Tensor) -> tuple[Tensor, Tensor]:
        """D(x) and r(D(x)), with a graph back to x through the model, which must be within `gradient`."""
        denoised = denoise(x)
        return denoised, self.reward(denoised)

    def scores(self, latents: Tensor) -> Tensor:
        with torch.no_grad():
            return self.reward(latents.to(self.model.load_device))


def changed(change: Change) -> Callable:
    def wrapper(executor, x, timestep, model_options=None, seed=None):
        return change(
            lambda point: executor(point, timestep, model_options or {}, seed), x, float(timestep.flatten()[0])
        )

    return wrapper


def norm(samples: Tensor) -> Tensor:
    """Of each sample (B,...), as (B,1,...)."""
    return torch.linalg.vector_norm(samples, dim=tuple(range(1, samples.ndim)), keepdim=True)
