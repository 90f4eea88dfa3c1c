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
from reward_guidance.guidance.network.card import Card
from reward_guidance.guidance.network.unet import Architecture, GuidanceNetwork
from reward_guidance.nodes.wiring.latent_reward import LatentReward, differentiable_context
from reward_guidance.nodes.wiring.loaded import LoadedNetwork, manage_network
from reward_guidance.nodes.wiring.model_info import base_of
from reward_guidance.nodes.wiring.patch_network import tilt_noise
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
    families: tuple[str, ...]
    """The one-step generator among them is asked once; the others are asked `steps` times."""
    side: int
    steps: int
    iterations: int
    """Of noise optimisation; its authors take 50."""
    repeats: int


@dataclass(frozen=True)
class Method:
    run: Callable[[], Tensor]
    calls: int
    """Of the model, for an image."""
    backward: str = ""
    """What goes backward through the model."""


class Contest:
    """One model, on which all methods but ours go through the full VAE."""

    def __init__(self, world: World, of: Sizes):
        self.world, self.of = world, of
        decoder = PlainVAE(sizes.vae(world.family, world.reduced), world.latent_format)
        self.reward = LatentReward(managed("PickScore", world.reduced), decoder, sizes.PROMPT)
        self.steps = 1 if world.family.one_step else of.steps
        self.problem = Problem(world.model, self.reward, self.draw)

    def draw(self, model, sampler, count: int) -> Tensor:
        return self.world.sample(self.noise(count), self.steps, model, sampler)

    def noise(self, count: int = 1) -> Tensor:
        return self.world.noise(self.of.side, count)

    @torch.inference_mode()
    def guided(self) -> Tensor:
        """Ours: the lagged shift, through the tiny decoder."""
        attach = self.world.guidance(self.world.reward("PickScore", "taesd"))
        return self.draw(attach(self.world.model), None, 1)

    @torch.inference_mode()
    def tilted(self, network: LoadedNetwork) -> Tensor:
        """Ours for one-step models: a network tilts the noise in four steps of its own."""
        return self.world.sample(tilt_noise(network, self.noise(), self.world.positive, 4, 1.0), 1)

    @torch.inference_mode()
    def plain(self) -> Tensor:
        return self.problem.sample()

    def methods(self) -> dict[str, Method]:
        """By name. Ours is the second."""
        problem, steps, iterations = self.problem, self.of.steps, self.of.iterations
        if self.world.family.one_step:
            return {
                "one step, unguided": Method(self.plain, 1),
                "one step, guidance network (ours)": Method(partial(self.tilted, noise_network(self.world)), 1),
                "one step, best of 4": Method(partial(best_of_n, problem), 4),
                f"one step, ReNO, {iterations} iterations": Method(
                    partial(noise_optimisation, problem, iterations), iterations, "every call"
                ),
            }
        return {
            "unguided": Method(self.plain, steps),
            "`shift`, taesd (ours)": Method(self.guided, steps),
            "best of 4": Method(partial(best_of_n, problem), 4 * steps),
            "FK steering, 4 particles": Method(partial(fk_steering, problem), 4 * steps),
            "FlowChef": Method(partial(flowchef, problem), steps),
            "DPS, FreeDoM": Method(partial(dps, problem), steps, "every call"),
        }


def noise_network(world: World) -> LoadedNetwork:
    family = world.family
    architecture = Architecture(family.channels, 1, tokens=family.tokens[1], pooled=family.pooled)
    card = Card(
        base_of(world.model, "noise"), "noise", "weighted", 1.0, ("PickScore",), (1.0,), 0.0, 1.0, "", 1, 1, 1.0, ()
    )
    return manage_network(GuidanceNetwork(architecture.fitted(family.shape(512, 1)[1:])).requires_grad_(False), card)


def rows(report: Report, world: World, of: Sizes) -> None:
    contest = Contest(world, of)
    known = contest.methods()
    base = list(known)[1]

    def measured(name: str, by: Callable[[Callable[[], object]], T]) -> T:
        with torch.no_grad(), differentiable_context(reward=contest.reward):
            return by(known[name].run)

    turns = by_turns({name: partial(measured, name, seconds) for name in known}, of.repeats)
    for name, method in known.items():
        report.add(
            TABLE,
            {
                "method": name,
                "model": world.name,
                "pixels": of.side,
                "steps": contest.steps,
                "model calls": method.calls,
                "backward through the model": method.backward,
                "s per image": Spread.of(turn[name] for turn in turns),
                "as a multiple of ours": Spread.of(turn[name] / turn[base] for turn in turns),
                "peak, MB": round(measured(name, peak_bytes) / MEGABYTE),
            },
        )
