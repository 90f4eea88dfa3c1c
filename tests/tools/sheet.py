"""Draws the comparison picture of the demo."""

import textwrap

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

SCALE, GAP, MARGIN, PROMPT_WIDTH, NOTES_WIDTH = 2, 6, 28, 190, 150
INK, FAINT, PAPER = (28, 30, 34), (110, 114, 120), (255, 255, 255)

Row = dict[str, tuple[Tensor, list[str]]]
"""Column -> pictures (B,3,H,W) in [0,1], and lines to write beside them."""


def draw_sheet(title: str, headings: dict[str, str], rows: dict[str, Row]) -> Image.Image:
    """One row for each prompt, one strip of pictures for each column in `headings`."""
    pictures = next(iter(rows.values()))[next(iter(headings))][0]
    strip_width = len(pictures) * (pictures.shape[3] * SCALE + GAP)
    column_width, row_height = strip_width + NOTES_WIDTH, pictures.shape[2] * SCALE + 3 * GAP
    top = MARGIN + 84
    size = (2 * MARGIN + PROMPT_WIDTH + len(headings) * column_width, top + len(rows) * row_height + MARGIN - 3 * GAP)
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    write(draw, (MARGIN, MARGIN), title, 26)
    left = {column: MARGIN + PROMPT_WIDTH + i * column_width for i, column in enumerate(headings)}
    for column, heading in headings.items():
        write(draw, (left[column], MARGIN + 52), heading, 17)
    for i, (prompt, row) in enumerate(rows.items()):
        y = top + i * row_height
        write(draw, (MARGIN, y), textwrap.fill(prompt, 20), 17)
        for column, (pictures, notes) in row.items():
            sheet.paste(strip(pictures), (left[column], y))
            write(draw, (left[column] + strip_width + GAP, y), "\n".join(notes), 16, FAINT)
    return sheet


def strip(pictures: Tensor) -> Image.Image:
    height, width = (side * SCALE for side in pictures.shape[2:])
    image = Image.new("RGB", (len(pictures) * (width + GAP), height), PAPER)
    for i, picture in enumerate(pictures):
        image.paste(to_pil_image(picture).resize((width, height), Image.Resampling.LANCZOS), (i * (width + GAP), 0))
    return image


def write(
    draw: ImageDraw.ImageDraw,
    place: tuple[int, int],
    text: str,
    size: int,
    colour: tuple[int, int, int] = INK,
    anchor: str | None = None,
) -> None:
    draw.text(place, text, colour, ImageFont.load_default(size), anchor, spacing=5)
