"""Labelled samples, and the noised states that training reads."""

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
    """What is kept of one sample."""

    clean: Tensor
    """(C,...) in the model's space."""
    scores: Tensor
    """(R,) raw, one for each reward."""
    sigma: Tensor
    """(K,)"""
    denoised: Tensor
    """(K,C,...)"""


def noise(shape: Sequence[int], seed: int, level: int) -> Tensor:
    """The noise of one noised state of a sample."""
    return torch.randn(tuple(shape), generator=generator(seed, level))


def states(
    clean: Tensor,
    scores: Tensor,
    seeds: Sequence[int],
    sigmas: Tensor,
    process: Process,
    denoise: Callable[[Tensor, Tensor], Tensor],
) -> list[Sample]:
    """Clean latents (N,C,...) with scores (N,R), noised to levels σ (N,K), and the model's D: denoise(x (N,C,...), σ (N,)) -> (N,C,...).

    They are noised as they will be again in training: from the half precision that they are stored in.
    """
    clean = half(clean.cpu()).float()
    denoised = []
    for level, sigma in enumerate(sigmas.unbind(1)):
        drawn = torch.stack([noise(clean.shape[1:], seed, level) for seed in seeds])
        denoised.append(denoise(process.add_noise(clean, drawn, column(sigma, clean)), sigma).cpu())
    return [Sample(*each) for each in zip(clean, scores, sigmas, torch.stack(denoised, 1), strict=True)]


def percents(seed: int, levels: int) -> Tensor:
    """Where in the sampling (K,), 0 noise and 1 clean, the noised states of a sample lie: one in each of K equal parts."""
    return (torch.arange(levels) + torch.rand(levels, generator=generator(seed, -1))) / max(levels, 1)


def half(tensor: Tensor) -> Tensor:
    """In half precision; what lies beyond its range is brought to its end."""
    most = torch.finfo(torch.float16).max
    return tensor.clamp(-most, most).half().contiguous()


@dataclass(frozen=True)
class Rows:
    """Rows (N,...) that lie in several tensors, as of files, and are read when they are asked for."""

    parts: tuple[Tensor | Stored, ...]
    places: Tensor
    """(N,2) the part that a row lies in, and where in it."""

    @staticmethod
    def of(parts: Sequence[Tensor | Stored]) -> "Rows":
        return Rows(tuple(parts), torch.tensor([(i, row) for i, part in enumerate(parts) for row in range(len(part))]))

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self), *self.parts[0].shape[1:]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index) -> Tensor:
        """The rows (B,), or what stands at further places (B,) in each, as of one tensor."""
        rows, *within = index if isinstance(index, tuple) else (index,)
        places = list(zip(*(indices.tolist() for indices in (*self.places[rows].unbind(-1), *within)), strict=True))
        read = [self.parts[part][tuple(place)] for part, *place in places]
        found = torch.stack(read)
        if not is_finite(found):
            part = next(self.parts[part] for (part, *_), each in zip(places, read, strict=True) if not is_finite(each))
            raise not_finite(part)
        return found

    def chosen(self, rows: Tensor) -> "Rows":
        return replace(self, places=self.places[rows])


@dataclass(frozen=True)
class Texts:
    """The texts of all prompts, of several lengths."""

    tokens: Sequence[Tensor]
    """(T_i,E) of each."""
    pooled: Tensor
    """(N,P)"""

    def __getitem__(self, rows: Tensor) -> Text:
        """Those of some, as long as the longest of them, zero where there is none."""
        tokens = torch.nn.utils.rnn.pad_sequence([self.tokens[row] for row in rows], batch_first=True)
        if not is_finite(tokens):
            raise not_finite(self.tokens)
        return Text(tokens, self.pooled[rows])


@dataclass(frozen=True)
class Samples:
    """The samples of a collection that could be scored; latents in half precision and still on disk."""

    description: Description
    numbers: Tensor
    """(N,) as the collection counts."""
    text: Texts
    """Of every prompt."""
    clean: Rows
    scores: Tensor
    """(N,R)"""
    sigma: Tensor
    """(N,K)"""
    denoised: Rows
    """(N,K,C,...)"""
    unscored: int = 0
    """How many were left out."""

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def prompts(self) -> Tensor:
        """(N,) the prompt of each."""
        return self.numbers % len(self.description.prompts)

    @property
    def seeds(self) -> list[int]:
        return [self.description.seed_of(number) for number in self.numbers.tolist()]

    def rewards(self, weights: Sequence[float] = ()) -> Tensor:
        """(N,) weighted sums of the standardized scores."""
        return self.description.combined(self.scores, weights)

    def rows(self, chosen: Tensor) -> "Samples":
        tensors = {name: getattr(self, name)[chosen] for name in ("numbers", "scores", "sigma")}
        return replace(self, clean=self.clean.chosen(chosen), denoised=self.denoised.chosen(chosen), **tensors)

    def split(self, share: float) -> tuple[Tensor, Tensor]:
        """Rows to train on, and rows held out, chosen by their numbers alone."""
        held_out = torch.tensor(
            [float(torch.rand(1, generator=generator(int(number)))) < share for number in self.numbers]
        )
        return torch.where(~held_out)[0], torch.where(held_out)[0]
