"""Particles: samples that are copied and dropped on the way so that they follow a reward, which needs no gradient."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import comfy.samplers
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...guidance.errors import GuidanceError
from ...guidance.particles import Population, ranked
from ...guidance.randomness import generator
from .latent_reward import LatentReward, rewards_of
from .patch_reward import resampled
from .reporting import NodeStep
from .sampling import Callback, Sampling

SAMPLERS = (
    "euler_ancestral",
    "dpm_2_ancestral",
    "dpmpp_2s_ancestral",
    "exp_heun_2_x0_sde",
    "seeds_2",
    "seeds_3",
    "ddpm",
    "lcm",
)
"""They add noise in every step, without which copies stay copies, remember no earlier step, so that a run can be cut into segments, and draw
noise for intervals that do not overlap (those of dpmpp_sde do)."""


@dataclass(frozen=True, kw_only=True)
class ParticleStep(NodeStep):
    """One look at the particles: their rewards and effective number (ESS) before, and how many different ones live on."""

    sigma: float
    survivors: int
    scattered: tuple[str, ...] = ("reward", "reward/held-out")


class FirstAnswered:
    """A model that has already been asked the first question of a segment."""

    def __init__(self, model: Any, answer: Tensor):
        self.model = model
        self.answers = [answer]

    def __call__(self, x: Tensor, sigma: Tensor, **options) -> Tensor:
        return self.answers.pop() if self.answers else self.model(x, sigma, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


@dataclass
class ParticleSampler:
    """A sampler function for KSAMPLER that runs a stochastic one in segments and resamples the particles between them.

    The model is asked at the start of a segment, the estimates are rewarded and resampled together with x, and the segment begins with the
    answer in hand: a look costs no model call. One particle is sampled as if nothing were around the sampler.
    """

    function: Callable[..., Tensor]
    score: Callable[[Tensor], Tensor]
    """Denoised latents (N,...) -> standardized rewards (N,)."""
    population: Population
    every: int
    report: Callable[[ParticleStep], None] = lambda look: None
    held_out: Callable[[Tensor], Tensor] | None = None
    """As `score`; reported, not followed."""
    rows: Tensor = field(init=False)
    """Of the last look."""
    rewards: Tensor = field(init=False)
    """Of the samples (N,)."""

    def __call__(self, model, x: Tensor, sigmas: Tensor, extra_args=None, callback=None, disable=None) -> Tensor:
        if self.population.size == 1:
            x = self.function(model, x, sigmas, extra_args=extra_args, callback=callback, disable=disable)
        else:
            x = self.segments(model, x, sigmas, extra_args or {}, callback, disable)
        return self.look(x, sigmas, len(sigmas) - 1)[0]

    def segments(self, model, x: Tensor, sigmas: Tensor, extra_args: dict, callback, disable) -> Tensor:
        steps = len(sigmas) - 1
        # In the last step no noise is added, so that a look at its start would only repeat the one at its end.
        borders = [0, *range(self.every, steps - 1, self.every), steps]
        for start, end in tqdm(list(pairwise(borders)), disable=disable):
            asked = model
            if start:
                denoised = model(x, sigmas[start] * x.new_ones(len(x)), **extra_args)
                denoised, x = self.look(denoised, sigmas, start, x)
                asked, extra_args = FirstAnswered(model, denoised), resampled(extra_args, self.rows)
            x = self.function(
                asked,
                x,
                sigmas[start : end + 1],
                extra_args=extra_args,
                callback=shifted(callback, start),
                disable=True,
                noise_sampler=lambda *_, like=x: torch.randn(like.shape, generator=self.population.generator).to(like),
            )
        return x

    def look(self, denoised: Tensor, sigmas: Tensor, step: int, *others: Tensor) -> tuple[Tensor, ...]:
        """Reward and resample the particles, and whatever else belongs to them."""
        steps = len(sigmas) - 1
        rewards = self.score(denoised).cpu()
        chosen = self.population.resample(rewards, final=step == steps)
        self.rows, self.rewards = chosen.rows, rewards[chosen.rows]
        self.report(
            ParticleStep(
                step=step,
                steps=steps,
                series=rewards_of(denoised, rewards, self.held_out) | {"ess": [float(chosen.effective.mean())]},
                sigma=float(sigmas[step]),
                survivors=len(chosen.rows.unique()),
            )
        )
        return tuple(each[chosen.rows.to(each.device)] for each in (denoised, *others))


def shifted(callback, start: int):
    """A segment's callback, which counts its steps within the run."""
    return callback and (lambda state: callback({**state, "i": state["i"] + start}))


@dataclass(frozen=True)
class ParticleRun:
    """Particles of one latent at a time."""

    sampling: Sampling
    reward: LatentReward
    temperature: float
    resample_below: float
    every: int
    keep: int
    held_out: LatentReward | None = None

    def __call__(
        self, latent: dict, seeds: list[int], callback: Callback, report: Callable[[ParticleStep], None]
    ) -> tuple[Tensor, list[float]]:
        """The best particles of a latent (M,...) and their standardized rewards. Each begins with the noise of its seed."""
        population = Population(len(seeds), self.temperature, generator(seeds[0]), self.resample_below)
        sampler = comfy.samplers.sampler_object(self.sampling.sampler_name)
        particles = ParticleSampler(
            sampler.sampler_function,
            one_at_a_time(self.reward),
            population,
            self.every,
            report,
            self.held_out and one_at_a_time(self.held_out),
        )
        sampler.sampler_function = particles
        samples = self.sampling.run(sampler, latent, seeds, callback)
        rewards = particles.rewards.tolist()
        order = ranked(particles.rows, rewards)[: self.keep]
        return samples[order], [rewards[i] for i in order]


def one_at_a_time(reward: LatentReward) -> Callable[[Tensor], Tensor]:
    """So that the number of particles does not cost memory."""
    return lambda latents: torch.cat([reward(latent) for latent in latents.split(1)])


def require_noise(sampler_name: str) -> None:
    if sampler_name not in SAMPLERS:
        raise GuidanceError(
            f"{sampler_name} cannot sample particles: it adds no noise by which copies could part, or it remembers earlier steps. "
            f"Choose one of {', '.join(SAMPLERS)}."
        )


def particle_report(looks: list[ParticleStep]) -> str:
    return "\n".join(
        f"step {look.step} of {look.steps}: {look.survivors} of {len(look.series['reward'])} live on, ESS {look.series['ess'][0]:.1f}, rewards "
        + ", ".join(f"{reward:+.2f}" for reward in look.series["reward"])
        for look in looks
    )
