"""Noising processes x = a·x0 + s·ε, what networks predict about them, and the schedules they come with.

Everything is algebra that works alike on floats and on tensors that broadcast against x.
"""

import math
from bisect import bisect_left
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from .errors import GuidanceError

Number = TypeVar("Number", float, Tensor)
Denoiser = Callable[[Tensor], Tensor]
"""x (B,...) -> D(x, σ) = E[x0|x] (B,...) at a fixed noise level."""


@dataclass(frozen=True)
class Process:
    """x = scale(σ)·x0 + noise_std(σ)·ε with ε ~ N(0, I); σ is the sampler's noise level."""

    highest = math.inf
    """The highest noise level there is."""

    @property
    def name(self) -> str:
        return type(self).__name__

    def scale(self, sigma: Number) -> Number:
        raise NotImplementedError

    def noise_std(self, sigma: Number) -> Number:
        return sigma

    def add_noise(self, clean, noise, sigma):
        return self.scale(sigma) * clean + self.noise_std(sigma) * noise

    def noise(self, x, denoised, sigma):
        """E[ε|x]."""
        return (x - self.scale(sigma) * denoised) / self.noise_std(sigma)

    def score(self, x, denoised, sigma):
        """∇log p_σ(x) by Tweedie's formula."""
        return (self.scale(sigma) * denoised - x) / self.noise_std(sigma) ** 2

    def denoised_from_score(self, x, score, sigma):
        return (x + self.noise_std(sigma) ** 2 * score) / self.scale(sigma)

    def velocity(self, x, denoised, sigma):
        """dx/dσ of the probability-flow ODE, the same (x - D)/σ for diffusion and flow."""
        return (x - denoised) / sigma

    def denoised_from_velocity(self, x, velocity, sigma):
        return x - sigma * velocity

    def posterior_variance(self, sigma, variance=1.0):
        """Var[x0|x] per element for Gaussian data of that variance: s²v / (a²v + s²)."""
        noise = self.noise_std(sigma) ** 2
        return noise * variance / (self.scale(sigma) ** 2 * variance + noise)

    def angle(self, sigma):
        """atan(noise/signal) in [0, π/2], a measure of the noise level that means the same for every process."""
        noise, scale = self.noise_std(sigma), self.scale(sigma)
        return torch.atan2(noise, scale) if isinstance(sigma, Tensor) else math.atan2(noise, scale)

    def unit(self, x, sigma):
        """x at about unit variance, for data of unit variance."""
        return x / (self.scale(sigma) ** 2 + self.noise_std(sigma) ** 2) ** 0.5

    def shift_gain(self, sigma):
        """s²/a: moving x by shift_gain·g tilts the posterior p(x0|x) by exp(g·x0); also D_q - D per unit of ∇log h."""
        return self.noise_std(sigma) ** 2 / self.scale(sigma)

    def tilt_velocity(self, velocity, gradient, sigma):
        """v_q = v_p - (s²/(aσ))·∇log h, which is σ/(1-σ)·∇log h for flow models."""
        return velocity - self.shift_gain(sigma) / sigma * gradient


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
    """x = cos(σ)·x0 + sin(σ)·ε, σ in [0, π/2]: noise and data of unit variance mix without a change of scale."""

    def scale(self, sigma):
        return sigma.cos() if isinstance(sigma, Tensor) else math.cos(sigma)

    def noise_std(self, sigma):
        return sigma.sin() if isinstance(sigma, Tensor) else math.sin(sigma)

    def velocity(self, x, denoised, sigma):
        """dx/dσ = (cos(σ)·x - D)/sin(σ)."""
        return (self.scale(sigma) * x - denoised) / self.noise_std(sigma)

    def denoised_from_velocity(self, x, velocity, sigma):
        return self.scale(sigma) * x - self.noise_std(sigma) * velocity

    def tilt_velocity(self, velocity, gradient, sigma):
        return velocity - self.shift_gain(sigma) / self.noise_std(sigma) * gradient


def process_named(name: str) -> Process:
    """The process of a model by its name. Raises GuidanceError for one that is not known."""
    kind, _, scale = name.partition(" ")
    if name == "Diffusion":
        return Diffusion()
    with suppress(ValueError):
        if kind == "Flow" and 0 < (noise_scale := float(scale or 1)) < math.inf:
            return Flow(noise_scale)
    raise GuidanceError(f"This version of the pack knows no noising process {name[:60]!r}: update the pack.")


