"""Draws the pictures of the help pages: `make pictures`."""

import numpy as np
from PIL import Image, ImageDraw

from ..harness.environment import CHECKOUT
from .sheet import INK, PAPER, write

FOLDER = CHECKOUT / "nodes" / "web" / "docs"
TEMPERATURES = (4.0, 1.0, 0.5, 0.2)
SIDE, GAP, FOOT = 180, 8, 28
MODES, RADIUS, WIDTH = 8, 0.66, 0.11


def temperatures() -> Image.Image:
    """q(x) ∝ p(x)·exp(r(x)/β) for a ring of Gaussians and a reward that grows upwards, one unit of spread from the middle to the top."""
    sheet = Image.new("RGB", (len(TEMPERATURES) * SIDE, SIDE + FOOT + GAP), PAPER)
    for i, temperature in enumerate(TEMPERATURES):
        sheet.paste(density(temperature), (i * SIDE, 0))
        write(ImageDraw.Draw(sheet), (i * SIDE + 26, SIDE + GAP), f"temperature {temperature:g}", 16)
    return sheet


def density(temperature: float) -> Image.Image:
    x, y = np.meshgrid(*[np.linspace(-1, 1, SIDE)] * 2)
    angles = 2 * np.pi * (np.arange(MODES) + 0.5) / MODES
    squares = (x[..., None] - RADIUS * np.cos(angles)) ** 2 + (y[..., None] - RADIUS * np.sin(angles)) ** 2
    tilted = np.exp(-squares / (2 * WIDTH**2)).sum(-1) * np.exp(-y / RADIUS / temperature)
    dark = (tilted / tilted.max())[..., None]
    return Image.fromarray((np.array(PAPER) + dark * (np.array(INK) - np.array(PAPER))).round().astype(np.uint8))


if __name__ == "__main__":
    temperatures().save(FOLDER / "temperature.png", optimize=True)
