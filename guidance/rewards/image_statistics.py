"""Rewards that need no weights: colour toward a target, brightness, contrast, saturation, sharpness.

All are computed in YCbCr (see image.py). The reference values are measured on the colour photographs of scikit-image
(astronaut, chelsea, coffee, rocket, motorcycle) and their quarters; sharpness on the whole photographs, and colours
against the corners of the RGB cube.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import quoted
from .base import Reward, RewardError, at_least_float32
from .image import constant, luma, resize_shortest_side, ycbcr

_SHARPNESS_SIZE = 512
_EPSILON = 1e-6
"""Keeps the gradient of a square root finite for flat pictures."""


def brightness(pixels: Tensor) -> Tensor:
    """Mean luma (B,)."""
    return luma(pixels).mean((1, 2, 3))


def contrast(pixels: Tensor) -> Tensor:
    """RMS contrast (B,): the standard deviation of luma."""
    return (luma(pixels).var((1, 2, 3), correction=0) + _EPSILON).sqrt()


def saturation(pixels: Tensor) -> Tensor:
    """RMS chroma (B,)."""
    return (ycbcr(pixels)[:, 1:].square().sum(1).mean((1, 2)) + _EPSILON).sqrt()


def sharpness(pixels: Tensor) -> Tensor:
    """RMS (B,) of the finest detail of luma, at a shortest side of 512 pixels.

    An enlarged small picture therefore counts as blurred.
    """
    plane = luma(resize_shortest_side(pixels, _SHARPNESS_SIZE))
    binomial = constant([0.25, 0.5, 0.25], plane)
    blurred = F.conv2d(F.pad(plane, (1, 1, 1, 1), mode="replicate"), torch.outer(binomial, binomial)[None, None])
    return ((plane - blurred).square().mean((1, 2, 3)) + _EPSILON).sqrt()


@dataclass(frozen=True)
class Statistic:
    """A function of pixels (B,3,H,W) -> (B,), with its typical mean and standard deviation."""

    function: Callable[[Tensor], Tensor]
    reference_mean: float
    reference_std: float


STATISTICS = {
    "brightness": Statistic(brightness, 0.40, 0.12),
    "contrast": Statistic(contrast, 0.18, 0.07),
    "saturation": Statistic(saturation, 0.13, 0.06),
    "sharpness": Statistic(sharpness, 0.018, 0.007),
}


class ImageStatistic(Reward):
    """One of STATISTICS; higher is better. To lower it, use a negative weight in a combination."""

    def __init__(self, statistic: str):
        super().__init__()
        if statistic not in STATISTICS:
            raise RewardError(
                f"There is no image statistic called {quoted(statistic)}; choose one of {', '.join(STATISTICS)}."
            )
        self.name = statistic
        self.reference_mean = STATISTICS[statistic].reference_mean
        self.reference_std = STATISTICS[statistic].reference_std

    def forward(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        return STATISTICS[self.name].function(at_least_float32(pixels))


class ColourReward(Reward):
    """Minus the distance in YCbCr to an RGB colour in [0,1]: of the picture's mean colour, or the RMS over its pixels.

    The mean leaves the composition free. The RMS over pixels favours a flat picture.
    """

    reference_std = 0.08
    colour: Tensor

    def __init__(self, colour: Sequence[float], every_pixel: bool = False):
        super().__init__()
        if len(colour) != 3 or not all(isinstance(value, int | float) and 0 <= value <= 1 for value in colour):
            raise RewardError(f"A colour is three numbers from 0 to 1 (red, green, blue), not {quoted(colour)}.")
        self.name = "colour of every pixel" if every_pixel else "mean colour"
        self.compared_with = "#" + "".join(f"{round(255 * value):02x}" for value in colour)
        self.reference_mean = -0.62 if every_pixel else -0.58
        self.every_pixel = every_pixel
        self.register_buffer("colour", torch.tensor(colour, dtype=torch.float32).view(1, 3, 1, 1), persistent=False)

    def forward(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        difference = ycbcr(at_least_float32(pixels) - self.colour.to(pixels))
        if not self.every_pixel:
            difference = difference.mean((2, 3), keepdim=True)
        return -(difference.square().sum(1).mean((1, 2)) + _EPSILON).sqrt()
