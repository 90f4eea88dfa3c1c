"""Draws icon.png and banner.png: a ring of modes p(x) and the reward-weighted q(x) ∝ p(x)·exp(r(x)/β)."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

FOLDER = Path(__file__).parent
ICON, BANNER = 400, (2520, 1080)
MODES, RADIUS, WIDTH, TEMPERATURE = 8, 0.68, 0.12, 0.5
NIGHT, COLD, WARM = (np.array(colour, float) for colour in ((18, 21, 33), (92, 120, 190), (255, 176, 59)))
PAPER, FAINT = (240, 242, 248), (146, 154, 178)
OVERSAMPLING = 2


def ring(side: int, tilted: bool) -> np.ndarray:
    """Pixels (side,side,3) of Gaussians on a ring, in the colour of their reward, which rises with the height."""
    x, y = np.meshgrid(*[np.linspace(-1, 1, side)] * 2)
    angles = 2 * np.pi * (np.arange(MODES) + 0.5) / MODES
    squares = (x[..., None] - RADIUS * np.cos(angles)) ** 2 + (y[..., None] - RADIUS * np.sin(angles)) ** 2
    density = np.exp(-squares / (2 * WIDTH**2)).sum(-1)
    weight = np.exp((-y - RADIUS) / TEMPERATURE)
    light = (density * weight if tilted else 0.8 * density)[..., None].clip(0, 1)
    warmth = ((1 - y[..., None] / RADIUS) / 2).clip(0, 1) if tilted else 0.0
    return NIGHT + light * (COLD + warmth * (WARM - COLD) - NIGHT)


def picture(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def icon() -> Image.Image:
    side = ICON * OVERSAMPLING
    ghost = NIGHT + 0.3 * (ring(side, tilted=False) - NIGHT)
    rounded = Image.new("L", (side, side))
    ImageDraw.Draw(rounded).rounded_rectangle((0, 0, side - 1, side - 1), side // 6, 255)
    sheet = picture(np.maximum(ghost, ring(side, tilted=True))).convert("RGBA")
    sheet.putalpha(rounded)
    return sheet.resize((ICON, ICON), Image.Resampling.LANCZOS)


def banner() -> Image.Image:
    width, height = BANNER
    side, left, top = 680, 990, 150
    sheet = Image.new("RGB", BANNER, tuple(NIGHT.astype(int)))
    draw = ImageDraw.Draw(sheet)
    for i, (tilted, label) in enumerate(((False, "p(x)"), (True, "p(x) · exp(reward)"))):
        x = left + i * (side + 80)
        sheet.paste(picture(ring(side, tilted)), (x, top))
        write(draw, (x + side // 2, top + side + 40), label, 50, FAINT, "ma")
    arrow(draw, (left + side + 5, top + side // 2), 70)
    write(draw, (130, 290), "Reward\nGuidance", 150, PAPER)
    write(draw, (136, 690), "sample what a reward likes,\nwithout finetuning", 54, FAINT)
    return sheet


def write(
    draw: ImageDraw.ImageDraw,
    place: tuple[int, int],
    text: str,
    size: int,
    colour: tuple[int, int, int],
    anchor: str | None = None,
) -> None:
    draw.text(place, text, colour, ImageFont.load_default(size), anchor=anchor, spacing=size // 4)


def arrow(draw: ImageDraw.ImageDraw, start: tuple[int, int], length: int) -> None:
    x, y = start
    draw.line((x, y, x + length, y), FAINT, 8)
    draw.polygon(((x + length - 24, y - 24), (x + length + 10, y), (x + length - 24, y + 24)), FAINT)


if __name__ == "__main__":
    icon().save(FOLDER / "icon.png", optimize=True)
    banner().save(FOLDER / "banner.png", optimize=True)
