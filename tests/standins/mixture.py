"""Gaussian mixtures, for which the denoiser, every linear tilt and importance-resampled truths are known."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mixture:
    """means (K,d), one std, equal weights unless given as logits (K,)."""

    means: Tensor
    std: float
    logits: Tensor

    @staticmethod
    def ring(modes: int = 8, radius: float = 2.0, std: float = 0.3, dtype=torch.float64) -> "Mixture":
        angle = torch.arange(modes, dtype=dtype) * 2 * torch.pi / modes
        return Mixture(radius * torch.stack([angle.cos(), angle.sin()], 1), std, torch.zeros(modes, dtype=dtype))

    @staticmethod
    def random(modes: int, dims: int, generator: torch.Generator, std: float = 0.5) -> "Mixture":
        draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
        return Mixture(draw(modes, dims), std, draw(modes))

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        chosen = torch.multinomial(self.logits.softmax(0), count, replacement=True, generator=generator)
        noise = torch.randn(count, self.means.shape[1], generator=generator, dtype=self.means.dtype)
        return self.means[chosen] + self.std * noise

    def denoised(self, x: Tensor, process, sigma: float, tilt: Tensor | None = None) -> Tensor:
        """E[x0|x] (B,d) of the data, or of data·exp(tilt·x0): component means weighted by the posterior of the component."""
        a, s2, v = process.scale(sigma), process.noise_std(sigma) ** 2, self.std**2
        tilt = torch.zeros_like(x) if tilt is None else tilt
        total = a * a * v + s2
        residual = x[:, None] - a * self.means
        posterior_mean = self.means + a * v / total * residual
        evidence = -residual.pow(2).sum(-1) / (2 * total) + torch.einsum("bkd,bd->bk", posterior_mean, tilt)
        weights = (self.logits + evidence).softmax(1)
        return torch.einsum("bk,bkd->bd", weights, posterior_mean) + v * s2 / total * tilt


def resample(samples: Tensor, log_weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` draws from the reweighted samples: the truth q ∝ p·exp(log_weights)."""
    return samples[torch.multinomial(log_weights.softmax(0), count, replacement=True, generator=generator)]


def energy_distance(a: Tensor, b: Tensor) -> float:
    """2E|A-B| - E|A-A'| - E|B-B'| with unbiased inner terms; samples (n,d) and (m,d)."""
    within = lambda s: torch.cdist(s, s).sum() / (len(s) * (len(s) - 1))  # noqa: E731
    return float(2 * torch.cdist(a, b).mean() - within(a) - within(b))
