"""Samplers that keep a part of the latent, as the model and the reward see them."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Inpainting:
    """A mask m (B,...) in [0,1], the share that is sampled, and the latent l (B,...) that is kept for the rest, in the model's space.

    The sampler gives the model m·x + (1-m)·(l with the step's noise), and takes m·D + (1-m)·l for its answer. Guidance that moves x by d
    therefore moves the model's input by m·d, and the reward of the picture is that of m·D + (1-m)·l.
    """

    mask: Tensor
    latent: Tensor

    def moved(self, x: Tensor, point: Tensor) -> Tensor:
        """The model's input x (B,...), moved to `point` (B,...) by the share that is sampled; bit-identical to x where the mask is 0."""
        return torch.lerp(x, point, self.mask)

    def blended(self, denoised: Tensor) -> Tensor:
        """D (B,...) with what is kept in its place."""
        return torch.lerp(self.latent, denoised, self.mask)
