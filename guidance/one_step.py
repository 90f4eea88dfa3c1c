"""One-step generators: instead of the picture, the noise it begins with is tilted, q(z) ∝ N(z)·exp(r(G(z))/β).

Noise is data whose denoiser is known, so the guidance network learns its tilt as it learns any other. On the spherical path
x = cos(φ)·z + sin(φ)·ε the denoiser is D = cos(φ)·x, and with D_q = D + sin(φ)·G the probability flow from noise (φ = π/2) to tilted
noise (φ = 0) is simply dx/dφ = -G(x, φ): the network is the velocity, and without one, noise stays what it is.

Where the reward has a gradient, a network may learn instead to move noise in one leap, z -> z + G(z), by that gradient through the generator.
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
    """E[z|x] of Gaussian noise z; x (B,...), angle (B,)."""
    return column(angle.cos(), x) * x


@dataclass(frozen=True)
class NoisePairs:
    """Batches of noise z (N,...) that is labelled by the pictures made from it; no model is called."""

    noise: Tensor | Rows
    weights: Tensor
    text: Text | Texts | None = None
    """(N,...), or of each prompt."""
    prompts: Tensor | None = None
    """(N,) the row of `text` that belongs to each; without, its own."""
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
    """Batches of new noise z, each for a prompt drawn at random; nothing is labelled. Its denoised estimate is called z itself: G is Δz."""

    shape: tuple[int, ...]
    """Of a latent (C,...)."""
    text: Texts
    """Of every prompt."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def batch(self, size: int, key: tuple[int, ...], part: slice = slice(None)) -> Batch:
        rng, device = generator(*key), self.device
        prompts = torch.randint(len(self.text.pooled), (size,), generator=rng)[part]
        noise = torch.randn(size, *self.shape, generator=rng)[part].to(device)
        return Batch(
            noise,
            noise,
            pure(noise),
            noise,
            torch.ones(len(noise), device=device),
            self.text[prompts].to(device),
            prompts=prompts,
        )


def pure(noise: Tensor) -> Tensor:
    """The angle of nothing but noise, for each sample (B,)."""
    return torch.full((len(noise),), math.pi / 2, device=noise.device)


@torch.no_grad()
def tilted_noise(
    network: nn.Module, noise: Tensor, text: Text, steps: int = 4, strength: float = 1.0, form: str = "noise"
) -> Tensor:
    """Noise (B,...) -> noise whose pictures are rewarded: in one leap, or by `steps` calls of the network at the middles of as many arcs."""
    if form == "leap":
        return FORMS["leap"](network, PROCESS, lambda x: x, noise, pure(noise), text, strength)
    x, arc = noise, math.pi / 2 / steps
    for step in range(steps):
        angle = torch.full((len(x),), math.pi / 2 - (step + 0.5) * arc, device=x.device)
        x = x + strength * arc * network((x,), angle, text)
    return x
