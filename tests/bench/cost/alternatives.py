"""An image by guidance and by what could be used instead, on the same model."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from bench.peers.best_of_n import best_of_n
from bench.peers.fk_steering import fk_steering
from bench.peers.gradient_guidance import dps, flowchef
from bench.peers.noise_optimisation import noise_optimisation
from bench.peers.problem import PlainVAE, Problem
from reward_guidance.guidance.files import Card
from reward_guidance.guidance.network import Architecture, GuidanceNetwork
from reward_guidance.nodes.runtime import LatentReward, LoadedNetwork, base_of, loaded_reward, manage_network, tilt
from torch import Tensor

from . import sizes
from .clock import Spread, by_turns, peak_bytes, seconds
from .report import Report
from .steps import MEGABYTE
from .world import World, managed

T = TypeVar("T")
TABLE = "An image, beside what could be used instead"


@dataclass(frozen=True)
class Sizes:
    families: list[str]
    side: int
    steps: int
    iterations: int
    """Of noise optimisation; its authors take 50."""
    repeats: int


class Contest:
    """One model, on which all methods but ours go through the full VAE."""

    def __init__(self, world: World, of: Sizes):
        self.world, self.of = world, of
        decoder = PlainVAE(sizes.vae(world.family, world.reduced), world.latent_format)
        self.reward = LatentReward(managed("PickScore", world.reduced), decoder, sizes.PROMPT)
        self.network = noise_network(world)
        self.many, self.one = self.problem(of.steps), self.problem(1, cfg=1.0)

    def problem(self, steps: int, cfg: float | None = None) -> Problem:
        def draw(model, sampler, count: int) -> Tensor:
            return self.world.sample(self.noise(count), steps, model, sampler, cfg)

        return Problem(self.world.model, self.reward, draw)

    def noise(self, count: int = 1) -> Tensor:
        return self.world.noise(self.of.side, count)

    @torch.inference_mode()
    def guided(self) -> Tensor:
        """Ours: the lagged shift, through the tiny decoder."""
        attach = self.world.guidance(self.world.reward("PickScore", "taesd"))
        return self.many.draw(attach(self.world.model), None, 1)

    @torch.inference_mode()
    def tilted(self) -> Tensor:
        """Ours for one-step models: a network tilts the noise in four steps of its own."""
        return self.world.sample(tilt(self.network, self.noise(), self.world.positive, 4, 1.0), 1, cfg=1.0)

    @torch.inference_mode()
    def plain(self, problem: Problem) -> Tensor:
        return problem.sample()

    def methods(self) -> dict[str, tuple[Callable[[], Tensor], int, str]]:
        """Name -> method, its model calls by those of an unguided image, and what goes backward through the model."""
        iterations = self.of.iterations
        many = {
            "unguided": (partial(self.plain, self.many), 1, ""),
            "`shift`, taesd (ours)": (self.guided, 1, ""),
            "best of 4": (partial(best_of_n, self.many), 4, ""),
            "FK steering, 4 particles": (partial(fk_steering, self.many), 4, ""),
            "FlowChef": (partial(flowchef, self.many), 1, ""),
            "DPS, FreeDoM": (partial(dps, self.many), 1, "every call"),
        }
        one = {
            "one step, unguided": (partial(self.plain, self.one), 0, ""),
            "one step, guidance network (ours)": (self.tilted, 0, ""),
            f"one step, ReNO, {iterations} iterations": (partial(noise_optimisation, self.one, iterations), 0, "every call"),
        }
        return many | one


def noise_network(world: World) -> LoadedNetwork:
    family = world.family
    architecture = Architecture(family.channels, 1, tokens=family.tokens[1], pooled=family.pooled)
    card = Card(base_of(world.model, "noise"), "noise", "weighted", 1.0, ("PickScore",), (1.0,), 0.0, 1.0, "", 1, 1, 1.0, ())
    return manage_network(GuidanceNetwork(architecture.fitted(family.shape(512, 1)[1:])).requires_grad_(False), card)


def rows(report: Report, world: World, of: Sizes) -> None:
    contest = Contest(world, of)
    known = contest.methods()

    def measured(name: str, by: Callable[[Callable[[], object]], T]) -> T:
        with torch.no_grad(), loaded_reward(contest.reward):
            return by(known[name][0])

    turns = by_turns({name: partial(measured, name, seconds) for name in known}, of.repeats)
    for name, (_, calls, backward) in known.items():
        base = "`shift`, taesd (ours)" if calls else "one step, guidance network (ours)"
        report.add(
            TABLE,
            {
                "method": name,
                "model": world.name,
                "pixels": of.side,
                "steps": of.steps if calls else 1,
                "model calls": calls * of.steps or (of.iterations if "ReNO" in name else 1),
                "backward through the model": backward,
                "s per image": Spread.of([turn[name] for turn in turns]),
                "as a multiple of ours": Spread.of([turn[name] / turn[base] for turn in turns]),
                "peak, MB": round(measured(name, peak_bytes) / MEGABYTE),
            },
        )
