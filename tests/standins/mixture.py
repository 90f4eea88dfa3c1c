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

    def posterior(self, x: Tensor, process, sigma: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (B,K) of the component behind x (B,d), and mean (B,K,d) and variance (B or 1,1,1) of x0 in it; sigma a number or (B,)."""
        level = torch.as_tensor(sigma, dtype=self.means.dtype, device=self.means.device).reshape(-1, 1, 1)
        a, s2, v = process.scale(level), process.noise_std(level) ** 2, self.std**2
        total = a * a * v + s2
        residual = x[:, None] - a * self.means
        logits = self.logits - residual.pow(2).sum(-1) / (2 * total[..., 0])
        return logits, self.means + a * v / total * residual, v * s2 / total

    def denoised(self, x: Tensor, process, sigma: float | Tensor, tilt: Tensor | None = None) -> Tensor:
        """E[x0|x] (B,d) of the data, or of data·exp(tilt·x0): component means weighted by the posterior of the component."""
        logits, means, variance = self.posterior(x, process, sigma)
        tilt = torch.zeros_like(x) if tilt is None else tilt
        weights = (logits + torch.einsum("bkd,bd->bk", means, tilt)).softmax(1)
        return torch.einsum("bk,bkd->bd", weights, means) + variance[..., 0] * tilt


def resample(samples: Tensor, log_weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` draws from the reweighted samples: the truth q ∝ p·exp(log_weights)."""
    return samples[torch.multinomial(log_weights.softmax(0), count, replacement=True, generator=generator)]


def energy_distance(a: Tensor, b: Tensor) -> float:
    """2E|A-B| - E|A-A'| - E|B-B'| with unbiased inner terms; samples (n,d) and (m,d)."""
    within = lambda s: torch.cdist(s, s).sum() / (len(s) * (len(s) - 1))  # noqa: E731
    return float(2 * torch.cdist(a, b).mean() - within(a) - within(b))
