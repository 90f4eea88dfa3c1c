"""Inpainting: which part of a latent is sampled, and how guidance affects that part alone."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Inpainting:
    """A mask m (B,...) in [0,1], 1 where to sample, and the latent l (B,...) that is kept elsewhere, in model space.

    The sampler calls the model at m·x + (1-m)·(l with the step's noise), and uses m·D + (1-m)·l as its prediction.
    Guidance that shifts x by d therefore shifts the model's input by m·d, and the reward is evaluated at m·D + (1-m)·l.
    """

    mask: Tensor
    latent: Tensor

    def moved(self, x: Tensor, point: Tensor) -> Tensor:
        """x (B,...), moved to `point` (B,...) by the mask. Bit-identical to x where the mask is 0."""
        return torch.lerp(x, point, self.mask)

    def blended(self, denoised: Tensor) -> Tensor:
        """m·D + (1-m)·l (B,...)."""
        return torch.lerp(self.latent, denoised, self.mask)
