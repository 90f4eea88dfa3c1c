"""Draws curves in one figure."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle

from PIL import Image, ImageDraw

from .sheet import FAINT, PAPER, write

COLOURS = (
    (0, 90, 181), (220, 50, 32), (0, 128, 96), (128, 64, 160), (200, 120, 0), (90, 90, 90),
    (0, 150, 190), (200, 40, 130), (110, 130, 0), (120, 70, 40), (60, 60, 200), (0, 90, 60),
)  # fmt: skip
SIZE, LEFT, TOP, RIGHT, BOTTOM = (1100, 640), 110, 90, 220, 70
TICKS = 5


def draw_chart(
    title: str,
    across: str,
    curves: Mapping[str, Sequence[tuple[float, float]]],
    aims: Mapping[str, float] | None = None,
    aim: str = "",
    logarithmic: bool = False,
) -> Image.Image:
    """Every curve in a colour of its own, and dashed what it aims at; `aim` says what that is. A logarithmic x-axis has the powers of 2."""
    aims, place = aims or {}, math.log2 if logarithmic else float
    xs = [x for points in curves.values() for x, _ in points]
    ys = [y for points in curves.values() for _, y in points] + list(aims.values())
    left, right, bottom = LEFT, SIZE[0] - RIGHT, SIZE[1] - BOTTOM
    taken: list[tuple[int, int]] = []
    along, y_of = scale(place(min(xs)), place(max(xs)), left, right), scale(min(ys), max(ys), bottom, TOP)
    chart = Image.new("RGB", SIZE, PAPER)
    draw = ImageDraw.Draw(chart)
    write(draw, (left, 30), title, 24)
    write(draw, (left, SIZE[1] - 34), across, 16, FAINT)
    for x in powers(xs) if logarithmic else evenly(xs):
        write(draw, (int(along(place(x))) - 12, bottom + 10), f"{x:.3g}" if x < 1 else f"{x:.0f}", 14, FAINT)
    for y in evenly(ys):
        write(draw, (left - 64, int(y_of(y)) - 9), f"{y:.3g}", 14, FAINT)
        draw.line([(left, y_of(y)), (right, y_of(y))], fill=(232, 234, 238))
    for colour, (name, points) in zip(cycle(COLOURS), curves.items(), strict=False):
        places = [(along(place(x)), y_of(y)) for x, y in points]
        draw.line(places, fill=colour, width=3, joint="curve")
        for x, y in places if logarithmic else ():
            draw.ellipse([x - 5, y - 5, x + 5, y + 5], fill=colour)
        for x in range(left, right, 12) if name in aims else ():
            draw.line([(x, y_of(aims[name])), (x + 6, y_of(aims[name]))], fill=colour)
        taken.append(free((int(places[-1][0]) + 12, int(places[-1][1]) - 9), taken))
        write(draw, taken[-1], f"{name}; dashed {aim}" if name in aims else name, 15, colour)
    return chart


def evenly(values: Sequence[float]) -> list[float]:
    return [min(values) + (max(values) - min(values)) * i / TICKS for i in range(TICKS + 1)]


def powers(values: Sequence[float]) -> list[float]:
    """Of 2, between the least and the largest."""
    return [2.0**i for i in range(math.ceil(math.log2(min(values))), math.floor(math.log2(max(values))) + 1)]


def free(place: tuple[int, int], taken: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The place for a name, or the first below it that no other name covers."""
    x, y = place
    while any(abs(x - a) < RIGHT and abs(y - b) < 18 for a, b in taken):
        y += 6
    return x, y


def in_rows(charts: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Charts as one picture."""
    width, height = SIZE
    picture = Image.new("RGB", (width * max(map(len, charts)), height * len(charts)), PAPER)
    for i, row in enumerate(charts):
        for j, chart in enumerate(row):
            picture.paste(chart, (j * width, i * height))
    return picture


def scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """[low, high] -> [start, end]."""
    return lambda value: start + (end - start) * (value - low) / ((high - low) or 1)
