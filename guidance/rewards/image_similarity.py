"""Rewards for likeness to a reference picture, without weights or through a CLIP image tower."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import quoted
from .base import Reward, RewardError, at_least_float32
from .clip import ClipReward
from .image import luma, ycbcr

_EPSILON = 1e-6


def _grid(pixels: Tensor, size: int) -> Tensor:
    return F.interpolate(pixels, (size, size), mode="bilinear", antialias=True)


def colour_likeness(pixels: Tensor, reference: Tensor) -> Tensor:
    """Minus the RMS distance in YCbCr (B,), averaged over grids of 4, 8, 16 and 32 cells a side."""
    differences = [ycbcr(_grid(pixels, size) - _grid(reference, size)) for size in (4, 8, 16, 32)]
    return -torch.stack([(d.square().sum(1).mean((1, 2)) + _EPSILON).sqrt() for d in differences]).mean(0)


def structure_likeness(pixels: Tensor, reference: Tensor) -> Tensor:
    """Correlation of luma (B,), averaged over the octaves of grids from 1 to 64 cells a side: shapes in any colours."""
    return torch.stack([_correlation(a, b) for a, b in zip(_bands(pixels), _bands(reference), strict=True)]).mean(0)


def _bands(pixels: Tensor) -> list[Tensor]:
    """Laplacian pyramid of luma (Burt and Adelson 1983), coarsest band first."""
    grids = [luma(_grid(pixels, size)) for size in (1, 4, 8, 16, 32, 64)]
    return [
        fine - F.interpolate(coarse, fine.shape[-2:], mode="bilinear")
        for coarse, fine in zip(grids, grids[1:], strict=False)
    ]


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    energy = (a.square().mean((1, 2, 3)) + _EPSILON) * (b.square().mean((1, 2, 3)) + _EPSILON)
    return (a * b).mean((1, 2, 3)) / energy.sqrt()


@dataclass(frozen=True)
class Likeness:
    """A measure of likeness, two pictures (B,3,H,W) -> (B,), with its typical mean and standard deviation."""

    function: Callable[[Tensor, Tensor], Tensor]
    reference_mean: float
    reference_std: float


LIKENESSES = {
    "colour": Likeness(colour_likeness, -0.30, 0.07),
    "structure": Likeness(structure_likeness, 0.0, 0.10),
}
"""Reference values are measured over all pairs of the photographs named in image_statistics.py."""


class ImageSimilarity(Reward):
    """Likeness in colour or structure to a reference picture (1,3,H,W). Both are resized to the same square grids."""

    reference: Tensor

    def __init__(self, reference: Tensor, likeness: str = "colour"):
        super().__init__()
        if likeness not in LIKENESSES:
            raise RewardError(
                f"There is no image likeness called {quoted(likeness)}; choose one of {', '.join(LIKENESSES)}."
            )
        self.name = f"{likeness} likeness"
        self.likeness = LIKENESSES[likeness]
        self.reference_mean = self.likeness.reference_mean
        self.reference_std = self.likeness.reference_std
        self.register_buffer("reference", _one_picture(reference), persistent=False)
        self.compared_with = _digest(reference)

    def forward(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        pixels = at_least_float32(pixels)
        return self.likeness.function(pixels, self.reference.to(pixels))


class ClipImageSimilarity(Reward):
    """Cosine of CLIP image embeddings with a reference (1,3,H,W): subject and style in any composition."""

    name = "CLIP image likeness"
    reference_mean = 0.5
    reference_std = 0.1
    """Assumed. Unrelated photographs have a cosine near .5 with OpenAI's ViT-L/14."""
    reference: Tensor

    def __init__(self, clip: ClipReward, reference: Tensor):
        super().__init__()
        self.clip = clip
        self.register_buffer("reference", _one_picture(reference), persistent=False)
        self.compared_with = _digest(reference)
        self._reference_features: Tensor | None = None

    def forward(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        if self._reference_features is None:
            with torch.inference_mode(False), torch.no_grad():
                self._reference_features = self.clip.image_features(self.reference.to(pixels.device)).cpu()
        features = self.clip.image_features(pixels)
        return (features * self._reference_features.to(features)).sum(1)


def _one_picture(reference: Tensor) -> Tensor:
    if reference.ndim != 4 or reference.shape[:2] != (1, 3) or 0 in reference.shape:
        raise RewardError(
            f"The reference must be one picture of shape (1, 3, height, width), not {tuple(reference.shape)}."
        )
    if not reference.isfinite().all():
        raise RewardError(
            "The reference picture has values that are not finite numbers: "
            "the VAE or the node that made it is at fault."
        )
    return reference.detach().clone()


def _digest(reference: Tensor) -> str:
    return hashlib.sha256(reference.float().cpu().numpy().tobytes()).hexdigest()[:12]
