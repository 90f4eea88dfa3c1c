"""Draws the pictures of the help pages: `make pictures`.

strength.png is sampled by the shipped workflow from the stand-in model; temperature.png is the exact reward-weighted distribution of a ring.
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from torchvision.transforms.functional import to_pil_image

from ..standins.shapesworld import world
from . import comfy, environment, models
from .client import Client
from .demo import Cell, Stage, mean
from .environment import CHECKOUT
from .sheet import FAINT, INK, PAPER, write

FOLDER = CHECKOUT / "nodes" / "web" / "docs"
STRENGTHS = (0.0, 1.0, 2.0, 4.0)
SEEDS = 2
TEMPERATURES = (4.0, 1.0, 0.5, 0.2)
SCALE, GAP, FOOT, COLUMN = 2, 8, 84, 180
MODES, RADIUS, WIDTH = 8, 0.66, 0.11


def strengths(folder: Path) -> Image.Image:
    """The same noise at growing strengths."""
    base = environment.cache() / "work" / "demo"
    models.link_models(base / "models", folder)
    with comfy.serve(base) as server:
        stage = Stage(Client(server.url), folder)
        cells = [stage.play(world.DEMO_PROMPTS[0], f"{strength:g}", strength, batch=SEEDS) for strength in STRENGTHS]
    return beside([(stacked(cell), [f"strength {cell.column}", *scores(cell)]) for cell in cells])


def scores(cell: Cell) -> list[str]:
    return [f"reward {mean(cell.rewards):+.2f}", f"held-out {mean(cell.heldout):+.2f}"]


def stacked(cell: Cell) -> Image.Image:
    side = world.SIDE * SCALE
    image = Image.new("RGB", (side, len(cell.pictures) * (side + GAP) - GAP), PAPER)
    for i, picture in enumerate(cell.pictures):
        image.paste(to_pil_image(picture).resize((side, side), Image.Resampling.LANCZOS), (0, i * (side + GAP)))
    return image


def temperatures() -> Image.Image:
    """q(x) ∝ p(x)·exp(r(x)/β) for a ring of Gaussians and a reward that grows upwards, one unit of spread from the middle to the top."""
    return beside([(density(beta), [f"temperature {beta:g}"]) for beta in TEMPERATURES])


def density(temperature: float) -> Image.Image:
    x, y = np.meshgrid(*[np.linspace(-1, 1, COLUMN)] * 2)
    angles = 2 * np.pi * (np.arange(MODES) + 0.5) / MODES
    squares = (x[..., None] - RADIUS * np.cos(angles)) ** 2 + (y[..., None] - RADIUS * np.sin(angles)) ** 2
    tilted = np.exp(-squares / (2 * WIDTH**2)).sum(-1) * np.exp(-y / RADIUS / temperature)
    dark = (tilted / tilted.max())[..., None]
    return Image.fromarray((np.array(PAPER) + dark * (np.array(INK) - np.array(PAPER))).round().astype(np.uint8))


def beside(columns: list[tuple[Image.Image, list[str]]]) -> Image.Image:
    height = max(image.height for image, _ in columns)
    lines = max(len(notes) for _, notes in columns)
    sheet = Image.new("RGB", (len(columns) * COLUMN, height + lines * FOOT // 3 + GAP), PAPER)
    for i, (image, notes) in enumerate(columns):
        sheet.paste(image, (i * COLUMN + (COLUMN - image.width) // 2, 0))
        for k, note in enumerate(notes):
            write(ImageDraw.Draw(sheet), (i * COLUMN + 26, height + GAP + k * FOOT // 3), note, 16, FAINT if k else INK)
    return sheet


def main() -> None:
    temperatures().save(FOLDER / "temperature.png", optimize=True)
    strengths(models.shapesworld()).save(FOLDER / "strength.png", optimize=True)


if __name__ == "__main__":
    main()
