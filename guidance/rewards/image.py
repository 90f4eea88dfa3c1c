"""Colour space and resizing on tensors, differentiable and defined for every real pixel value."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode, functional

# BT.601, as in JPEG. It is linear in gamma-encoded RGB, which is close to perceptually uniform, so distances are useful
# and the gradient is constant. CIELAB and OKLab contain roots: undefined below zero, and with infinite slope at it.
_YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
_LONGEST = 16
"""Largest aspect ratio that is kept whole."""


def constant(values: Sequence, like: Tensor) -> Tensor:
    """A few numbers as a tensor with the type and device of `like`, without waiting for a GPU."""
    return torch.tensor(values, dtype=like.dtype).to(like.device, non_blocking=True)


def ycbcr(pixels: Tensor) -> Tensor:
    """RGB (B,3,H,W) in [0,1] -> luma in [0,1] and two chroma planes in [-.5,.5], (B,3,H,W)."""
    return torch.einsum("ij,bjhw->bihw", constant(_YCBCR, pixels), pixels)


def luma(pixels: Tensor) -> Tensor:
    """RGB (B,3,H,W) -> (B,1,H,W)."""
    return ycbcr(pixels)[:, :1]


def resize_shortest_side(pixels: Tensor, size: int) -> Tensor:
    """(B,C,H,W): the shorter side becomes `size` and the aspect ratio is kept, as torchvision's Resize does.

    Pictures with an aspect ratio above 16 are cropped to their middle first, which limits the memory.
    """
    height, width = pixels.shape[-2:]
    middle = functional.center_crop(pixels, [min(height, _LONGEST * width), min(width, _LONGEST * height)])
    return _resize(middle, [size])


def center_crop(pixels: Tensor, size: int, rounded: Callable[[float], int] = round) -> Tensor:
    """The central square of `size` pixels a side. torchvision rounds half a pixel to even, transformers down."""
    top, left = (rounded((side - size) / 2) for side in pixels.shape[-2:])
    return functional.crop(pixels, top, left, size, size)


def fit_square(pixels: Tensor, size: int) -> Tensor:
    """The whole picture in the middle of a black square of `size` pixels a side."""
    scale = size / max(pixels.shape[-2:])
    resized = _resize(pixels, [max(1, round(side * scale)) for side in pixels.shape[-2:]])
    return functional.center_crop(resized, [size, size])


def _resize(pixels: Tensor, size: list[int]) -> Tensor:
    """Bicubic with antialiasing. torchvision neither rounds nor clamps floating-point pixels."""
    return functional.resize(pixels, size, InterpolationMode.BICUBIC, antialias=True)