@dataclass(frozen=True)
class Parameterization:
    """What a network predicts, as D = skip(σ)·x + gain(σ)·output."""

    sigma_data: float = 1.0

    def skip(self, sigma):
        return sigma * 0 + 1

    def gain(self, sigma):
        raise NotImplementedError

    def denoised(self, x, output, sigma):
        return self.skip(sigma) * x + self.gain(sigma) * output

    def output(self, x, denoised, sigma):
        return (denoised - self.skip(sigma) * x) / self.gain(sigma)


@dataclass(frozen=True)
class NoisePrediction(Parameterization):
    """EPS; with straight paths the same formula reads velocity prediction (CONST)."""

    def gain(self, sigma):
        return -sigma


@dataclass(frozen=True)
class VPrediction(Parameterization):
    """V, arXiv 2202.00512, in variance-exploding coordinates."""

    def skip(self, sigma):
        return self.sigma_data**2 / (sigma**2 + self.sigma_data**2)

    def gain(self, sigma):
        return -sigma * self.sigma_data / (sigma**2 + self.sigma_data**2) ** 0.5


@dataclass(frozen=True)
class EDMPrediction(VPrediction):
    """EDM, arXiv 2206.00364: V with the output's sign reversed."""

    def gain(self, sigma):
        return -super().gain(sigma)


@dataclass(frozen=True)
class Schedule:
    """Noise level as a function of time in [0, 1], 0 clean and 1 noise. Percent runs the other way."""

    def sigma(self, time: float) -> float:
        raise NotImplementedError

    def time(self, sigma: float) -> float:
        raise NotImplementedError

    def percent_to_sigma(self, percent: float) -> float:
        return self.sigma(1 - min(max(percent, 0.0), 1.0))


@dataclass(frozen=True)
class ShiftedFlow(Schedule):
    """σ = αt / (1 + (α-1)t): SD3 has α = 3, Wan 8, schnell 1; arXiv 2403.03206, equation 23."""

    shift: float = 1.0

    def sigma(self, time):
        return self.shift * time / (1 + (self.shift - 1) * time)

    def time(self, sigma):
        return sigma / (self.shift - (self.shift - 1) * sigma)


def flux_schedule(mu: float) -> ShiftedFlow:
    """Flux states its shift by the logarithm: σ = e^μ / (e^μ + 1/t - 1)."""
    return ShiftedFlow(shift=math.exp(mu))


def scaled_linear_sigmas(steps: int = 1000, first: float = 0.00085, last: float = 0.012) -> tuple[float, ...]:
    """σ of Stable Diffusion's discrete schedule, β linear in its square root, from cleanest to noisiest."""
    betas = torch.linspace(first**0.5, last**0.5, steps, dtype=torch.float64) ** 2
    kept = torch.cumprod(1 - betas, dim=0)
    return tuple(((1 - kept) / kept).sqrt().tolist())


@dataclass(frozen=True)
class Discrete(Schedule):
    """A table of rising σ, interpolated in log σ."""

    sigmas: tuple[float, ...] = field(default_factory=scaled_linear_sigmas)

    def sigma(self, time):
        position = time * (len(self.sigmas) - 1)
        low = min(int(position), len(self.sigmas) - 2)
        return self.sigmas[low] * (self.sigmas[low + 1] / self.sigmas[low]) ** (position - low)

    def time(self, sigma):
        low = min(max(bisect_left(self.sigmas, sigma) - 1, 0), len(self.sigmas) - 2)
        step = math.log(self.sigmas[low + 1] / self.sigmas[low])
        return (low + math.log(sigma / self.sigmas[low]) / step) / (len(self.sigmas) - 1)


@dataclass(frozen=True)
class LogLinear(Schedule):
    """Continuous EDM and V models: log σ linear in time."""

    sigma_min: float = 0.002
    sigma_max: float = 120.0

    def sigma(self, time):
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** time

    def time(self, sigma):
        return math.log(sigma / self.sigma_min) / math.log(self.sigma_max / self.sigma_min)


def column(values: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B,1,...) that broadcasts against `like`."""
    return values.view(-1, *[1] * (like.ndim - 1))
