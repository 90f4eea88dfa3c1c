"""What choosing among samples and steering them buys on ShapesWorld, against model calls; the two together too.

As in shapesworld.py: 256 pictures of 32 prompts in each run, judged by the reward, the held-out reward and the oracle. Everything has the
nodes' default settings but the temperature, which is that of the truth. A method that keeps one of n samples keeps the one with the highest
reward. The guidance network learns from 2000 unguided samples of the same prompts. Prints a markdown table and draws output/selection.png,
held-out reward against model calls per step.

usage: python tests/bench/selection.py [MODELS_DIR] [--runs 2] [--network FILE] [--work DIR]
"""

import argparse
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from harness.inprocess import load_comfyui

load_comfyui()

import comfy.samplers
import torch
from bench.shapesworld import BatchReward, Bench, Pictures, World
from comfy.model_patcher import ModelPatcher
from harness.environment import cache
from reward_guidance.guidance.estimators import Settings
from reward_guidance.guidance.network.file import load_network
from reward_guidance.guidance.particles import Population, ranked
from reward_guidance.guidance.randomness import generator
from reward_guidance.nodes.wiring.loaded import manage_network
from reward_guidance.nodes.wiring.particle_run import ParticleSampler
from reward_guidance.nodes.wiring.patch_network import NetworkGuidance
from reward_guidance.nodes.wiring.patch_reward import RewardGuidance
from reward_guidance.nodes.wiring.sampling import Sampling
from reward_guidance.tests.bench.shapesworld_network import learned
from reward_guidance.tests.harness.models import shapesworld
from reward_guidance.tests.tools.chart import draw_chart
from torch import Tensor

PICTURE = Path(__file__).parents[2] / "output" / "selection.png"


class Contest:
    """Methods and what they cost."""

    def __init__(self, bench: Bench, runs: int):
        self.bench, self.world, self.runs = bench, bench.world, range(runs)
        self.curves: dict[str, list[tuple[float, float]]] = defaultdict(list)

    def add(self, method: str, name: str, runs: list[Pictures], calls: int) -> None:
        row = self.bench.add(name, runs, str(calls))
        self.curves[method].append((calls, row["heldout"]))

    def best_of(self, method: str, model: ModelPatcher, counts: tuple[int, ...]) -> None:
        """Of as many seeds by the same model."""
        most = max(counts)
        drawn = [[self.draw(model, run * most + i) for i in range(most)] for run in self.runs]
        for n in counts:
            self.add(
                method, f"{method}, best of {n}" if n > 1 else method, [Pictures.best(each[:n]) for each in drawn], n
            )

    def draw(self, model: ModelPatcher, seed: int) -> Pictures:
        return Pictures.of(self.world, self.world.sample(model, self.bench.per_prompt, seed))

    def particles(self, n: int) -> None:
        """One picture from each of as many populations as there are pictures."""
        self.add(
            "particles", f"particles, {n}", [self.populations(n, run * self.bench.per_prompt) for run in self.runs], n
        )

    def populations(self, n: int, first_seed: int) -> Pictures:
        return Pictures.joined(
            [Pictures.of(self.world, self.population(n, first_seed + i)) for i in range(self.bench.per_prompt)]
        )

    def population(self, n: int, seed: int) -> Tensor:
        """The best of n particles for each prompt (prompts,16,8,8)."""
        world, pipeline = self.world, self.world.pipeline
        model, prompts = pipeline.model, world.repeated_prompts(n)
        sampler = comfy.samplers.sampler_object(world.sampler)
        particles = ParticleSampler(
            sampler.sampler_function,
            BatchReward(world, n),
            Population(n, self.bench.temperature, generator(seed)),
            every=4,
        )
        sampler.sampler_function = particles
        sampling = Sampling(model, world.steps, world.cfg, world.sampler, "simple", *pipeline.conditions(prompts), 1.0)
        seeds = range(seed * len(prompts), (seed + 1) * len(prompts))
        with torch.inference_mode():
            out = sampling.run(sampler, {"samples": torch.zeros(1, 16, 8, 8)}, seeds, lambda *_: None)
        groups = zip(particles.rows.view(-1, n) % n, particles.rewards.view(-1, n).tolist(), strict=True)
        first = torch.tensor([ranked(rows, rewards)[0] for rows, rewards in groups])
        return model.model.process_latent_in(out).unflatten(0, (-1, n))[torch.arange(len(first)), first]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "models", type=Path, nargs="?", default=None, help="where ShapesWorld lies; the cache if left out"
    )
    parser.add_argument(
        "--network", type=Path, help="a guidance network for the flow model; one is trained if left out"
    )
    parser.add_argument("--labels", type=int, default=2000, help="to train it on")
    parser.add_argument("--training-steps", type=int, default=1500)
    parser.add_argument(
        "--work", type=Path, default=None, help="where what was collected is kept; the cache if left out"
    )
    parser.add_argument("--network-strength", type=float, default=4.0)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--per-prompt", type=int, default=8)
    parser.add_argument("--pool", type=int, default=128)
    parser.add_argument("--most", type=int, default=16, help="samples to choose among, and particles")
    parser.add_argument("--temperature", type=float, default=0.05)
    arguments = parser.parse_args()
    world = World(arguments.models or shapesworld(), cfg=1.0, steps=30, sampler="euler_ancestral")
    bench = Bench(world, arguments.per_prompt, arguments.pool, arguments.temperature, candidates=0)
    bench.references()
    contest, model = Contest(bench, arguments.runs), world.pipeline.model
    contest.best_of("unguided", model, tuple(n for n in (1, 2, 4, 8, 16) if n <= arguments.most))
    for n in (4, 16):
        if n <= arguments.most:
            contest.particles(n)
    guidance = RewardGuidance(BatchReward(world, bench.per_prompt), "shift", Settings(temperature=bench.temperature))
    contest.best_of("guidance", guidance.attach(model), (1, 2, 4))
    given, work = arguments.network, arguments.work or cache() / "bench"
    loaded = (
        manage_network(*load_network(given))
        if given
        else learned(world, work, arguments.labels, arguments.training_steps)
    )
    network = NetworkGuidance(loaded, arguments.network_strength).attach(model)
    contest.best_of("network", network, (1, 2, 4))
    contest.best_of("network and guidance", guidance.attach(network), (1, 2))
    PICTURE.parent.mkdir(exist_ok=True)
    draw_chart("Held-out reward against cost", "model calls per step", contest.curves, logarithmic=True).save(PICTURE)
    print(f"\n{PICTURE.name} is drawn.")


if __name__ == "__main__":
    main()
