"""An image by guidance and by what could be used instead, on the same model."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from bench.peers.best_of_n import best_of_n
from bench.peers.fk_steering import fk_steering
from bench.peers.gradient_guidance import dps, flowchef
from bench.peers.noise_optimisation import noise_optimisation
from bench.peers.problem import PlainVAE, Problem
from reward_guidance.guidance.files import Card
from reward_guidance.guidance.network import Architecture, GuidanceNetwork
from reward_guidance.nodes.runtime import LatentReward, base_of, loaded_reward, manage_network, tilt
from torch import Tensor

from . import sizes
from .clock import Spread, by_turns, peak_bytes, seconds
from .report import Report
from .steps import MEGABYTE
from .world import World, managed

TABLE = "An image, beside what could be used instead"


@dataclass(frozen=True)
class Sizes:
    families: list[str]
    side: int
    steps: int
    iterations: int
    """Of noise optimisation; its authors take 50."""
    repeats: int


@torch.inference_mode()
def plain(problem: Problem, steps: int | None = None) -> Tensor:
    return problem.sample(steps=steps)


@torch.inference_mode()
def guided(problem: Problem) -> Tensor:
    """Ours: the lagged shift, through the tiny decoder."""
    world = problem.world
    model = world.guidance(world.reward("PickScore", "taesd"))(world.model)
    return world.sample(world.noise(problem.side, 1), problem.steps, model)


class NoiseNetwork:
    """Ours for one-step models: a network tilts the noise in four steps of its own."""

    def __init__(self, world: World):
        family = world.family
        architecture = Architecture(family.channels, 1, tokens=family.tokens[1], pooled=family.pooled)
        card = Card(base_of(world.model, "noise"), "noise", "weighted", 1.0, ("PickScore",), (1.0,), 0.0, 1.0, "", 1, 1, 1.0, ())
        self.loaded = manage_network(GuidanceNetwork(architecture.fitted(family.shape(512, 1)[1:])).requires_grad_(False), card)

    @torch.inference_mode()
    def __call__(self, problem: Problem) -> Tensor:
        world = problem.world
        noise = tilt(self.loaded, world.noise(problem.side, 1), world.positive, 4, 1.0)
        return world.sample(noise, 1, cfg=1.0)


def methods(world: World, iterations: int) -> dict[str, tuple[Callable[[Problem], Tensor], int, str]]:
    """Name -> method, model calls without CFG counted once, and what goes backward through the model."""
    many = {
        "unguided": (plain, 1, ""),
        "`shift`, taesd (ours)": (guided, 1, ""),
        "best of 4": (best_of_n, 4, ""),
        "FK steering, 4 particles": (fk_steering, 4, ""),
        "FlowChef": (flowchef, 1, ""),
        "DPS, FreeDoM": (dps, 1, "every call"),
    }
    one = {
        "one step, unguided": (_one_step, 0, ""),
        "one step, guidance network (ours)": (NoiseNetwork(world), 0, ""),
        f"one step, ReNO, {iterations} iterations": (partial(noise_optimisation, iterations=iterations), 0, "every call"),
    }
    return many | one


@torch.inference_mode()
def _one_step(problem: Problem) -> Tensor:
    return problem.sample(steps=1, cfg=1.0)


def rows(report: Report, world: World, of: Sizes) -> None:
    decoder = PlainVAE(sizes.vae(world.family, world.reduced), world.latent_format)
    reward = LatentReward(managed("PickScore", world.reduced), decoder, sizes.PROMPT)
    problem = Problem(world, of.side, of.steps, reward)
    known = methods(world, of.iterations)

    def timed(name: str) -> float:
        with torch.no_grad(), loaded_reward(reward):
            return seconds(partial(known[name][0], problem))

    turns = by_turns({name: partial(timed, name) for name in known}, of.repeats)
    for name, (method, calls, backward) in known.items():
        base = "`shift`, taesd (ours)" if calls else "one step, guidance network (ours)"
        with torch.no_grad(), loaded_reward(reward):
            peak = peak_bytes(partial(method, problem))
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
                "peak, MB": round(peak / MEGABYTE),
            },
        )
