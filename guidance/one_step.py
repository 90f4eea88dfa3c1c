"""One-step generators: guidance tilts the initial noise, q(z) ∝ N(z)·exp(r(G(z))/β).

Noise is data with a known denoiser, so a guidance network learns its tilt as it does for any other data. On the
spherical path x = cos(φ)·z + sin(φ)·ε the denoiser is D = cos(φ)·x. With D_q = D + sin(φ)·G, the probability flow from
noise (φ = π/2) to tilted noise (φ = 0) is dx/dφ = -G(x, φ): the network is the velocity, and without guidance noise
does not change.

For a differentiable reward, a network can instead learn a single step z -> z + G(z) by the reward's gradient through
the generator.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .data.batches import Batch
from .data.samples import Rows, Texts
from .network.forms import FORMS
from .network.unet import Text
from .process import Spherical, column
from .randomness import generator

PROCESS = Spherical()


def denoise(x: Tensor, angle: Tensor) -> Tensor:
    """E[z|x] (B,...) of Gaussian noise z, for x (B,...) and noise angles (B,)."""
    return column(angle.cos(), x) * x


@dataclass(frozen=True)
class NoisePairs:
    """Batches of noise z, labelled by the rewards of its pictures. No model is called."""

    noise: Tensor | Rows
    """(N,...)"""
    weights: Tensor
    """Labels (N,)."""
    text: Text | Texts | None = None
    """The conditioning of each sample, or of each prompt if `prompts` is given."""
    prompts: Tensor | None = None
    """Rows (N,) of `text` that belong to the samples."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def batch(self, size: int, key: tuple[int, ...], part: slice = slice(None)) -> Batch:
        rng, device = generator(*key), self.device
        rows = torch.randint(len(self.noise), (size,), generator=rng)[part]
        angle = ((torch.arange(size) + torch.rand(size, generator=rng)) / size * math.pi / 2)[part].to(device)
        noise = torch.randn(size, *self.noise.shape[1:], generator=rng)[part].to(device)
        clean, weights = (values[rows].to(device, torch.float32) for values in (self.noise, self.weights))
        prompts = rows if self.prompts is None else self.prompts[rows]
        text = Text.none(len(rows)) if self.text is None else self.text[prompts]
        x = PROCESS.add_noise(clean, noise, column(angle, clean))
        return Batch(clean, x, angle, denoise(x, angle), weights, text.to(device), prompts=prompts)


@dataclass(frozen=True)
class FreshNoise:
    """Batches of unlabelled new noise z with random prompts. `denoised` is z itself, so that G is the change of z."""

    shape: tuple[int, ...]
    """Shape (C,...) of a latent."""
    text: Texts
    """The conditioning of every prompt."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def batch(self, size: int, key: tuple[int, ...], part: slice = slice(None)) -> Batch:
        rng, device = generator(*key), self.device
        prompts = torch.randint(len(self.text.pooled), (size,), generator=rng)[part]
        noise = torch.randn(size, *self.shape, generator=rng)[part].to(device)
        weights, text = torch.ones(len(noise), device=device), self.text[prompts].to(device)
        return Batch(noise, noise, pure_noise_angle(noise), noise, weights, text, prompts=prompts)


def pure_noise_angle(noise: Tensor) -> Tensor:
    """The noise angle π/2 of pure noise, for each batch row (B,)."""
    return torch.full((len(noise),), math.pi / 2, device=noise.device)


@torch.no_grad()
def tilted_noise(
    network: nn.Module, noise: Tensor, text: Text, steps: int = 4, strength: float = 1.0, form: str = "noise"
) -> Tensor:
    """Noise (B,...) -> tilted noise (B,...).

    The form `leap` takes a single step. Otherwise the network is called `steps` times, at the midpoints of equal arcs.
    """
    if form == "leap":
        return FORMS["leap"](network, PROCESS, lambda x: x, noise, pure_noise_angle(noise), text, strength)
    x, arc = noise, math.pi / 2 / steps
    for step in range(steps):
        angle = torch.full((len(x),), math.pi / 2 - (step + 0.5) * arc, device=x.device)
        x = x + strength * arc * network((x,), angle, text)
    return x
