"""Labelled samples and their noised states, in memory or on disk."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..network.unet import Text
from ..process import Process, column
from ..randomness import generator
from ..tensors import Stored, is_finite, not_finite
from .description import Description


@dataclass(frozen=True)
class Sample:
    """One sample as it is stored: R scores, and D at K noise levels."""

    clean: Tensor
    """The clean latent (C,...) in model space."""
    scores: Tensor
    """Raw scores (R,), one per reward."""
    sigma: Tensor
    """Noise levels (K,)."""
    denoised: Tensor
    """The model's D (K,C,...) of the noised states."""


def noise(shape: Sequence[int], seed: int, level: int) -> Tensor:
    """The noise of one noised state of a sample, drawn from the sample's seed and the index of the state."""
    return torch.randn(tuple(shape), generator=generator(seed, level))


def states(
    clean: Tensor,
    scores: Tensor,
    seeds: Sequence[int],
    sigmas: Tensor,
    process: Process,
    denoise: Callable[[Tensor, Tensor], Tensor],
) -> list[Sample]:
    """Samples of clean latents (N,C,...) with scores (N,R), noised to levels σ (N,K).

    denoise: x (N,C,...), σ (N,) -> the model's D (N,C,...). Latents are rounded to half precision first, so that
    training draws the same noised states from the stored latents.
    """
    clean = half(clean.cpu()).float()
    denoised = []
    for level, sigma in enumerate(sigmas.unbind(1)):
        drawn = torch.stack([noise(clean.shape[1:], seed, level) for seed in seeds])
        denoised.append(denoise(process.add_noise(clean, drawn, column(sigma, clean)), sigma).cpu())
    return [Sample(*each) for each in zip(clean, scores, sigmas, torch.stack(denoised, 1), strict=True)]


def percents(seed: int, levels: int) -> Tensor:
    """Sampling percents (K,) of a sample's noised states, 0 noise and 1 clean: one in each of K equal intervals."""
    return (torch.arange(levels) + torch.rand(levels, generator=generator(seed, -1))) / max(levels, 1)


def half(tensor: Tensor) -> Tensor:
    """A copy in half precision, clamped to its range."""
    most = torch.finfo(torch.float16).max
    return tensor.clamp(-most, most).half().contiguous()


@dataclass(frozen=True)
class Rows:
    """Rows (N,...) of several tensors, such as those of files. An index reads them."""

    parts: tuple[Tensor | Stored, ...]
    places: Tensor
    """(N,2) the part that contains a row, and the row's index in it."""

    @staticmethod
    def of(parts: Sequence[Tensor | Stored]) -> "Rows":
        """All rows of all parts."""
        return Rows(tuple(parts), torch.tensor([(i, row) for i, part in enumerate(parts) for row in range(len(part))]))

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self), *self.parts[0].shape[1:]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index) -> Tensor:
        """The rows (B,), or their parts at further indices (B,), as indexing one tensor would give.

        Raises GuidanceError if numbers are not finite.
        """
        rows, *within = index if isinstance(index, tuple) else (index,)
        places = list(zip(*(indices.tolist() for indices in (*self.places[rows].unbind(-1), *within)), strict=True))
        read = [self.parts[part][tuple(place)] for part, *place in places]
        found = torch.stack(read)
        if not is_finite(found):
            part = next(self.parts[part] for (part, *_), each in zip(places, read, strict=True) if not is_finite(each))
            raise not_finite(part)
        return found

    def chosen(self, rows: Tensor) -> "Rows":
        """A selection of the rows, not read yet."""
        return replace(self, places=self.places[rows])


@dataclass(frozen=True)
class Texts:
    """The conditioning of all prompts, with different numbers of tokens."""

    tokens: Sequence[Tensor]
    """Tokens (T_i,E) of each prompt."""
    pooled: Tensor
    """Pooled vectors (N,P)."""

    def __getitem__(self, rows: Tensor) -> Text:
        """The conditioning of some prompts, padded with zeros to the longest. Raises GuidanceError if not finite."""
        tokens = torch.nn.utils.rnn.pad_sequence([self.tokens[row] for row in rows], batch_first=True)
        if not is_finite(tokens):
            raise not_finite(self.tokens)
        return Text(tokens, self.pooled[rows])


@dataclass(frozen=True)
class Samples:
    """The scored samples of a collection. Latents are in half precision, and still on disk."""

    description: Description
    numbers: Tensor
    """Numbers (N,) of the samples in their collection."""
    text: Texts
    """The conditioning of every prompt."""
    clean: Rows
    scores: Tensor
    """Raw scores (N,R)."""
    sigma: Tensor
    """Noise levels (N,K)."""
    denoised: Rows
    """The model's D (N,K,C,...)."""
    unscored: int = 0
    """Number of samples without scores, which are left out."""

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def prompts(self) -> Tensor:
        """The prompt index (N,) of each sample."""
        return self.numbers % len(self.description.prompts)

    @property
    def seeds(self) -> list[int]:
        return [self.description.seed_of(number) for number in self.numbers.tolist()]

    def rewards(self, weights: Sequence[float] = ()) -> Tensor:
        """Weighted sums (N,) of the standardized scores."""
        return self.description.combined(self.scores, weights)

    def rows(self, chosen: Tensor) -> "Samples":
        """A selection of the samples."""
        tensors = {name: getattr(self, name)[chosen] for name in ("numbers", "scores", "sigma")}
        return replace(self, clean=self.clean.chosen(chosen), denoised=self.denoised.chosen(chosen), **tensors)

    def split(self, share: float) -> tuple[Tensor, Tensor]:
        """Rows to train on, and held-out rows. The choice depends on the samples' numbers alone."""
        held_out = torch.tensor(
            [float(torch.rand(1, generator=generator(int(number)))) < share for number in self.numbers]
        )
        return torch.where(~held_out)[0], torch.where(held_out)[0]
