"""Batches of noised samples, as training needs them."""

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
    """Noised samples: everything (B,...) alike."""

    clean: Tensor
    x: Tensor
    sigma: Tensor
    """(B,)"""
    denoised: Tensor
    """D(x,σ) of the model."""
    weights: Tensor
    """(B,)"""
    text: Text
    denoise: Denoiser | None = None
    """D at other points, with a graph; for the form `shift`."""
    prompts: Tensor | None = None
    """(B,) the prompt of each, where the source knows it."""


class Source(Protocol):
    """Where batches come from. The same key gives the same batch."""

    def batch(self, size: int, key: tuple[int, ...], part: slice = slice(None)) -> Batch:
        """The chosen part of a batch of `size`."""
        ...


@dataclass(frozen=True)
class LivePairs:
    """Fresh noise for every batch, and a call of the model for its D."""

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


@dataclass(frozen=True)
class StoredPairs:
    """Batches of stored states: no diffusion model is needed, but for forms that ask it elsewhere."""

    samples: Samples
    weights: Tensor
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
        drawn = torch.stack(
            [
                noise(clean.shape[1:], self.seeds[row], level)
                for row, level in zip(rows.tolist(), chosen.tolist(), strict=True)
            ]
        )
        return self.noised(rows, clean, drawn, sigma, samples.denoised[rows, chosen])

    def noised(self, rows: Tensor, clean: Tensor, drawn: Tensor, sigma: Tensor, denoised: Tensor) -> Batch:
        """The samples (B,) with these latents, noise and denoised estimates (B,...), at noise levels (B,)."""
        x, prompts = self.process.add_noise(clean, drawn, column(sigma, clean)), self.samples.prompts[rows]
        clean, x, sigma, denoised, weights = (
            value.to(self.device, torch.float32) for value in (clean, x, sigma, denoised, self.weights[rows])
        )
        ask = self.denoise
        denoise = None if ask is None else lambda point: ask(point, sigma, prompts)
        return Batch(clean, x, sigma, denoised, weights, self.samples.text[prompts].to(self.device), denoise, prompts)


@dataclass(frozen=True)
class FreshPairs(StoredPairs):
    """Fresh noise for every batch, at any noise level of the collection. In place of D stands the clean latent, whose mean D is."""

    def batch(self, size: int, key: tuple[int, ...], part: slice = slice(None)) -> Batch:
        rng = generator(*key)
        samples, levels = self.samples, self.samples.sigma.flatten()
        rows = torch.randint(len(samples.clean), (size,), generator=rng)[part]
        sigma = levels[torch.randint(len(levels), (size,), generator=rng)[part]]
        drawn = torch.randn(size, *samples.clean.shape[1:], generator=rng)[part]
        clean = samples.clean[rows].float()
        return self.noised(rows, clean, drawn, sigma, clean)
