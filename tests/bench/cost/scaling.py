"""How the cost of a guided step grows, beside that of the plain one."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import comfy.samplers
import torch
from reward_guidance.guidance.particles import Population
from reward_guidance.nodes.wiring.patch_reward import ScoringHooks
from reward_guidance.tests.tools.chart import draw_chart

from .clock import Spread, by_turns, seconds
from .report import Report
from .steps import Effort, Variant, milliseconds, sampled, typical
from .world import World

TABLE, EXPONENTS = "How the cost grows", "How fast it grows: e in cost ~ x^e"
VARIANTS = {"plain": None, "guided": Variant("PickScore", "taesd")}
Turns = Sequence[dict[str, float]]
"""Seconds of repeats."""


@dataclass(frozen=True)
class Sizes:
    family: str
    batches: tuple[int, ...]
    sides: tuple[int, ...]
    steps: tuple[int, ...]
    smoothing: tuple[int, ...]
    particles: tuple[int, ...]
    effort: Effort


def rows(report: Report, world: World, of: Sizes) -> None:
    """A row for each place, a curve in milliseconds for each way to grow, and how steep it is."""
    small = of.sides[0]

    def stepwise(side: int, batch: int, smoothing: int = 0) -> Turns:
        variants = {"plain": None, "guided": Variant("PickScore", "taesd", smoothing)}
        runs = {
            name: partial(sampled, world, side, batch, variant, of.effort.steps) for name, variant in variants.items()
        }
        return [{name: typical(steps) for name, steps in turn.items()} for turn in by_turns(runs, of.effort.repeats)]

    def whole(steps: int) -> Turns:
        runs = {
            name: partial(seconds, partial(sampled, world, small, 1, variant, steps))
            for name, variant in VARIANTS.items()
        }
        return by_turns(runs, of.effort.repeats)

    grow(report, world, "batch", of.batches, lambda batch: stepwise(small, batch))
    grow(report, world, "pixels a side", of.sides, lambda side: stepwise(side, 1))
    grow(report, world, "steps of an image", of.steps, whole)
    grow(report, world, "looks at the reward, smoothing k", of.smoothing, lambda k: stepwise(small, 1, k))


def crowds(report: Report, world: World, of: Sizes) -> None:
    """The same for reward particles."""
    grow(report, world, "particles of an image", of.particles, lambda particles: population(world, of, particles))


def grow(report: Report, world: World, along: str, places: Sequence[int], at: Callable[[int], Turns]) -> None:
    curves: dict[str, list[list[float]]] = {"plain": [], "guided": [], "what guidance adds": []}
    for place in places:
        turns = at(place)
        plain, guided = ([turn[name] for turn in turns] for name in VARIANTS)
        added = [g - p for p, g in zip(plain, guided, strict=True)]
        values = [plain, guided, added]
        for curve, value in zip(curves.values(), values, strict=True):
            curve.append(value)
        times = dict(zip(("plain, ms", "guided, ms", "added, ms"), map(milliseconds, values), strict=True))
        ratio = Spread.of(g / p for p, g in zip(plain, guided, strict=True))
        report.add(TABLE, {"model": world.name, "along": along, "at": place} | times | {"guided / plain": ratio})
    exponents = {name: exponent(places, curve) for name, curve in curves.items()}
    report.add(EXPONENTS, {"model": world.name, "along": along, "from": places[0], "to": places[-1]} | exponents)
    middles = {
        name: [(x, statistics.median(ys) * 1000) for x, ys in zip(places, curve, strict=True)]
        for name, curve in curves.items()
    }
    picture = draw_chart(f"{world.name}: milliseconds", along, middles, logarithmic=places[-1] <= 64)
    picture.save(report.folder / f"{report.name}_{along.split()[0]}.png")


def exponent(places: Sequence[int], curve: Sequence[Sequence[float]]) -> Spread | None:
    """The slope of least squares through the logarithms, of each repeat; none where a cost is lost in the noise."""
    if min(map(min, curve)) <= 0:
        return None
    xs = list(map(math.log, places))
    return Spread.of(statistics.linear_regression(xs, list(map(math.log, ys))).slope for ys in zip(*curve, strict=True))


def population(world: World, of: Sizes, particles: int, steps: int = 8) -> Turns:
    """Seconds for so many samples, without and with a look at their rewards every fourth step."""
    from reward_guidance.nodes.wiring.particle_run import ParticleSampler

    reward = world.reward("PickScore", "taesd")

    @torch.inference_mode()
    def run(guided: bool) -> None:
        sampler, model = comfy.samplers.sampler_object("euler_ancestral"), world.model
        if guided:
            crowd = Population(particles, temperature=0.05, generator=torch.Generator().manual_seed(0))
            sampler.sampler_function = ParticleSampler(sampler.sampler_function, reward, crowd, every=4)
            model = ScoringHooks(reward).attach(model)
        world.sample(world.noise(of.sides[0], particles), steps, model, sampler)

    return by_turns(
        {"plain": partial(seconds, partial(run, False)), "guided": partial(seconds, partial(run, True))},
        of.effort.repeats,
    )
