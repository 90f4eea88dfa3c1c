"""Draws captions below images."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
PAPER, INK, FAINT = (24, 26, 30), (245, 246, 248), (168, 172, 180)
NARROWEST, SMALLEST = 256, 13
"""Pixels: least width of a captioned image, and least font size."""


@dataclass(frozen=True)
class Line:
    label: str
    value: str


def caption(images: Tensor, captions: Sequence[Sequence[Line]]) -> Tensor:
    """Images (B,H,W,3) in [0,1] and B captions with equally many lines -> images (B,H',W',3) with captions below.

    The first line of a caption is brighter than the others.
    """
    width = max(NARROWEST, images.shape[2])
    size = max(SMALLEST, width // 26)
    return torch.stack([_caption(image, lines, width, size) for image, lines in zip(images, captions, strict=True)])


def _caption(pixels: Tensor, lines: Sequence[Line], width: int, size: int) -> Tensor:
    image = Image.fromarray((pixels.clamp(0, 1) * 255).round().byte().cpu().numpy())
    font, margin, step = ImageFont.load_default(size), round(size * 0.7), round(size * 1.4)
    sheet = Image.new("RGB", (width, image.height + len(lines) * step + 2 * margin), PAPER)
    sheet.paste(image, ((width - image.width) // 2, 0))
    draw = ImageDraw.Draw(sheet)
    for i, line in enumerate(lines):
        y, colour = image.height + margin + i * step, FAINT if i else INK
        value = shorten(line.value, font, width - 2 * margin)
        draw.text((width - margin, y), value, colour, font, anchor="ra")
        draw.text((margin, y), shorten(line.label, font, width - 3 * margin - font.getlength(value)), colour, font)
    return torch.from_numpy(np.array(sheet, dtype=np.float32) / 255)


def shorten(text: str, font: Font, width: float) -> str:
    """The text on one line, cut with an ellipsis if it is wider than `width` pixels."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    fitting = [length for length in range(len(text)) if font.getlength(text[:length] + "…") <= width]
    return text[: fitting[-1]].rstrip() + "…" if fitting else ""
