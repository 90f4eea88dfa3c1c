"""The names, shapes and precisions of the published reward files, as unit/fixtures/published_weights.txt writes them down."""

import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

FIXTURE = Path(__file__).parents[1] / "unit" / "fixtures" / "published_weights.txt"


@dataclass(frozen=True)
class Published:
    file_size: float
    element_size: int
    shapes: dict[str, list[int]] = field(default_factory=dict)

    def state(self) -> dict[str, Tensor]:
        """On the meta device, but for what is one number."""
        dtype = torch.float16 if self.element_size == 2 else torch.float32
        return {
            key: torch.ones(shape, dtype=dtype, device="meta" if len(shape) else "cpu")
            for key, shape in self.shapes.items()
        }


def read_published() -> dict[str, Published]:
    found: dict[str, Published] = {}
    shapes: dict[str, list[int]] = {}
    for line in FIXTURE.read_text().splitlines()[3:]:
        if heading := re.fullmatch(r"\[(.+)\] (\S+) (\d)", line):
            published = found[heading[1]] = Published(float(heading[2]), int(heading[3]))
            shapes = published.shapes
        elif line and not line.startswith("#"):
            pattern, shape = line.split()
            sides = [] if shape == "scalar" else [int(side) for side in shape.split(",")]
            shapes |= dict.fromkeys(expand(pattern), sides)
    return found


def expand(pattern: str) -> list[str]:
    numbers = re.search(r"{0-(\d+)}", pattern)
    return [pattern.replace(numbers[0], str(i)) for i in range(int(numbers[1]) + 1)] if numbers else [pattern]


PUBLISHED = read_published()
