"""A ring of eight Gaussians and a nonlinear reward: q ∝ p·exp(r/β) by resampling, and its denoiser by quadrature."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .mixture import Mixture, resample

RING = Mixture.ring(radius=1.5, std=0.15)
CLOUD = Mixture.random(16, 64, torch.Generator().manual_seed(0))
"""In 64 dimensions, of which the same reward sees the first two."""
VARIANCE = 1.15
"""Per element."""
CENTRE = torch.tensor([1.2, 0.9])


def ring_reward(latents: Tensor) -> Tensor:
    """r = -0.6|x - c|² + 0.5 sin(3 x_1) of the first two numbers of latents (B,...) -> (B,)."""
    point = latents.flatten(1)[:, :2]
    return nearness(point) + 0.5 * torch.sin(3 * point[:, 0])


def nearness(latents: Tensor) -> Tensor:
    """The reward without its ripple."""
    point = latents.flatten(1)[:, :2]
    return -0.6 * (point - CENTRE.to(point)).pow(2).sum(1)


def truth(seed: int, count: int, temperature: float = 1.0, mixture: Mixture = RING) -> Tensor:
    """Samples (count,d) of q, resampled from 400,000 of p."""
    generator = torch.Generator().manual_seed(seed + 1000)
    candidates = mixture.sample(400_000, generator)
    return resample(candidates, ring_reward(candidates) / temperature, count, generator)


@dataclass(frozen=True)
class TiltedRing(Mixture):
    """q itself: D_q by Gauss-Hermite quadrature over the posterior of each component."""

    temperature: float = 1.0

    @staticmethod
    def at(temperature: float) -> "TiltedRing":
        return TiltedRing(RING.means, RING.std, RING.logits, temperature)

    def denoised(self, x, process, sigma, tilt=None):
        logits, means, variance = self.posterior(x, process, sigma)
        nodes, weights = map(torch.from_numpy, np.polynomial.hermite_e.hermegauss(7))
        points = means[:, :, None] + variance[..., None] ** 0.5 * torch.cartesian_prod(nodes, nodes)
        reward = ring_reward(points.flatten(0, 2)).view(points.shape[:3]) / self.temperature
        evidence = logits[..., None] + torch.outer(weights, weights).log().flatten() + reward
        return torch.einsum("bn,bnd->bd", evidence.flatten(1).softmax(1), points.flatten(1, 2))
