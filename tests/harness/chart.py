"""Draws curves in one figure."""

from collections.abc import Callable, Sequence

from PIL import Image, ImageDraw

from .sheet import FAINT, PAPER, write

COLOURS = ((0, 90, 181), (220, 50, 32), (0, 128, 96), (128, 64, 160))
SIZE, LEFT, TOP, RIGHT, BOTTOM = (1100, 640), 110, 90, 220, 70
TICKS = 5


def draw_chart(title: str, across: str, curves: dict[str, Sequence[tuple[float, float]]], aims: dict[str, float], aim: str) -> Image.Image:
    """Every curve in a colour of its own, and dashed what it aims at; `aim` says what that is."""
    xs = [x for points in curves.values() for x, _ in points]
    ys = [y for points in curves.values() for _, y in points] + list(aims.values())
    left, right, bottom = LEFT, SIZE[0] - RIGHT, SIZE[1] - BOTTOM
    x_of, y_of = scale(min(xs), max(xs), left, right), scale(min(ys), max(ys), bottom, TOP)
    chart = Image.new("RGB", SIZE, PAPER)
    draw = ImageDraw.Draw(chart)
    write(draw, (left, 30), title, 24)
    write(draw, (left, SIZE[1] - 34), across, 16, FAINT)
    for i in range(TICKS + 1):
        x, y = (min(values) + (max(values) - min(values)) * i / TICKS for values in (xs, ys))
        write(draw, (int(x_of(x)) - 12, bottom + 10), f"{x:.0f}", 14, FAINT)
        write(draw, (left - 64, int(y_of(y)) - 9), f"{y:.3g}", 14, FAINT)
        draw.line([(left, y_of(y)), (right, y_of(y))], fill=(232, 234, 238))
    for colour, (name, points) in zip(COLOURS, curves.items(), strict=False):
        draw.line([(x_of(x), y_of(y)) for x, y in points], fill=colour, width=3, joint="curve")
        for x in range(left, right, 12):
            draw.line([(x, y_of(aims[name])), (x + 6, y_of(aims[name]))], fill=colour)
        write(draw, (right + 12, int(y_of(points[-1][1])) - 9), f"{name}; dashed {aim}", 15, colour)
    return chart


def scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """[low, high] -> [start, end]."""
    return lambda value: start + (end - start) * (value - low) / ((high - low) or 1)
