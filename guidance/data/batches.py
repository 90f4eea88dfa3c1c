"""Batches of noised samples for training."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from ..network.unet import Text
from ..process import Denoiser, Process, column
from ..randomness import generator
from .samples import Samples, noise


@dataclass(frozen=True)
class Batch:
    """B noised samples. Tensors are (B,...)."""

    clean: Tensor
    """x0"""
    x: Tensor
    sigma: Tensor
    """Noise levels (B,)."""
    denoised: Tensor
    """The model's D(x, σ)."""
    weights: Tensor
    """Labels (B,) of mean 1 over all samples."""
    text: Text
    denoise: Denoiser | None = None
    """The model's D at other points, with a graph. For the form `shift`."""
    prompts: Tensor | None = None
    """Indices (B,) of the prompts, if the source knows them."""


class Source(Protocol):
    """A source of batches. The same key gives the same batch."""

    def batch(self, size: int, key: tuple[int, ...], part: slice = slice(None)) -> Batch:
        """The chosen part of a batch of `size` rows."""
        ...


@dataclass(frozen=True)
class StoredPairs:
    """Batches of the stored states. The model is needed only by forms that move x."""

    samples: Samples
    weights: Tensor
    """Labels (N,)."""
    process: Process
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    denoise: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    """x (B,...), σ (B,), prompts (B,) -> D (B,...)."""

    @cached_property
    def seeds(self) -> list[int]:
        return self.samples.seeds

    def batch(self, size: int, key: tuple[int, ...], part: slice = slice(None)) -> Batch:
        rng = generator(*key)
        samples, levels = self.samples, self.samples.sigma.shape[1]
        rows = torch.randint(len(samples.clean), (size,), generator=rng)[part]
        chosen = torch.randint(levels, (size,), generator=rng)[part]
        clean, sigma = samples.clean[rows].float(), samples.sigma[rows, chosen]
        states = zip(rows.tolist(), chosen.tolist(), strict=True)
        drawn = torch.stack([noise(clean.shape[1:], self.seeds[row], level) for row, level in states])
        return self.noised(rows, clean, drawn, sigma, samples.denoised[rows, chosen])

    def noised(self, rows: Tensor, clean: Tensor, drawn: Tensor, sigma: Tensor, denoised: Tensor) -> Batch:
        """The batch of these samples (B,), with their latents, noise and D (B,...) at noise levels (B,)."""
        x, prompts = self.process.add_noise(clean, drawn, column(sigma, clean)), self.samples.prompts[rows]
        clean, x, sigma, denoised, weights = (
            value.to(self.device, torch.float32) for value in (clean, x, sigma, denoised, self.weights[rows])
        )
        model = self.denoise
        denoise = None if model is None else lambda point: model(point, sigma, prompts)
        return Batch(clean, x, sigma, denoised, weights, self.samples.text[prompts].to(self.device), denoise, prompts)


@dataclass(frozen=True)
class FreshPairs(StoredPairs):
    """Batches with fresh noise at noise levels of the collection. D is replaced by the clean latent, whose mean it
    is."""

    def batch(self, size: int, key: tuple[int, ...], part: slice = slice(None)) -> Batch:
        rng = generator(*key)
        samples, levels = self.samples, self.samples.sigma.flatten()
        rows = torch.randint(len(samples.clean), (size,), generator=rng)[part]
        sigma = levels[torch.randint(len(levels), (size,), generator=rng)[part]]
        drawn = torch.randn(size, *samples.clean.shape[1:], generator=rng)[part]
        clean = samples.clean[rows].float()
        return self.noised(rows, clean, drawn, sigma, clean)
