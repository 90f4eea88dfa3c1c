"""Noising processes x = a·x0 + s·ε: their coefficients, and what follows from them.

Everything is algebra that works on floats and on tensors that broadcast against x.
"""

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from .errors import GuidanceError

Number = TypeVar("Number", float, Tensor)
Denoiser = Callable[[Tensor], Tensor]
"""x (B,...) -> D(x, σ) = E[x0|x] (B,...) at a fixed noise level."""


@dataclass(frozen=True)
class Process:
    """x = scale(σ)·x0 + noise_std(σ)·ε with ε ~ N(0, I). σ is the sampler's noise level."""

    highest = math.inf
    """The highest possible noise level."""

    @property
    def name(self) -> str:
        return type(self).__name__

    def scale(self, sigma: Number) -> Number:
        """a(σ), the factor of the data."""
        raise NotImplementedError

    def noise_std(self, sigma: Number) -> Number:
        """s(σ), the standard deviation of the noise."""
        return sigma

    def add_noise(self, clean, noise, sigma):
        """x = a·x0 + s·ε."""
        return self.scale(sigma) * clean + self.noise_std(sigma) * noise

    def posterior_variance(self, sigma, variance=1.0):
        """Var[x0|x] per element for Gaussian data of the given variance v: s²v / (a²v + s²)."""
        noise = self.noise_std(sigma) ** 2
        return noise * variance / (self.scale(sigma) ** 2 * variance + noise)

    def angle(self, sigma):
        """The noise angle atan(s/a) in [0, π/2]: a measure of the noise level that is comparable between processes."""
        noise, scale = self.noise_std(sigma), self.scale(sigma)
        return torch.atan2(noise, scale) if isinstance(sigma, Tensor) else math.atan2(noise, scale)

    def unit(self, x, sigma):
        """x scaled to unit variance, for data of unit variance."""
        return x / (self.scale(sigma) ** 2 + self.noise_std(sigma) ** 2) ** 0.5

    def shift_gain(self, sigma):
        """s²/a. Shifting x by (s²/a)·g tilts the posterior p(x0|x) by exp(g·x0). Also D_q - D = (s²/a)·∇log h."""
        return self.noise_std(sigma) ** 2 / self.scale(sigma)


@dataclass(frozen=True)
class Diffusion(Process):
    """Variance-exploding coordinates x = x0 + σε, in which samplers see EPS, V and EDM models."""

    def scale(self, sigma):
        return sigma * 0 + 1


@dataclass(frozen=True)
class Flow(Process):
    """Straight paths x = (1-σ)·x0 + σ·noise_scale·ε (CONST: SD3, Flux, Wan, Z-Image)."""

    noise_scale: float = 1.0
    highest = 1.0

    @property
    def name(self) -> str:
        return "Flow" if self.noise_scale == 1 else f"Flow {self.noise_scale:g}"

    def scale(self, sigma):
        return 1 - sigma

    def noise_std(self, sigma):
        return self.noise_scale * sigma


@dataclass(frozen=True)
class Spherical(Process):
    """x = cos(σ)·x0 + sin(σ)·ε, σ in [0, π/2]. It preserves unit variance."""

    def scale(self, sigma):
        return sigma.cos() if isinstance(sigma, Tensor) else math.cos(sigma)

    def noise_std(self, sigma):
        return sigma.sin() if isinstance(sigma, Tensor) else math.sin(sigma)


def process_named(name: str) -> Process:
    """The process of this name, such as "Diffusion", "Flow" or "Flow 0.5". Raises GuidanceError if it is unknown."""
    kind, _, scale = name.partition(" ")
    if name == "Diffusion":
        return Diffusion()
    with suppress(ValueError):
        if kind == "Flow" and 0 < (noise_scale := float(scale or 1)) < math.inf:
            return Flow(noise_scale)
    raise GuidanceError(f"This version of the pack does not know the noising process {name[:60]!r}: update the pack.")


def column(values: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B,1,...), which broadcasts against `like`."""
    return values.view(-1, *[1] * (like.ndim - 1))
