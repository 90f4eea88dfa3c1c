"""Draws what a workflow does: its groups, the nodes of this pack in them, and what goes from group to group."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..harness.environment import CHECKOUT
from ..harness.graphs import COMMENTS

Colour = tuple[int, int, int]
Point = tuple[float, float]

NIGHT, INK, FAINT, GOLD = (32, 32, 32), (240, 240, 240), (160, 160, 160), (255, 176, 59)
GROUP, MODEL = (52, 66, 78), (179, 157, 219)
NAMED = {
    "MODEL": ("model", MODEL),
    "REWARD": ("reward", GOLD),
    "GUIDANCE_DATA": ("samples", GOLD),
    "GUIDANCE_NETWORK": ("network", GOLD),
}
"""What this pack works with: how it is written beside a link, and in which colour. Every other link is grey."""
OVERSAMPLING = 3
WIDTH, HEADING, LINE, PADDING, GAP, SIDEWAYS = 208, 23, 18, 5, 21, 24
"""Of a box its width, the heights of its title and of the lines below, and the distances within, to the next row and beside; in pixels."""
PORTS, BENDS = (0.5, 0.14, 0.86), (0.5, 0.9, 0.1)
"""Where on its width links leave a box and come in, and where on the way they turn aside."""


@dataclass(frozen=True)
class Link:
    origin: int
    target: int
    kind: str
    """A key of NAMED if it brings this to a node of this pack that works with it, else empty."""


@dataclass(frozen=True)
class Box:
    x: float
    y: float
    width: float
    height: float

    @property
    def middle(self) -> float:
        return self.x + self.width / 2

    def holds(self, points: np.ndarray) -> int:
        """How many of the points (N,2) lie in it, or close to it."""
        return int(
            ((points > (self.x - 4, self.y - 2)) & (points < (self.x + self.width + 4, self.y + self.height + 2)))
            .all(1)
            .sum()
        )


class Workflow:
    """Its groups by number, in the order of the page, and the links from one to another."""

    def __init__(self, workflow: dict):
        self.names = json.loads((CHECKOUT / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))
        groups = sorted(workflow["groups"], key=lambda group: group["bounding"][:2])
        self.titles = [group["title"] for group in groups]
        self.nodes = {node["id"]: node for node in workflow["nodes"] if node["type"] not in COMMENTS}
        self.group_of = {
            id: next(i for i, group in enumerate(groups) if inside(node, group["bounding"]))
            for id, node in self.nodes.items()
        }
        self.links = essential([self.link(*link) for link in workflow["links"]])

    def link(self, _, origin: int, slot: int, target: int, socket: int, kind: str) -> Link:
        taker = self.nodes[target]["type"]
        named = kind in NAMED and taker in self.names and taker != "RewardGuidanceScoreImages"
        return Link(self.group_of[origin], self.group_of[target], kind if named else "")

    def own(self, group: int) -> list[str]:
        """The nodes of this pack, as they are titled."""
        return [
            node.get("title") or self.names[node["type"]]["display_name"]
            for node in self.members(group)
            if node["type"] in self.names
        ]

    def others(self, group: int) -> str:
        return ", ".join(
            node.get("title") or node["type"] for node in self.members(group) if node["type"] not in self.names
        )

    def members(self, group: int) -> list[dict]:
        return [node for id, node in self.nodes.items() if self.group_of[id] == group]

    def rows(self) -> list[list[int]]:
        """Groups below all that they take from."""
        depth = [0] * len(self.titles)
        for _ in depth:
            for link in self.links:
                depth[link.target] = max(depth[link.target], depth[link.origin] + 1)
        return [[group for group, at in enumerate(depth) if at == row] for row in range(max(depth) + 1)]


def inside(node: dict, bounds: Sequence[float]) -> bool:
    x, y, width, height = bounds
    return x <= node["pos"][0] < x + width and y <= node["pos"][1] < y + height


def essential(links: Sequence[Link]) -> list[Link]:
    """The named ones, and the others between groups that nothing else joins, not even by way of a third."""
    apart = sorted(
        {link for link in links if link.origin != link.target}, key=lambda link: (link.origin, link.target, link.kind)
    )
    steps = {(link.origin, link.target) for link in apart}
    named = {(link.origin, link.target) for link in apart if link.kind}

    def leads(origin: int, target: int) -> bool:
        return origin == target or any(leads(b, target) for a, b in steps if a == origin)

    def redundant(origin: int, target: int) -> bool:
        return (origin, target) in named or any(leads(b, target) for a, b in steps if a == origin and b != target)

    return [link for link in apart if link.kind or not redundant(link.origin, link.target)]


def diagram(workflow: dict, width: int, height: int) -> Image.Image:
    """In pixels."""
    flow = Workflow(workflow)
    lines = [[(name, GOLD) for name in flow.own(group)] for group in range(len(flow.titles))]
    detailed = [
        [*own, *([(flow.others(group), FAINT)] if flow.others(group) else [])] for group, own in enumerate(lines)
    ]
    if natural(flow, detailed) <= height:
        lines = detailed
    size = min(1.0, height / natural(flow, lines))
    boxes = placed(flow, lines, width, height, size)
    canvas = Image.new("RGB", (width * OVERSAMPLING, height * OVERSAMPLING), NIGHT)
    sketch = Sketch(ImageDraw.Draw(canvas), size)
    curves = routed(flow.links, boxes)
    for path, link in curves:
        sketch.curve(path, *NAMED.get(link.kind, ("", FAINT))[1:])
    for group, box in boxes.items():
        sketch.box(box, flow.titles[group], lines[group])
    for path, link in curves:
        sketch.arrow(path, *NAMED.get(link.kind, ("", FAINT)))
    return canvas.resize((width, height), Image.Resampling.LANCZOS)


Lines = Sequence[Sequence[tuple[str, Colour]]]
"""Of each group, what is written below its title."""


def natural(flow: Workflow, lines: Lines) -> float:
    rows = flow.rows()
    return sum(max(tall(lines[group]) for group in row) for row in rows) + GAP * (len(rows) - 1)


def tall(lines: Sequence) -> float:
    return HEADING + LINE * len(lines) + 2 * PADDING


def placed(flow: Workflow, lines: Lines, width: int, height: int, size: float) -> dict[int, Box]:
    """Rows from the top to the bottom; a group below the middle of those that it takes from."""
    rows, boxes = flow.rows(), dict[int, Box]()
    gap = GAP * size + (height - natural(flow, lines) * size) / max(len(rows) - 1, 1)
    y = 0.0
    for row in rows:
        wide = min(WIDTH, (width - SIDEWAYS * (len(row) - 1)) / len(row))
        wish = {
            group: np.mean([boxes[link.origin].middle for link in flow.links if link.target == group] or [width / 2])
            for group in row
        }
        free = width - len(row) * wide - SIDEWAYS * (len(row) - 1)
        x = float(np.clip(wish[row[0]] - wide / 2, 0, free)) if len(row) == 1 else free / 2
        for group in sorted(row, key=lambda group: wish[group]):
            boxes[group] = Box(x, y, wide, tall(lines[group]) * size)
            x += wide + SIDEWAYS
        y += max(boxes[group].height for group in row) + gap
    return boxes


Port = tuple[int, bool, float]
"""A group, whether the link leaves it, and where on its width."""


def routed(links: Sequence[Link], boxes: dict[int, Box]) -> list[tuple[np.ndarray, Link]]:
    """A curve (N,2) for each link."""
    taken, curves = set[Port](), []
    for link in links:
        path, ports = best_way(link, boxes, taken)
        taken |= ports
        curves.append((path, link))
    return curves


def best_way(link: Link, boxes: dict[int, Box], taken: set[Port]) -> tuple[np.ndarray, set[Port]]:
    """The way that meets no other box, and shares no port if there is a choice, and is short."""
    others = [box for group, box in boxes.items() if group not in (link.origin, link.target)]
    ways = [
        (
            curve(boxes[link.origin], boxes[link.target], leave, arrive, bend),
            {(link.origin, True, leave), (link.target, False, arrive)},
        )
        for leave, arrive, bend in product(PORTS, PORTS, BENDS)
    ]

    def cost(way: tuple[np.ndarray, set[Port]]) -> float:
        path, ports = way
        shared = sum(1 if leaves else 2 for _, leaves, _ in taken & ports)
        return 100 * sum(box.holds(path) for box in others) + 60 * shared + abs(path[-1, 0] - path[0, 0])

    return min(ways, key=cost)


def curve(origin: Box, target: Box, leave: float, arrive: float, bend: float, points: int = 40) -> np.ndarray:
    """A cubic (N,2) that leaves and arrives upright."""
    start = np.array([origin.x + leave * origin.width, origin.y + origin.height])
    end = np.array([target.x + arrive * target.width, target.y])
    down = np.array([0, end[1] - start[1]])
    times = np.linspace(0, 1, points + 1)[:, None]
    weights = np.hstack([(1 - times) ** 3, 3 * times * (1 - times) ** 2, 3 * times**2 * (1 - times), times**3])
    return weights @ np.array([start, start + bend * down, end - (1 - bend) * down, end])


@dataclass(frozen=True)
class Sketch:
    """Draws on a canvas so many times as fine as the pixels; letters in `size` of theirs."""

    draw: ImageDraw.ImageDraw
    size: float

    def curve(self, path: np.ndarray, colour: Colour) -> None:
        self.draw.line(
            [tuple(point) for point in (path * OVERSAMPLING).tolist()], colour, round(2.5 * OVERSAMPLING), "curve"
        )

    def arrow(self, path: np.ndarray, name: str, colour: Colour) -> None:
        x, y = path[-1]
        self.draw.polygon([self.at(x - 6, y - 8), self.at(x + 6, y - 8), self.at(x, y + 1)], colour)
        from_the_right = path[0, 0] > x + 1
        self.write(
            (x - 9 if from_the_right else x + 9, y - 9 * self.size), name, 14, colour, "rm" if from_the_right else "lm"
        )

    def box(self, box: Box, title: str, lines: Sequence[tuple[str, Colour]]) -> None:
        self.draw.rounded_rectangle(
            (*self.at(box.x, box.y), *self.at(box.x + box.width, box.y + box.height)), 8 * OVERSAMPLING, GROUP
        )
        y = box.y + (PADDING + HEADING / 2) * self.size
        self.write((box.middle, y), title, 19, INK, "mm", box.width)
        y += (HEADING + LINE) / 2 * self.size
        for text, colour in lines:
            self.write((box.middle, y), text, 14.5, colour, "mm", box.width)
            y += LINE * self.size

    def write(
        self, place: Point, text: str, height: float, colour: Colour, anchor: str, width: float = float("inf")
    ) -> None:
        font = ImageFont.load_default(height * self.size * OVERSAMPLING)
        whole = text
        while font.getlength(text) > (width - 2 * PADDING) * OVERSAMPLING:
            whole = whole[:-1]
            text = whole.rstrip(" ,") + "…"
        self.draw.text(self.at(*place), text, colour, font, anchor)

    @staticmethod
    def at(x: float, y: float) -> Point:
        return x * OVERSAMPLING, y * OVERSAMPLING
