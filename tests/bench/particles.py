"""How the reward-weighted distribution is approached by more particles, on the ring of ring.py, through ComfyUI's KSampler.

Energy distance to q of one particle from each of 4000 populations, and of the best of N from as many unguided samples: what a user
gets who keeps one picture. The sampler is stochastic and has an error of its own, which its samples show when they are reweighted by the reward.
Prints a markdown table: mean and spread over seeds.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from harness.inprocess import load_comfyui

load_comfyui()

import comfy.sample
import comfy.samplers
import torch
from bench.ring import best_of, row
from reward_guidance.guidance.particles import Population
from reward_guidance.nodes.wiring.particle_run import ParticleSampler
from reward_guidance.tests.standins.analytic import CONDITION, analytic_model
from reward_guidance.tests.standins.mixture import Mixture, energy_distance, resample
from reward_guidance.tests.standins.ring import RING, ring_reward, truth
from torch import Tensor


class Bench:
    def __init__(self, sampler: str, steps: int, count: int, mixture: Mixture = RING):
        self.model = analytic_model(mixture)
        self.sampler, self.count, self.dims = sampler, count, mixture.means.shape[1]
        self.sigmas = comfy.samplers.KSampler(
            self.model, steps, "cpu", sampler, "simple", model_options=self.model.model_options
        ).sigmas

    def sample(self, seed: int, n: int = 1, population: Population | None = None) -> Tensor:
        """(count, n, d)"""
        sampler = comfy.samplers.sampler_object(self.sampler)
        if population:
            sampler.sampler_function = ParticleSampler(sampler.sampler_function, ring_reward, population, every=4)
        latent = torch.zeros(self.count * n, self.dims, 1, 1)
        noise = comfy.sample.prepare_noise(latent, seed)
        with torch.inference_mode():
            out = comfy.sample.sample_custom(
                self.model, noise, 1.0, sampler, self.sigmas, CONDITION, CONDITION, latent, disable_pbar=True, seed=seed
            )
        return out.double().view(self.count, n, self.dims)

    def unguided(self, seed: int) -> Tensor:
        return self.sample(seed)[:, 0]

    def reweighted(self, seed: int) -> Tensor:
        """The sampler's own law times exp(r): what infinitely many particles would sample."""
        pool = self.sample(seed, 50).flatten(0, 1)
        return resample(pool, ring_reward(pool), self.count, torch.Generator().manual_seed(seed))

    def best_of(self, n: int, seed: int) -> Tensor:
        return best_of(self.sample(seed, n))

    def particles(self, n: int, seed: int) -> Tensor:
        population = Population(n, temperature=1.0, generator=torch.Generator().manual_seed(seed + 10_000))
        chosen = torch.randint(n, (self.count,), generator=torch.Generator().manual_seed(seed + 20_000))
        return self.sample(seed, n, population)[torch.arange(self.count), chosen]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--sampler", default="euler_ancestral")
    arguments = parser.parse_args()
    count = arguments.samples
    bench = Bench(arguments.sampler, arguments.steps, count)
    measure = lambda draw: [energy_distance(draw(seed), truth(seed, count)) for seed in range(arguments.seeds)]  # noqa: E731
    print("| method | N | samples drawn for one | energy distance | std over seeds |")
    print("|---|---|---|---|---|")
    print(row("truth against truth", "", "", measure(lambda seed: truth(seed + 500, count))), flush=True)
    print(row("unguided", "", "1", measure(bench.unguided)), flush=True)
    print(row("unguided, reweighted", "∞", "", measure(bench.reweighted)), flush=True)
    for n in (4, 16, 64):
        print(row("best of N", str(n), str(n), measure(lambda seed, n=n: bench.best_of(n, seed))), flush=True)
        print(row("particles", str(n), str(n), measure(lambda seed, n=n: bench.particles(n, seed))), flush=True)


if __name__ == "__main__":
    main()
