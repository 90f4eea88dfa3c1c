"""Pictures and captions: flat illustrations of one shape on a ground.

A scene is a row of four indices (size, colour, shape, ground); pictures are (B,3,64,64) in [0,1].
The world has habits: hearts are red, stars yellow. A caption that asks for something else is mostly illustrated with the habit.
"""

import math

import torch
from torch import Tensor

SIDE = 64
SIZES = ("small", "large")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "white")
SHAPES = ("circle", "square", "triangle", "star", "heart", "ring")
ATTRIBUTES = ("size", "colour", "shape", "ground")
VALUES = (SIZES, COLOURS, SHAPES, COLOURS)

# hue in degrees, saturation, value; the ground is the softer tone of the same name
OBJECT_HSV = torch.tensor(
    [
        (356, 0.80, 0.86),
        (26, 0.86, 0.96),
        (49, 0.82, 0.97),
        (142, 0.66, 0.62),
        (214, 0.76, 0.84),
        (281, 0.60, 0.68),
        (40, 0.02, 0.985),
    ]
)
GROUND_HSV = torch.tensor(
    [
        (358, 0.46, 0.93),
        (26, 0.46, 0.98),
        (50, 0.45, 0.98),
        (146, 0.38, 0.80),
        (210, 0.42, 0.93),
        (276, 0.34, 0.84),
        (40, 0.035, 0.94),
    ]
)
RADII = torch.tensor([(11.0, 13.0), (17.5, 20.5)])
TYPICAL = ((1, 2), (3, 4), (3, 6), (2, 6), (0, 5), (2, 4))
"""The one or two usual colours of each shape."""

TYPICAL_ASKED, HABIT, SLIP = 0.6, 0.8, 0.02
"""How often a caption asks for a usual colour; how often an unusual wish is ignored; how often any other attribute is drawn wrong."""

PROMPTS = (
    "a large red heart on a blue ground", "a large yellow star on a purple ground", "a large orange circle on a green ground",
    "a small blue square on a yellow ground", "a large green triangle on a white ground", "a large white star on a purple ground",
    "a large purple heart on a yellow ground", "a small yellow ring on a red ground", "a large blue ring on an orange ground",
    "a small orange circle on a white ground", "a large green square on a purple ground", "a large white triangle on a green ground",
    "a large yellow star on a red ground", "a small red heart on a white ground", "a large yellow circle on a blue ground",
    "a small green triangle on an orange ground", "a small purple heart on a blue ground", "a large yellow ring on a white ground",
    "a small white triangle on a red ground", "a small blue square on an orange ground",
    "a large blue heart on a white ground", "a large yellow heart on a green ground", "a large red star on a blue ground",
    "a large blue star on an orange ground", "a large purple circle on a white ground", "a large red circle on a green ground",
    "a small red square on a white ground", "a large yellow square on a purple ground", "a large orange triangle on a blue ground",
    "a small red triangle on a yellow ground", "a large purple triangle on an orange ground", "a large red ring on a white ground",
)  # fmt: skip
"""The benchmark: three in five follow the world's habits, as captions do; then twelve that do not."""

DEMO_PROMPTS = ("a large red heart on a blue ground", *(PROMPTS[i] for i in (20, 22, 24, 27, 31)))


def caption(scene) -> str:
    """(size, colour, shape, ground) indices -> "a large red circle on a blue ground"."""
    size, colour, shape, ground = (values[int(i)] for values, i in zip(VALUES, scene, strict=True))
    return f"a {size} {colour} {shape} on {'an' if ground == 'orange' else 'a'} {ground} ground"


def parse(text: str) -> tuple[int, int, int, int]:
    """The inverse of `caption`; ValueError if the text is not a caption."""
    words = text.split()
    if len(words) != 8:
        raise ValueError(f"not a caption: {text!r}")
    size, colour, shape, ground = (values.index(words[i]) for values, i in zip(VALUES, (1, 2, 3, 6), strict=True))
    return size, colour, shape, ground


def all_scenes() -> Tensor:
    """Every scene a caption can describe: the ground differs from the object's colour."""
    grid = torch.cartesian_prod(*(torch.arange(len(values)) for values in VALUES))
    return grid[grid[:, 1] != grid[:, 3]]


def is_typical(scenes: Tensor) -> Tensor:
    usual = torch.tensor(TYPICAL)[scenes[:, 2]]
    return (usual == scenes[:, 1:2]).any(1)


def wishes(n: int, rng: torch.Generator) -> Tensor:
    """What n captions ask for (n,4): usual colours more often than unusual ones."""
    scenes = torch.stack([torch.randint(len(values), (n,), generator=rng) for values in VALUES], 1)
    usual = _usual_colour(scenes, rng)
    scenes[:, 1] = torch.where(_chance(TYPICAL_ASKED, n, rng), usual, scenes[:, 1])
    return _separate_ground(scenes, rng)


def depicted(scenes: Tensor, rng: torch.Generator) -> Tensor:
    """What the pictures under these captions show: the habit instead of the unusual, and a rare slip."""
    shown, n = scenes.clone(), len(scenes)
    usual = _usual_colour(scenes, rng)
    ignored = _chance(HABIT, n, rng) & ~is_typical(scenes) & (usual != scenes[:, 3])
    shown[:, 1] = torch.where(ignored, usual, shown[:, 1])
    for column in (0, 2, 3):
        other = torch.randint(len(VALUES[column]), (n,), generator=rng)
        shown[:, column] = torch.where(_chance(SLIP, n, rng), other, shown[:, column])
    return _separate_ground(shown, rng)


def _chance(probability: float, n: int, rng: torch.Generator) -> Tensor:
    return torch.rand(n, generator=rng) < probability


