"""A source of training batches that calls the model for every batch, for models that cost nothing."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from reward_guidance.guidance.data.batches import Batch
from reward_guidance.guidance.network.unet import Text
from reward_guidance.guidance.process import Process, column
from reward_guidance.guidance.randomness import generator
from torch import Tensor


@dataclass(frozen=True)
class LivePairs:
    """Batches with fresh noise, whose D is one model call each."""

    clean: Tensor
    weights: Tensor
    process: Process
    denoise: Callable[[Tensor, Tensor, Text], Tensor]
    """x (B,...), σ (B,), text -> D (B,...)."""
    sigma: Callable[[Tensor], Tensor]
    """Times in [0,1], 1 noise -> noise levels."""
    text: Text | None = None

    def batch(self, size: int, key: tuple[int, ...], part: slice = slice(None)) -> Batch:
        rng = generator(*key)
        rows = torch.randint(len(self.clean), (size,), generator=rng)[part]
        sigma = self.sigma((torch.arange(size) + torch.rand(size, generator=rng)) / size)[part]
        noise = torch.randn(size, *self.clean.shape[1:], generator=rng)[part]
        clean = self.clean[rows]
        text = Text.none(len(rows)) if self.text is None else self.text[rows]
        x = self.process.add_noise(clean, noise.to(clean), column(sigma, clean))
        denoise = lambda point: self.denoise(point, sigma, text)  # noqa: E731
        with torch.no_grad():
            denoised = denoise(x)
        return Batch(clean, x, sigma, denoised, self.weights[rows], text, denoise)
