"""Colour space and resizing on tensors, differentiable and defined for every real pixel value."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# BT.601, as in JPEG. It is linear in gamma-encoded RGB, which is already close to perceptually uniform, so distances are useful
# and the gradient is constant; CIELAB and OKLab have roots that fail below zero and explode at it.
_YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
_LONGEST = 16


def constant(values: Sequence, like: Tensor) -> Tensor:
    """A few numbers beside `like`. What is so small has left the host's memory when the call returns, and nobody waits for the GPU."""
    return torch.tensor(values, dtype=like.dtype).to(like.device, non_blocking=True)


def ycbcr(pixels: Tensor) -> Tensor:
    """RGB (B,3,H,W) in [0,1] -> luma in [0,1] and two chroma planes in [-.5,.5], (B,3,H,W)."""
    return torch.einsum("ij,bjhw->bihw", constant(_YCBCR, pixels), pixels)


def luma(pixels: Tensor) -> Tensor:
    """RGB (B,3,H,W) -> (B,1,H,W)."""
    return ycbcr(pixels)[:, :1]


def resize_shortest_side(pixels: Tensor, size: int) -> Tensor:
    """Bicubic with antialiasing, aspect kept, the longer side rounded down as torchvision's Resize does.

    Of pictures longer than 16 times their width only the middle is kept, which bounds the memory.
    """
    pixels = center_crop(pixels, _LONGEST * min(pixels.shape[-2:]))
    height, width = pixels.shape[-2:]
    shortest = min(height, width)
    return F.interpolate(pixels, (size * height // shortest, size * width // shortest), mode="bicubic", antialias=True)


def center_crop(pixels: Tensor, size: int, rounded: Callable[[float], int] = round) -> Tensor:
    """The middle, of at most `size` pixels a side. torchvision rounds half a pixel to even, transformers down."""
    height, width = pixels.shape[-2:]
    top, left = max(0, rounded((height - size) / 2)), max(0, rounded((width - size) / 2))
    return pixels[..., top : top + size, left : left + size]


def fit_square(pixels: Tensor, size: int) -> Tensor:
    """The whole picture in the middle of a black square: bicubic with antialiasing, the longer side at `size`."""
    scale = size / max(pixels.shape[-2:])
    height, width = (max(1, round(side * scale)) for side in pixels.shape[-2:])
    resized = F.interpolate(pixels, (height, width), mode="bicubic", antialias=True)
    top, left = (size - height) // 2, (size - width) // 2
    return F.pad(resized, (left, size - width - left, top, size - height - top))
