"""Draws curves in one figure."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, cycle

from PIL import Image, ImageDraw, ImageFont

from .sheet import FAINT, PAPER, write

COLOURS = (
    (0, 90, 181), (220, 50, 32), (0, 128, 96), (128, 64, 160), (200, 120, 0), (90, 90, 90),
    (0, 150, 190), (200, 40, 130), (110, 130, 0), (120, 70, 40), (60, 60, 200), (0, 90, 60),
    (70, 185, 70), (20, 20, 20),
)  # fmt: skip
SIZE, LEFT, TOP, RIGHT, BOTTOM = (1100, 640), 110, 90, 220, 70
TICKS = 5
"""About so many steps on an axis."""
LETTERS, LINE, AWAY, DOT = 15, 18, 14, 5
"""Of a curve's name its size, its height, and its distance from the curve's end, which has a dot of such a radius; in pixels."""
ROUNDS = 200
"""Of pushing names apart."""

Point = tuple[float, float]
Colour = tuple[int, int, int]
FONT = ImageFont.load_default


def draw_chart(
    title: str,
    across: str,
    curves: Mapping[str, Sequence[tuple[float, float]]],
    aims: Mapping[str, float] | None = None,
    aim: str = "",
    logarithmic: bool = False,
    floor: float = 0.0,
) -> Image.Image:
    """Every curve in a colour of its own, and dashed what it aims at; `aim` says what that is. A logarithmic x-axis has the powers of 2.
    A floor makes the y-axis logarithmic too, in powers of 10 from there; what is less is drawn on it."""
    aims, place = aims or {}, math.log2 if logarithmic else float
    height = (lambda y: math.log10(max(y, floor))) if floor else float
    xs = [x for points in curves.values() for x, _ in points]
    ys = [y for points in curves.values() for _, y in points] + list(aims.values())
    left, right, bottom = LEFT, SIZE[0] - RIGHT, SIZE[1] - BOTTOM
    columns, rows = powers(xs) if logarithmic else ticks(xs), decades(floor, max(ys)) if floor else ticks(ys)
    first, last = ends(xs if logarithmic else columns)
    along, linear = scale(place(first), place(last), left, right), scale(*ends([height(y) for y in rows]), bottom, TOP)
    y_of = lambda y: linear(height(y))  # noqa: E731
    chart = Image.new("RGB", SIZE, PAPER)
    draw = ImageDraw.Draw(chart)
    write(draw, (left, 30), title, 24)
    write(draw, (left, SIZE[1] - 34), across, 16, FAINT)
    for x in columns:
        write(draw, (round(along(place(x))), bottom + 12), f"{x:g}", 14, FAINT, "mt")
    for y in rows:
        write(draw, (left - 14, round(y_of(y))), f"{y:g}", 14, FAINT, "rm")
        draw.line([(left, y_of(y)), (right, y_of(y))], fill=(232, 234, 238))
    names: dict[str, tuple[Point, Colour]] = {}
    for colour, (name, points) in zip(cycle(COLOURS), curves.items(), strict=False):
        places = [(along(place(x)), y_of(y)) for x, y in points]
        draw.line(places, fill=colour, width=3, joint="curve")
        for x, y in places if logarithmic else places[-1:]:
            draw.ellipse([x - DOT, y - DOT, x + DOT, y + DOT], fill=colour)
        for x in range(left, right, 12) if name in aims else ():
            draw.line([(x, y_of(aims[name])), (x + 6, y_of(aims[name]))], fill=colour)
        names[f"{name}; dashed {aim}" if name in aims else name] = places[-1], colour
    label(draw, names)
    return chart


def label(draw: ImageDraw.ImageDraw, names: Mapping[str, tuple[Point, Colour]]) -> None:
    """Each name beside its curve's end, with a thin line to it where another name has that place."""
    for name, (x, y) in beside({name: end for name, (end, _) in names.items()}).items():
        end, colour = names[name]
        if abs(y - end[1]) > DOT:
            draw.line([end, (x - 3, y)], fill=colour)
        draw.text((x, y), name, colour, FONT(LETTERS), "lm", stroke_width=2, stroke_fill=PAPER)


def beside(ends: Mapping[str, Point]) -> dict[str, Point]:
    """Where each name begins, at half its height: right of its curve's end, and where names would cover each other, as near as they leave room."""
    names = sorted(ends, key=lambda name: ends[name][1])
    starts, heights = [ends[name][0] + AWAY for name in names], [ends[name][1] for name in names]
    widths = [FONT(LETTERS).getlength(name) for name in names]
    pairs = [(i, j) for i, j in combinations(range(len(names)), 2) if -widths[j] < starts[j] - starts[i] < widths[i]]
    for _ in range(ROUNDS):
        for i, j in pairs:
            push = max(0.0, LINE - (heights[j] - heights[i])) / 2
            heights[i] -= push
            heights[j] += push
    return dict(zip(names, zip(starts, heights, strict=True), strict=True))


def ticks(values: Sequence[float]) -> list[float]:
    """Round numbers that enclose the values: 1, 2 or 5 times a power of ten apart."""
    low, high = ends(values)
    rough = (high - low) / TICKS or 1
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((factor * power for factor in (1, 2, 5, 10)), key=lambda step: abs(math.log(step / rough)))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def ends(values: Sequence[float]) -> Point:
    return min(values), max(values)


def powers(values: Sequence[float]) -> list[float]:
    """Of 2, between the least and the largest."""
    return [2.0**i for i in range(math.ceil(math.log2(min(values))), math.floor(math.log2(max(values))) + 1)]


def decades(floor: float, most: float) -> list[float]:
    """The floor times powers of 10, up to one that is no less than the most."""
    return [floor * 10**i for i in range(math.ceil(math.log10(most / floor) - 1e-9) + 1)]


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
