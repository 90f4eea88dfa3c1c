"""How near each estimator comes to the reward-weighted distribution, on a ring of eight Gaussians, through ComfyUI's KSampler.

Energy distance of 4000 samples to q ∝ p·exp(r), r(x) = -0.6|x - c|² + 0.5 sin(3 x_1), c = (1.2, 0.9); the truth by importance
resampling. Twenty Euler steps of a flow with shift 3. Prints a markdown table: mean and spread over seeds.
"""

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from harness.inprocess import load_comfyui

load_comfyui()

import comfy.sample
import comfy.utils
import torch
from reward_guidance.guidance.estimators import ESTIMATORS, Settings, Shift, Smoothing
from reward_guidance.guidance.process import Flow
from reward_guidance.nodes.runtime import RewardGuidance
from reward_guidance.tests.standins.analytic import PlainReward, analytic_model
from reward_guidance.tests.standins.mixture import Mixture, energy_distance, resample

RING = Mixture.ring(radius=1.5, std=0.15)
CENTRE = torch.tensor([1.2, 0.9])
VARIANCE = 1.15


def ring_reward(latents: torch.Tensor) -> torch.Tensor:
    point = latents.flatten(1)
    return -0.6 * (point - CENTRE.to(point)).pow(2).sum(1) + 0.5 * torch.sin(3 * point[:, 0])


class TiltedShift(Shift):
    """The lagged shift without untilting, to show what untilting buys."""

    def guide(self, denoise, x, sigma):
        if self.gradient is None:
            return self.watch(denoise, x, sigma)
        return self.watch(denoise, x + self.process.shift_gain(sigma) * self.capped_gradient(sigma), sigma)


ESTIMATORS["shift, not untilted"] = TiltedShift


def sample(model, seed: int, count: int, steps: int = 20, sampler: str = "euler") -> torch.Tensor:
    latent = torch.zeros(count, 2, 1, 1)
    condition = [[torch.zeros(1, 1, 1), {}]]
    noise = comfy.sample.prepare_noise(latent, seed)
    with torch.inference_mode():
        out = comfy.sample.sample(model, noise, steps, 1.0, sampler, "simple", condition, condition, latent, seed=seed, disable_pbar=True)
    return out.flatten(1).double()


def truth(seed: int, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + 1000)
    candidates = RING.sample(400_000, generator)
    return resample(candidates, ring_reward(candidates), count, generator)


def measure(estimator: str | None, samples: int, seeds: int, count: int, temperature: float = 1.0) -> tuple[list[float], float]:
    """Energy distances over seeds, and model calls per run."""
    model = analytic_model(RING, Flow(), flow=True, shift=3.0)
    network = model.model.diffusion_model
    if estimator is not None:
        settings = Settings(variance=VARIANCE, smoothing=Smoothing(samples, 1.0, grid=0), cap=8.0, temperature=temperature)
        model = RewardGuidance(PlainReward(ring_reward), estimator, settings).attach(model)
    distances = [energy_distance(sample(model, seed, count), truth(seed, count)) for seed in range(seeds)]
    return distances, network.calls / seeds


def row(name: str, smoothing: str, calls: str, distances: list[float]) -> str:
    spread = statistics.stdev(distances) if len(distances) > 1 else 0.0
    return f"| {name} | {smoothing} | {calls} | {statistics.mean(distances):.4f} | {spread:.4f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=4000)
    arguments = parser.parse_args()
    seeds, count = arguments.seeds, arguments.samples
    print("| estimator | smoothing k | model calls | energy distance | std over seeds |")
    print("|---|---|---|---|---|")
    floor = [energy_distance(truth(seed, count), truth(seed + 500, count)) for seed in range(seeds)]
    print(row("truth against truth", "", "", floor), flush=True)
    distances, calls = measure(None, 0, seeds, count)
    print(row("unguided", "", f"{calls:.0f}", distances), flush=True)
    for name in ESTIMATORS:
        for k in (0, 4, 8):
            distances, calls = measure(name, k, seeds, count)
            print(row(f"`{name}`", str(k), f"{calls:.0f}", distances), flush=True)


if __name__ == "__main__":
    main()
