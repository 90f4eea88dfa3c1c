"""How the cost of a guided step grows, beside that of the plain one."""

from dataclasses import dataclass
from functools import partial

import comfy.samplers
import torch
from harness.chart import draw_chart
from reward_guidance.guidance.particles import Population
from reward_guidance.nodes.runtime import RewardBeside

from .clock import by_turns, seconds
from .report import Report
from .steps import Variant, sampled, typical
from .world import World

TABLE = "How the cost grows"


@dataclass(frozen=True)
class Sizes:
    family: str
    batches: tuple[int, ...]
    sides: tuple[int, ...]
    steps: tuple[int, ...]
    smoothing: tuple[int, ...]
    particles: tuple[int, ...]


def rows(report: Report, world: World, of: Sizes) -> None:
    """A row for each place, and a curve in milliseconds for each way to grow."""
    small = of.sides[0]

    def stepwise(side: int, batch: int, smoothing: int = 0) -> tuple[float, float]:
        variants = {"plain": None, "guided": Variant("PickScore", "taesd", smoothing)}
        runs = {name: partial(sampled, world, side, batch, variant) for name, variant in variants.items()}
        return fastest([{name: typical(steps) for name, steps in turn.items()} for turn in by_turns(runs, REPEATS)])

    grow(report, world, "batch", of.batches, lambda batch: stepwise(small, batch))
    grow(report, world, "pixels", of.sides, lambda side: stepwise(side, 1))
    grow(report, world, "smoothing k", of.smoothing, lambda k: stepwise(small, 1, k))
    grow(report, world, "steps of an image", of.steps, lambda steps: whole(world, small, steps))


def crowds(report: Report, world: World, of: Sizes) -> None:
    """The same for reward particles."""
    grow(report, world, "particles of an image", of.particles, lambda particles: population(world, of.sides[0], particles))


def grow(report: Report, world: World, along: str, places, at) -> None:
    curves: dict[str, list[tuple[float, float]]] = {"plain": [], "guided": [], "what guidance adds": []}
    for place in places:
        plain, guided = at(place)
        values = (plain * 1000, guided * 1000, (guided - plain) * 1000)
        for curve, value in zip(curves.values(), values, strict=True):
            curve.append((place, value))
        names = ("plain, ms", "guided, ms", "added, ms")
        ratio = {"guided / plain": guided / plain}
        report.add(TABLE, {"model": world.name, "along": along, "at": place} | dict(zip(names, values, strict=True)) | ratio)
    picture = draw_chart(f"{world.name}: milliseconds", along, curves, logarithmic=places[0] > 0 and places[-1] <= 64)
    picture.save(report.folder / f"{report.name}_{along.split()[0]}.png")


def whole(world: World, side: int, steps: int) -> tuple[float, float]:
    """Seconds of an image, plain and guided."""
    runs = {name: partial(sampled, world, side, 1, variant, steps) for name, variant in VARIANTS.items()}
    return fastest(by_turns({name: partial(seconds, run) for name, run in runs.items()}, REPEATS))


VARIANTS = {"plain": None, "guided": Variant("PickScore", "taesd")}
REPEATS = 3


def fastest(turns: list[dict[str, float]]) -> tuple[float, float]:
    """Of the plain and of the guided runs; what else a machine does only adds."""
    return min(turn["plain"] for turn in turns), min(turn["guided"] for turn in turns)


def population(world: World, side: int, particles: int, steps: int = 8) -> tuple[float, float]:
    """Seconds for so many samples, without and with a look at their rewards every fourth step."""
    from reward_guidance.nodes.particles import ParticleSampler  # a node, for which ComfyUI wants more packages

    reward = world.reward("PickScore", "taesd")

    @torch.inference_mode()
    def run(guided: bool) -> None:
        sampler, model = comfy.samplers.sampler_object("euler_ancestral"), world.model
        if guided:
            crowd = Population(particles, temperature=0.05, generator=torch.Generator().manual_seed(0))
            sampler.sampler_function = ParticleSampler(sampler.sampler_function, reward, crowd, every=4)
            model = RewardBeside(reward).attach(model)
        world.sample(world.noise(side, particles), steps, model, sampler)

    return fastest(by_turns({"plain": partial(seconds, partial(run, False)), "guided": partial(seconds, partial(run, True))}, REPEATS))
