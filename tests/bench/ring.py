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

import torch
from reward_guidance.guidance.estimators import ESTIMATORS, Settings, Shift, Smoothing
from reward_guidance.nodes.wiring.patch_reward import RewardGuidance
from reward_guidance.tests.standins import analytic
from reward_guidance.tests.standins.analytic import PlainReward, analytic_model
from reward_guidance.tests.standins.mixture import energy_distance
from reward_guidance.tests.standins.ring import RING, VARIANCE, ring_reward, truth


class TiltedShift(Shift):
    """The lagged shift without untilting, to show what untilting buys."""

    def guide(self, denoise, x, sigma):
        if self.tilt.gradient is None:
            return self.unguided(denoise, x, sigma)
        return self.unguided(denoise, x + self.process.shift_gain(sigma) * self.tilt.capped(sigma), sigma)


def by_reward(model, estimator: str, samples: int, temperature: float = 1.0, cap: float = 8.0):
    """The model guided by the ring's reward."""
    settings = Settings(
        variance=VARIANCE, smoothing=Smoothing(samples, 1.0, grid=0), cap=cap, momentum=0.0, temperature=temperature
    )
    return RewardGuidance(PlainReward(ring_reward), estimator, settings).attach(model)


def sample(model, seed: int, count: int, steps: int = 20, sampler: str = "euler") -> torch.Tensor:
    """(count,d)"""
    return analytic.sample(model, sampler, steps=steps, count=count, seed=seed).flatten(1).double()


def best_of(candidates: torch.Tensor) -> torch.Tensor:
    """Of each n in candidates (count,n,d), the one the reward likes most."""
    count, n, _ = candidates.shape
    return candidates[torch.arange(count), ring_reward(candidates.flatten(0, 1)).view(count, n).argmax(1)]


def measure(estimator: str | None, samples: int, seeds: int, count: int) -> tuple[list[float], float]:
    """Energy distances over seeds, and model calls per run."""
    model = analytic_model(RING)
    network = model.model.diffusion_model
    if estimator is not None:
        model = by_reward(model, estimator, samples)
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
    ESTIMATORS["shift, not untilted"] = TiltedShift
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
