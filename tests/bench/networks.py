"""How near guidance networks come to the reward-weighted distribution, and from how few labels, through ComfyUI's KSampler.

1. The ring of ring.py: energy distance of 4000 samples to q ∝ p·exp(r/β), twenty steps of Euler and of DPM++ 2M, both with one model call
   per step. The sampler has an error of its own, which the exact D_q shows.
2. Labels: the same by the number of labelled samples, and for a mixture in 64 dimensions that is rewarded by its first two.
3. One dimension: p = N(0,1), r = -2(x - 2)², so that q = N(1.6, 0.2): mean and variance of 20,000 samples. The networks are the last of a
   training on a million labels, none of which are held out: fewer, or a network chosen by so few effective ones, have a variance of their own.

Prints markdown tables.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from harness.inprocess import load_comfyui

load_comfyui()

import torch
from bench.ring import best_of, by_reward, sample
from comfy.model_patcher import ModelPatcher
from reward_guidance.guidance.network.card import Card
from reward_guidance.guidance.network.forms import FORMS
from reward_guidance.guidance.network.unet import Architecture, GuidanceNetwork
from reward_guidance.guidance.process import Flow
from reward_guidance.guidance.training.labels import label
from reward_guidance.guidance.training.loop import Training, fit
from reward_guidance.guidance.training.objectives import Plan, Task
from reward_guidance.nodes.wiring.loaded import manage_network
from reward_guidance.nodes.wiring.model_info import base_of
from reward_guidance.nodes.wiring.patch_network import NetworkGuidance
from reward_guidance.tests.standins import objectives
from reward_guidance.tests.standins.analytic import analytic_model
from reward_guidance.tests.standins.batches import LivePairs
from reward_guidance.tests.standins.mixture import Mixture, energy_distance
from reward_guidance.tests.standins.ring import CLOUD, RING, TiltedRing, ring_reward, truth
from torch import Tensor

NORMAL = Mixture(torch.zeros(1, 1, dtype=torch.float64), 1.0, torch.zeros(1, dtype=torch.float64))
NORMAL_TILTED = Mixture(NORMAL.means + 1.6, 0.2**0.5, NORMAL.logits)
SAMPLERS = {"Euler": "euler", "DPM++ 2M": "dpmpp_2m"}
COUNT = 4000
LABELS = 100_000


@dataclass(frozen=True)
class World:
    """Data, a reward, and a temperature in units of the reward."""

    mixture: Mixture = RING
    temperature: float = 1.0
    reward: Callable[[Tensor], Tensor] = ring_reward

    @property
    def dims(self) -> int:
        return self.mixture.means.shape[1]

    def model(self):
        return analytic_model(self.mixture, shift=1.0)

    def denoise(self, x: Tensor, sigma: Tensor, _) -> Tensor:
        return self.mixture.denoised(x.flatten(1).double(), Flow(), sigma).view_as(x).to(x)

    def training(
        self,
        objective: str,
        form: str,
        seed: int,
        labels: int,
        steps: int,
        width: int = 32,
        held_out: float = 0.1,
        **plan,
    ) -> Training:
        clean = self.mixture.sample(labels, torch.Generator().manual_seed(seed)).float().view(labels, -1, 1, 1)
        rewards = self.reward(clean)
        weights, _ = label(rewards, torch.zeros(labels), self.temperature / float(rewards.std()))

        def pairs(rows):
            return LivePairs(clean[rows], weights[rows], Flow(), self.denoise, lambda time: time.clamp(0.005, 0.995))

        options = {"batch": 256, "learning_rate": 2e-3, "ema": min(Plan.ema, 1 - 10 / steps)} | plan
        own, *apart = (pairs(rows) for rows in torch.arange(labels).split(labels - int(held_out * labels)))
        task = Task(Flow(), Plan(objective, form, steps, seed=seed, **options))
        sizes = {"width": width, "levels": 1, "blocks": 1, "kernel": 1}
        return Training(
            own, task, Architecture(self.dims, FORMS[form].inputs, scalar=form == "potential", **sizes), *apart
        )

    def guided(self, network: GuidanceNetwork, form: str, model: ModelPatcher) -> ModelPatcher:
        card = Card(
            base=base_of(model), form=form, objective="", temperature=self.temperature, rewards=("ring",), reward_weights=(1.0,), reward_mean=0.0,
            reward_std=1.0, prompts="", samples=0, steps=0, effective=1.0, curve=(),
        )  # fmt: skip
        return NetworkGuidance(manage_network(network, card)).attach(model)

    def trained(
        self, objective: str, form: str, seed: int, labels: int = LABELS, steps: int = 4000, **options
    ) -> ModelPatcher:
        """The model guided by a network."""
        return self.guided(fit(self.training(objective, form, seed, labels, steps, **options)), form, self.model())

    def distance(self, samples: Tensor, seed: int) -> float:
        return energy_distance(samples, truth(seed, len(samples), self.temperature, self.mixture))


Draw = Callable[[int, str], Tensor]
"""A number of samples, and a sampler."""
Method = Callable[[World, int], Draw]
"""A world and a seed."""


def of_model(make: Callable[[World, int], object]) -> Method:
    def method(world: World, seed: int) -> Draw:
        model = make(world, seed)
        return lambda count, sampler: sample(model, seed, count, sampler=sampler)

    return method


def best_of_four(world: World, seed: int) -> Draw:
    return lambda count, sampler: best_of(sample(world.model(), seed, 4 * count, sampler=sampler).view(count, 4, -1))


def network(objective: str, form: str, **options) -> Method:
    return of_model(lambda world, seed: world.trained(objective, form, seed, **options))


def estimator(name: str, samples: int) -> Method:
    return of_model(lambda world, _: by_reward(world.model(), name, samples, world.temperature))


def ring_methods(steps: int) -> dict[str, Method]:
    return {
        "truth against truth": lambda world, seed: lambda count, _: truth(seed + 500, count, world.temperature),
        "exact D_q": of_model(lambda world, _: World(TiltedRing.at(world.temperature)).model()),
        "unguided": of_model(lambda world, _: world.model()),
        "best of 4, at four times the model calls": best_of_four,
        "network, `weighted`, form `correction`": network("weighted", "correction", steps=steps),
        "network, `weighted`, form `shift`": network("weighted", "shift", steps=steps),
        "network, `potential`": network("potential", "potential", steps=steps),
        "network, regression of log w": network("potential_log", "potential", steps=steps),
        "`shift` k = 4": estimator("shift", 4),
        "`denoised` k = 0": estimator("denoised", 0),
        "`jacobian` k = 0": estimator("jacobian", 0),
        "`jacobian` k = 4": estimator("jacobian", 4),
    }


def cell(values: Iterable[float], digits: int = 4) -> str:
    values = list(values)
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def table(*heads: str) -> None:
    print(f"\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}", flush=True)


def line(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def ring(seeds: int, steps: int) -> None:
    temperatures = (1.0, 0.5, 2.0)
    table("method", *(f"{name}, β = {temperature:g}" for temperature in temperatures for name in SAMPLERS))
    for name, method in ring_methods(steps).items():
        cells = []
        for world in (World(temperature=temperature) for temperature in temperatures):
            draws = [method(world, seed) for seed in range(seeds if world.temperature == 1 else 1)]
            for sampler in SAMPLERS.values():
                cells.append(cell(world.distance(draw(COUNT, sampler), seed) for seed, draw in enumerate(draws)))
        line(name, *cells)


def labels(steps: int) -> None:
    worlds = {"2-D": World(), "64-D": World(CLOUD)}
    forms = {"correction": "weighted", "shift": "weighted", "potential": "potential"}
    table("labels", *(f"{name}, `{form}`" for name in worlds for form in forms))
    measured = lambda method: lambda world: cell([world.distance(method(world, 0)(COUNT, "dpmpp_2m"), 0)])  # noqa: E731
    floor = measured(lambda world, seed: lambda count, _: truth(seed + 500, count, world.temperature, world.mixture))
    for name, method in (
        ("truth against truth", floor),
        ("unguided", measured(of_model(lambda world, _: world.model()))),
    ):
        line(name, *(each for world in worlds.values() for each in [method(world)] * len(forms)))
    for count in (250, 1000, 5000, 20_000):
        networks = [measured(network(objective, form, labels=count, steps=steps, width=32 if world.dims < 32 else 64))(world)
                    for world in worlds.values() for form, objective in forms.items()]  # fmt: skip
        line(str(count), *networks)


def normal(seeds: int, steps: int) -> None:
    world = World(NORMAL, reward=lambda latents: -2 * (latents.flatten(1)[:, 0] - 2).square())
    options = {"labels": 10 * LABELS, "steps": steps, "width": 64, "held_out": 0, "batch": 512, "learning_rate": 1e-3}
    train = lambda objective, form: lambda seed: world.trained(objective, form, seed, **options)  # noqa: E731
    models = {
        "exact D_q": lambda seed: World(NORMAL_TILTED).model(),
        "network, `weighted`": train("weighted", "correction"),
        "network, `potential`": train("potential", "potential"),
        "network, regression of log w": train("potential_log", "potential"),
    }
    table("method", "mean (1.6)", "variance (0.2)")
    for name, model in models.items():
        samples = [sample(model(seed), seed, 20_000, steps=50, sampler="dpmpp_2m") for seed in range(seeds)]
        line(name, cell(float(x.mean()) for x in samples), cell(float(x.var()) for x in samples))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="of the ring at β = 1")
    parser.add_argument("--steps", type=int, default=4000, help="of training")
    parser.add_argument("--only", choices=["ring", "labels", "normal"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    objectives.register()
    parts = {
        "ring": partial(ring, arguments.seeds, arguments.steps),
        "labels": partial(labels, arguments.steps // 2),
        "normal": partial(normal, 2 * arguments.seeds, arguments.steps),
    }
    for name, part in parts.items():
        if arguments.only in (None, name):
            part()


if __name__ == "__main__":
    main()
