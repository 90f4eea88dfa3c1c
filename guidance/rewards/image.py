"""Colour space and resizing on tensors, differentiable and defined for every real pixel value."""

import torch
import torch.nn.functional as F
from torch import Tensor

# BT.601, as in JPEG. It is linear in gamma-encoded RGB, which is already close to perceptually uniform, so distances are useful
# and the gradient is constant; CIELAB and OKLab have roots that fail below zero and explode at it.
_YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))


def ycbcr(pixels: Tensor) -> Tensor:
    """RGB (B,3,H,W) in [0,1] -> luma in [0,1] and two chroma planes in [-.5,.5], (B,3,H,W)."""
    return torch.einsum("ij,bjhw->bihw", pixels.new_tensor(_YCBCR), pixels)


def luma(pixels: Tensor) -> Tensor:
    """RGB (B,3,H,W) -> (B,1,H,W)."""
    return ycbcr(pixels)[:, :1]


def resize_shortest_side(pixels: Tensor, size: int) -> Tensor:
    """Bicubic with antialiasing, aspect kept, the longer side rounded down as torchvision's Resize does."""
    height, width = pixels.shape[-2:]
    shortest = min(height, width)
    return F.interpolate(pixels, (size * height // shortest, size * width // shortest), mode="bicubic", antialias=True)


def center_crop(pixels: Tensor, size: int) -> Tensor:
    height, width = pixels.shape[-2:]
    top, left = round((height - size) / 2), round((width - size) / 2)
    return pixels[..., top : top + size, left : left + size]
