"""A Gaussian mixture as a ComfyUI MODEL, so that the real sampler path can be held against closed forms."""

from collections.abc import Callable

import comfy.latent_formats
import comfy.model_base
import comfy.model_patcher
import comfy.sample
import comfy.supported_models_base
import torch
from comfy.model_base import ModelType
from torch import Tensor, nn

from ...guidance.process import Diffusion, Flow
from .mixture import Mixture

CONDITION = [[torch.zeros(1, 1, 1), {}]]
"""An empty conditioning."""
CLOUD = Mixture.random(6, 48, torch.Generator().manual_seed(0))
"""48 numbers: with fewer than 16, PyTorch draws noise another way."""
STEPS = 6


class PlainReward:
    """A function of latents (B,...) -> (B,) that stands where a decoded reward stands."""

    modules: list = []
    patchers: list = []

    def __init__(self, function: Callable[[Tensor], Tensor]):
        self.function = function

    def __call__(self, latents: Tensor) -> Tensor:
        return self.function(latents)

    def activation_bytes(self, shape: torch.Size) -> int:
        return 0


class PlainLatents(comfy.latent_formats.LatentFormat):
    """Latents that are the data itself."""

    scale_factor = 1.0

    def __init__(self, channels: int):
        self.latent_channels = channels


class MixtureNetwork(nn.Module):
    """Predicts the exact velocity (FLOW) or noise (EPS) of mixture data (B,d,1,1). Counts its calls."""

    def __init__(self, mixture, process, sigma_of):
        super().__init__()
        self.mixture, self.process, self.sigma_of = mixture, process, sigma_of
        self.calls = 0
        self.dtype = torch.float32

    def forward(self, x: Tensor, timestep: Tensor, **_) -> Tensor:
        self.calls += 1
        levels = self.sigma_of(timestep)
        if (levels == levels[0]).all():
            return self.answer(x, float(levels[0]))
        return torch.cat([self.answer(*each) for each in zip(x.split(1), levels.tolist(), strict=True)])

    def answer(self, x: Tensor, sigma: float) -> Tensor:
        point = x.flatten(1).to(self.mixture.means)
        if self.process.scale(sigma) == 1:
            point = point * (sigma**2 + 1) ** 0.5
        denoised = self.mixture.denoised(point, self.process, sigma)
        return ((point - denoised) / sigma).view_as(x).to(x)


def analytic_model(mixture: Mixture, flow: bool = True, shift: float = 3.0) -> comfy.model_patcher.ModelPatcher:
    """A flow model with this shift, or a diffusion model, whose denoised estimate is exact."""
    config = comfy.supported_models_base.BASE({"disable_unet_model_creation": True})
    config.latent_format = PlainLatents(mixture.means.shape[1])
    config.sampling_settings = {"shift": shift} if flow else {}
    config.memory_usage_factor = 1.0
    model = comfy.model_base.BaseModel(config, ModelType.FLOW if flow else ModelType.EPS)
    sampling = model.model_sampling
    sigma_of = (lambda t: t / sampling.multiplier) if flow else sampling.sigma
    model.diffusion_model = MixtureNetwork(mixture, Flow() if flow else Diffusion(), sigma_of)
    return comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


@torch.inference_mode()
def sample(
    model: comfy.model_patcher.ModelPatcher,
    sampler: str = "euler",
    scheduler: str = "simple",
    *,
    steps: int = STEPS,
    count: int = 8,
    latent: Tensor | None = None,
    seed: int = 3,
    cfg: float = 1.0,
    condition: list = CONDITION,
    **options,
) -> Tensor:
    """What the stock KSampler makes of a latent (B,C,H,W), or of `count` empty ones. options: of comfy.sample.sample"""
    latent = torch.zeros(count, model.model.latent_format.latent_channels, 1, 1) if latent is None else latent
    noise = comfy.sample.prepare_noise(latent, seed)
    arguments = (steps, cfg, sampler, scheduler, condition, CONDITION, latent)
    return comfy.sample.sample(model, noise, *arguments, seed=seed, disable_pbar=True, **options)
