"""What is in a picture, from its pixels alone: exact on drawn pictures, sober on decoded ones.

Split the picture into ground (a linear gradient, perhaps in shadow) and object; name the two tones by the nearest colour of the palettes;
turn the object's mask to a common size and name its shape by the best of many turned templates.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import world

FRAME = 28
NOTHING = -1
CONTRAST, OVERLAP, TONE_ERROR = 0.16, 0.72, 0.13
"""Below these contrasts and overlaps, or beyond this distance to every named tone, a picture shows nothing."""


def read(pictures: Tensor) -> Tensor:
    """Pictures (B,3,64,64) in [0,1] -> scenes (B,4), rows of -1 where nothing is recognised."""
    return torch.cat([_read(part.float().clamp(0, 1)) for part in pictures.split(256)])


def describe(picture: Tensor) -> str | None:
    scene = read(picture[None])[0]
    return None if scene[0] == NOTHING else world.caption(scene)


def _read(pictures: Tensor) -> Tensor:
    ground = _ground(pictures)
    mask, tone, contrast = _object(pictures, ground)
    colour, colour_error = _nearest(tone, world.OBJECT_HSV)
    ground_name, ground_error = _nearest(ground.mean((2, 3)), world.GROUND_HSV)
    shape, radius, overlap = _shape(mask)
    size = (radius > (world.RADII[0, 1] + world.RADII[1, 0]) / 2).long()
    seen = (contrast > CONTRAST) & (overlap > OVERLAP) & (torch.maximum(colour_error, ground_error) < TONE_ERROR)
    scenes = torch.stack([size, colour, shape, ground_name], 1)
    return torch.where(seen[:, None], scenes, NOTHING)


def _ground(pictures: Tensor) -> Tensor:
    """The plane through the border pixels, per channel."""
    line = torch.linspace(-1, 1, world.SIDE)
    y, x = torch.meshgrid(line, line, indexing="ij")
    plane = torch.stack([torch.ones_like(x), x, y], -1)
    border = torch.maximum(x.abs(), y.abs()) > 1 - 3 / world.SIDE
    solve = torch.linalg.pinv(plane[border])
    return torch.einsum("hwk,kn,bcn->bchw", plane, solve, pictures[:, :, border])


def _object(pictures: Tensor, ground: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Soft mask (B,64,64), tone (B,3) and contrast (B,) of what differs from the ground by more than a shadow."""
    shade = ((pictures * ground).sum(1, keepdim=True) / ground.square().sum(1, keepdim=True)).clamp(0.78, 1.02)
    difference = (pictures - shade * ground).norm(dim=1)
    contrast = difference.flatten(1).topk(60).values.mean(1)
    sure = (difference > 0.75 * contrast[:, None, None]).float()[:, None]
    tone = (pictures * sure).sum((2, 3)) / sure.sum((2, 3)).clamp(min=1)
    towards = tone[:, :, None, None] - ground
    mask = ((pictures - ground) * towards).sum(1) / towards.square().sum(1).clamp(min=1e-4)
    solid = ((mask - 0.5) * 2 + 0.6).clamp(0, 1)  # shading makes parts of an object paler, not transparent
    return solid * (difference > 0.25 * contrast[:, None, None]), tone, contrast


def _nearest(tone: Tensor, palette: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the closest named tone and the distance to it, brightness counting half."""
    distance = torch.cdist(_opponent(tone), _opponent(world.hsv_to_rgb(palette)))
    error, index = distance.min(1)
    return index, error


def _opponent(rgb: Tensor) -> Tensor:
    r, g, b = rgb.unbind(-1)
    return torch.stack([(r + g + b) / 6, r - g, (r + g) / 2 - b], -1) * torch.tensor([1.0, 0.7, 0.7])


def _shape(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Best shape, its radius in pixels and the overlap (intersection over union) of the mask with the template."""
    templates, areas = _templates()
    overlap = torch.stack(
        [_overlap(_frame(mask, area.sqrt()), bank) for bank, area in zip(templates, areas, strict=True)], 1
    )
    best = overlap.max(1)
    radius = (mask.sum((1, 2)) / areas[best.indices]).sqrt()
    return best.indices, radius, best.values


def _frame(mask: Tensor, scale: Tensor) -> Tensor:
    """The mask moved to the middle of a FRAME x FRAME window that spans 1.4 radii each way; scale is sqrt(area) of the unit shape."""
    weight = mask.flatten(1).sum(1).clamp(min=1)
    line = torch.arange(world.SIDE) + 0.5
    middle = torch.stack([(mask.sum(1) * line).sum(1), (mask.sum(2) * line).sum(1)], 1) / weight[:, None]
    radius = weight.sqrt() / scale
    window = _window()[None] * radius[:, None, None, None] + middle[:, None, None]
    return F.grid_sample(mask[:, None], window / world.SIDE * 2 - 1, align_corners=False)[:, 0]


def _window() -> Tensor:
    line = torch.linspace(-1.4, 1.4, FRAME)
    y, x = torch.meshgrid(line, line, indexing="ij")
    return torch.stack([x, y], -1)


def _overlap(frames: Tensor, bank: Tensor) -> Tensor:
    both = frames.flatten(1) @ bank.flatten(1).T
    either = frames.sum((1, 2))[:, None] + bank.sum((1, 2))[None] - both
    return (both / either).max(1).values


def _templates() -> tuple[list[Tensor], Tensor]:
    """For each shape a bank of turned unit shapes about their centre of mass (N,FRAME,FRAME), and the unit areas."""
    if not _CACHE:
        angles = torch.arange(-44, 45, 4) * math.pi / 180
        for shape in range(len(world.SHAPES)):
            turns = angles if shape not in (0, 5) else angles[:1]
            area, centre = _unit(shape)
            _CACHE.append((_turned(shape, turns, centre), area))
    banks, areas = zip(*_CACHE, strict=True)
    return list(banks), torch.stack(areas)


_CACHE: list[tuple[Tensor, Tensor]] = []


def _unit(shape: int) -> tuple[Tensor, Tensor]:
    line = torch.linspace(-1.5, 1.5, 301)
    y, x = torch.meshgrid(line, line, indexing="ij")
    inside = (world.outline(x[None], y[None], torch.tensor([shape]))[0] < 0).float()
    return inside.sum() * 0.01**2, torch.stack([(inside * x).sum(), (inside * y).sum()]) / inside.sum()


def _turned(shape: int, angles: Tensor, centre: Tensor) -> Tensor:
    x, y = _window().unbind(-1)
    cos, sin = angles.cos()[:, None, None], angles.sin()[:, None, None]
    u, v = x * cos + y * sin + centre[0], y * cos - x * sin + centre[1]
    distance = world.outline(u, v, torch.full((len(angles),), shape))
    return (0.5 - distance * FRAME / 2.8).clamp(0, 1)
