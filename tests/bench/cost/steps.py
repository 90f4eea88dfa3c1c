"""A guided step beside the plain one: time, memory, and where both go."""

import statistics
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch

from .clock import Spread, Timeline, by_turns, clocked, peak_bytes, synchronisations, watched
from .report import Report, share
from .world import World, weights

MEGABYTE = 2**20


@dataclass(frozen=True)
class Variant:
    """How to guide."""

    reward: str
    decoder: str
    smoothing: int = 0
    every: int = 1


@torch.inference_mode()
def sampled(world: World, side: int, batch: int, variant: Variant | None, steps: int) -> list[Counter[str]]:
    """Seconds of each part, step by step."""
    timeline = Timeline()
    noise = world.noise(side, batch)
    run: Callable = partial(world.sample, noise, steps + 1, callback=timeline.next_step)
    if variant is None:
        run(model=clocked(world.model, timeline))
        return timeline.steps()
    reward = world.reward(variant.reward, variant.decoder)
    with watched(reward, timeline):
        run(model=clocked(world.model, timeline, world.guidance(reward, variant.smoothing, variant.every)))
    return timeline.steps()


def typical(steps: list[Counter[str]], part: str | None = None) -> float:
    """Mean seconds of a step, or of a part of one; the mean, since not every step need look at the reward."""
    return statistics.mean(sum(step.values()) if part is None else step[part] for step in steps)


@dataclass(frozen=True)
class Measured:
    """Of one variant, in turns with the plain step."""

    plain: Spread
    """Milliseconds of a step."""
    guided: Spread
    ratio: Spread
    parts: dict[str, float]
    """Shares of the guided step."""


@dataclass(frozen=True)
class Effort:
    """How much of each is measured."""

    steps: int
    repeats: int


def measure(world: World, side: int, batch: int, variants: list[Variant], effort: Effort) -> list[Measured]:
    runs = {"plain": partial(sampled, world, side, batch, None, effort.steps)}
    runs |= {str(variant): partial(sampled, world, side, batch, variant, effort.steps) for variant in variants}
    turns = by_turns(runs, effort.repeats)
    plain = [typical(turn["plain"]) for turn in turns]

    def of(variant: Variant) -> Measured:
        steps = [turn[str(variant)] for turn in turns]
        guided = [typical(each) for each in steps]
        names = {part for each in steps for step in each for part in step}
        parts = {
            part: statistics.median(typical(each, part) for each in steps) / statistics.median(guided) for part in names
        }
        ratio = Spread.of(g / p for g, p in zip(guided, plain, strict=True))
        return Measured(milliseconds(plain), milliseconds(guided), ratio, parts)

    return [of(variant) for variant in variants]


def milliseconds(values: Iterable[float]) -> Spread:
    """Of seconds."""
    return Spread.of(value * 1000 for value in values)


def rows(
    report: Report, table: str, world: World, side: int, batch: int, variants: list[Variant], effort: Effort
) -> None:
    """A row for each variant. Memory is looked at once everything has run."""
    timed = measure(world, side, batch, variants, effort)
    plain = partial(sampled, world, side, batch, None, 1)
    plain_peak, plain_waits = peak_bytes(plain), synchronisations(plain)
    for variant, found in zip(variants, timed, strict=True):
        reward = world.reward(variant.reward, variant.decoder)
        once = partial(sampled, world, side, batch, variant, 1)
        peak = peak_bytes(once) - plain_peak
        backward = found.parts.get("decode backward", 0)
        waits = synchronisations(once)
        report.add(
            table,
            {
                "model": world.name,
                "pixels": side,
                "batch": batch,
                "reward": variant.reward,
                "decoder": variant.decoder + (f", every {variant.every} steps" if variant.every > 1 else ""),
                "plain step, ms": found.plain,
                "guided step, ms": found.guided,
                "guided / plain": found.ratio,
                "decode": share(found.parts.get("decode", 0) + backward),
                "reward forward": share(found.parts.get("reward", 0)),
                "reward backward": share(found.parts.get("reward backward", 0)),
                "ours": share(found.parts.get("ours", 0)),
                "peak over plain, MB": round(peak / MEGABYTE),
                "weights, MB": round(weights(reward.loaded.reward, *reward.decoder.modules) / MEGABYTE),
                **({} if waits is None or plain_waits is None else {"waits over plain, 2 steps": waits - plain_waits}),
            },
        )


WOULD_BRING = [
    Variant("PickScore", "taesd"),
    Variant("PickScore", "taesd", every=2),
    Variant("PickScore", "taesd, float32"),
    Variant("PickScore", "taesd, channels last"),
    Variant("PickScore", "taesd, whole size"),
    Variant("PickScore", "taesd, half size"),
    Variant("PickScore", "taesd, quarter size"),
]
"""What could be changed, each alone."""
