"""Smoothing: the reward's gradient is averaged over points around the denoised estimate."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import GuidanceError


@dataclass(frozen=True)
class Smoothing:
    """k points D + radius·s·ξ, with s the posterior's standard deviation. k = 0 is the plain gradient at D."""

    samples: int = 0
    """k"""
    radius: float = 1.0
    """Distance of the points, in standard deviations of the posterior."""
    grid: int = 4
    """Side of the random pattern that is upsampled to ξ, or 0 for white noise. Low-pass noise is closer to pictures."""

    def __post_init__(self):
        if self.samples < 0 or self.grid < 0 or not 0 <= self.radius < math.inf:
            raise GuidanceError(
                "Smoothing needs points, a radius and a grid of at least 0, "
                f"not {self.samples}, {self.radius} and {self.grid}."
            )

    def offsets(self, like: Tensor, std: float, generator: torch.Generator) -> list[Tensor]:
        """k random offsets radius·std·ξ of the shape of `like` (B,C,...), drawn from a CPU generator."""
        if self.samples == 0 or self.radius == 0:
            return [torch.zeros_like(like)]
        return [self.radius * std * self.noise(like, generator) for _ in range(self.samples)]

    def noise(self, like: Tensor, generator: torch.Generator) -> Tensor:
        """ξ of unit variance, with the shape, type and device of `like` (B,C,...)."""
        if not self.grid or like.ndim < 4 or max(like.shape[-2:]) <= self.grid:
            return torch.randn(like.shape, generator=generator).to(like, non_blocking=True)
        return low_pass_noise(like.shape, self.grid, generator, like.device).to(like)


def low_pass_noise(
    shape: torch.Size, grid: int, generator: torch.Generator, device: torch.device | None = None
) -> Tensor:
    """Noise of unit variance and the given shape (B,C,...,H,W): a grid×grid Gaussian pattern, upsampled bicubically."""
    coarse = torch.randn((1, shape[:-2].numel(), grid, grid), generator=generator).to(device, non_blocking=True)
    fine = F.interpolate(coarse, size=shape[-2:], mode="bicubic", align_corners=False)
    return (fine / fine.std()).view(shape)