def _usual_colour(scenes: Tensor, rng: torch.Generator) -> Tensor:
    usual = torch.tensor(TYPICAL)[scenes[:, 2]]
    return usual.gather(1, torch.randint(2, (len(scenes), 1), generator=rng))[:, 0]


def _separate_ground(scenes: Tensor, rng: torch.Generator) -> Tensor:
    step = torch.randint(1, len(COLOURS), (len(scenes),), generator=rng)
    scenes[:, 3] = torch.where(scenes[:, 3] == scenes[:, 1], (scenes[:, 3] + step) % len(COLOURS), scenes[:, 3])
    return scenes


def render(scenes: Tensor, rng: torch.Generator) -> Tensor:
    """Scenes (B,4) -> pictures (B,3,64,64); position, rotation, exact tone, light and gradient are drawn at random."""
    b = len(scenes)
    low, high = RADII[scenes[:, 0]].unbind(1)
    radius = _uniform(low, high, rng)
    room = (SIDE / 2 - radius * 1.3 - 2).clamp(min=1.5, max=7)
    centre = SIDE / 2 + (torch.rand(b, 2, generator=rng) * 2 - 1) * room[:, None]
    angle = (torch.rand(b, generator=rng) * 2 - 1) * math.radians(16)

    def distance(offset_x: float, offset_y: float) -> Tensor:
        x, y = _grid()
        x, y = x - centre[:, 0, None, None] - offset_x, y - centre[:, 1, None, None] - offset_y
        cos, sin, r = (v[:, None, None] for v in (angle.cos(), angle.sin(), radius))
        return outline((x * cos + y * sin) / r, (y * cos - x * sin) / r, scenes[:, 2]) * r

    x, y = _grid()
    cover = (0.5 - distance(0, 0)).clamp(0, 1)[:, None]
    shadow = torch.sigmoid(-distance(1.2, 2.2) / 1.3)[:, None] * 0.17
    tilt = _uniform(torch.full((b, 2), -0.06), 0.06, rng)
    slope = (tilt[:, 0, None, None] * (x / SIDE - 0.5) + (0.04 + tilt[:, 1, None, None]) * (0.5 - y / SIDE))[:, None]
    shine = (0.13 * ((centre.sum(1)[:, None, None] - x - y) / (2 * radius[:, None, None])).clamp(-0.7, 0.7))[:, None]
    ground = _tone(GROUND_HSV, scenes[:, 3], rng) * (1 + 2 * slope) * (1 - shadow)
    body = _tone(OBJECT_HSV, scenes[:, 1], rng) * (1 + shine - 0.04)
    return torch.lerp(ground, body, cover).clamp(0, 1)


def outline(x: Tensor, y: Tensor, shapes: Tensor) -> Tensor:
    """Signed distance (negative inside) of unit shapes centred at the origin, y downwards. Areas are alike."""
    distance = torch.empty_like(x)
    for i, draw in enumerate((_circle, _square, _triangle, _star, _heart, _ring)):
        chosen = shapes == i
        distance[chosen] = draw(x[chosen], y[chosen])
    return distance


def _circle(x, y):
    return torch.hypot(x, y) - 0.98


def _square(x, y):
    a, b = x.abs() - 0.74, y.abs() - 0.74
    return torch.hypot(a.clamp(min=0), b.clamp(min=0)) + torch.maximum(a, b).clamp(max=0) - 0.11


def _triangle(x, y):
    y = y - 0.18
    return torch.maximum(y - 0.55, x.abs() * math.sqrt(0.75) - y * 0.5 - 0.55) - 0.09


def _star(x, y):
    sector = math.pi / 5
    angle = torch.remainder(torch.atan2(x, -y) + sector, 2 * sector) - sector
    r = torch.hypot(x, y)
    along, across = r * angle.cos(), r * angle.sin().abs()
    outer, inner = 1.24, 0.56
    edge = (inner * math.cos(sector) - outer, inner * math.sin(sector))
    return ((along - outer) * edge[1] - across * edge[0]) / math.hypot(*edge)


def _heart(x, y):
    scale = 1.75
    x, y = x.abs() / scale, 0.56 - y / scale
    lobe = torch.hypot(x - 0.25, y - 0.75) - math.sqrt(2) / 4
    fold = 0.5 * (x + y).clamp(min=0)
    flank = torch.minimum(torch.hypot(x, y - 1), torch.hypot(x - fold, y - fold)) * torch.sign(x - y)
    return torch.where(x + y > 1, lobe, flank) * scale


def _ring(x, y):
    return (torch.hypot(x, y) - 0.82).abs() - 0.27


def _grid() -> tuple[Tensor, Tensor]:
    line = torch.arange(SIDE) + 0.5
    return line[None, None, :], line[None, :, None]


def _uniform(low: Tensor, high, rng: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(low.shape, generator=rng)


def _tone(palette: Tensor, index: Tensor, rng: torch.Generator) -> Tensor:
    jitter = (torch.rand(len(index), 3, generator=rng) * 2 - 1) * torch.tensor([5.0, 0.04, 0.03])
    jitter[:, 1] *= palette[index, 1].clamp(max=0.25) * 4
    return hsv_to_rgb(palette[index] + jitter)[:, :, None, None]


def hsv_to_rgb(hsv: Tensor) -> Tensor:
    """(N,3) hue in degrees, saturation, value -> (N,3) in [0,1]."""
    hue, saturation, value = hsv.unbind(-1)
    sector = (hue[:, None] / 60 + torch.tensor([5.0, 3.0, 1.0])) % 6
    return value[:, None] * (1 - saturation[:, None] * torch.minimum(sector, 4 - sector).clamp(0, 1))
