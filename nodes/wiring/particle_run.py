"""Particles: samples that are resampled by their rewards while they are sampled. The reward needs no gradient."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import comfy.samplers
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...guidance.errors import GuidanceError
from ...guidance.particles import Population, ranked
from ...guidance.randomness import generator
from .latent_reward import LatentReward, reward_series
from .latents import fit_latent, sampled_latent
from .patch_reward import ScoringHooks, with_resampled_rows
from .reporting import NodeStep
from .sampling import Callback, Sampling, seeds_from

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
"""Samplers that can sample particles.

They add noise in every step, so that copies become different. They keep no state from earlier steps, so that a run can
be cut into segments. They draw noise for intervals that do not overlap; those of dpmpp_sde do.
"""


@dataclass(frozen=True, kw_only=True)
class ParticleStep(NodeStep):
    """One resampling: rewards and effective number (ESS) of the particles before it, and how many survive it."""

    sigma: float
    survivors: int
    """Number of different particles after the resampling."""
    scattered: tuple[str, ...] = ("reward", "reward/held-out")


class FirstPredictionKnown:
    """A model whose first prediction of a segment is known already, so that it costs no second call."""

    def __init__(self, model: Any, prediction: Tensor):
        self.model = model
        self.predictions = [prediction]

    def __call__(self, x: Tensor, sigma: Tensor, **options) -> Tensor:
        return self.predictions.pop() if self.predictions else self.model(x, sigma, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


@dataclass
class ParticleSampler:
    """A sampler function for KSAMPLER that runs a stochastic sampler in segments and resamples particles between them.

    At the start of a segment it calls the model, evaluates the rewards of the predictions, and resamples predictions
    and states together. The segment reuses the prediction, so resampling costs no model call. A single particle is
    sampled by the stochastic sampler unchanged.
    """

    function: Callable[..., Tensor]
    score: Callable[[Tensor], Tensor]
    """Denoised latents (N,...) -> standardized rewards (N,)."""
    population: Population
    every: int
    """Steps of a segment."""
    on_step: Callable[[ParticleStep], None] = lambda step: None
    held_out: Callable[[Tensor], Tensor] | None = None
    """As `score`; reported, not used for resampling."""
    rows: Tensor = field(init=False)
    """(N,) The particles that the last resampling chose."""
    rewards: Tensor = field(init=False)
    """(N,) The rewards of the final samples."""

    def __call__(self, model, x: Tensor, sigmas: Tensor, extra_args=None, callback=None, disable=None) -> Tensor:
        if self.population.size == 1:
            x = self.function(model, x, sigmas, extra_args=extra_args, callback=callback, disable=disable)
        else:
            x = self.segments(model, x, sigmas, extra_args or {}, callback, disable)
        return self.resample(x, sigmas, len(sigmas) - 1)[0]

    def segments(self, model, x: Tensor, sigmas: Tensor, extra_args: dict, callback, disable) -> Tensor:
        steps = len(sigmas) - 1
        # The last step adds no noise: a resampling at its start would only repeat the one at its end.
        borders = [0, *range(self.every, steps - 1, self.every), steps]
        for start, end in tqdm(list(pairwise(borders)), disable=disable):
            segment_model = model
            if start:
                denoised = model(x, sigmas[start] * x.new_ones(len(x)), **extra_args)
                denoised, x = self.resample(denoised, sigmas, start, x)
                segment_model = FirstPredictionKnown(model, denoised)
                extra_args = with_resampled_rows(extra_args, self.rows)
            x = self.function(
                segment_model,
                x,
                sigmas[start : end + 1],
                extra_args=extra_args,
                callback=shift_step(callback, start),
                disable=True,
                noise_sampler=lambda *_, like=x: torch.randn(like.shape, generator=self.population.generator).to(like),
            )
        return x

    def resample(self, denoised: Tensor, sigmas: Tensor, step: int, *others: Tensor) -> tuple[Tensor, ...]:
        """Evaluate the rewards of denoised latents (N,...), and resample them with the other tensors (N,...)."""
        steps = len(sigmas) - 1
        rewards = self.score(denoised).cpu()
        chosen = self.population.resample(rewards, final=step == steps)
        self.rows, self.rewards = chosen.rows, rewards[chosen.rows]
        self.on_step(
            ParticleStep(
                step=step,
                steps=steps,
                series=reward_series(denoised, rewards, self.held_out) | {"ess": [float(chosen.effective.mean())]},
                sigma=float(sigmas[step]),
                survivors=len(chosen.rows.unique()),
            )
        )
        return tuple(each[chosen.rows.to(each.device)] for each in (denoised, *others))


def shift_step(callback, start: int):
    """The callback of a segment that begins at step `start`: it counts steps from the beginning of the run."""
    return callback and (lambda state: callback({**state, "i": state["i"] + start}))


@dataclass(frozen=True)
class Particles:
    """The result of a particle run."""

    latent: dict
    """The LATENT of the kept particles, best first, one latent of the batch after the other."""
    scores: list[float]
    steps: list[ParticleStep]

    def report(self) -> str:
        """One line a resampling."""
        return "\n".join(
            f"step {step.step} of {step.steps}: {step.survivors} of {len(step.series['reward'])} survive, "
            f"ESS {step.series['ess'][0]:.1f}, rewards "
            + ", ".join(f"{reward:+.2f}" for reward in step.series["reward"])
            for step in self.steps
        )


@dataclass(frozen=True)
class ParticleRun:
    """Samples the particles of every latent of a batch, one latent after the other."""

    sampling: Sampling
    reward: LatentReward
    temperature: float
    resample_below: float
    every: int
    keep: int
    """Particles to keep for each latent."""
    held_out: LatentReward | None = None

    def run(
        self, latent_image: dict, seed: int, particles: int, chunk: int, on_step: Callable[[ParticleStep], object]
    ) -> Particles:
        """Sample `particles` particles of each latent, `chunk` at once (0: all), from the seeds seed, seed + 1, ..."""
        model = self.sampling.model
        start = fit_latent(model, latent_image)
        hooked = ScoringHooks(self.reward, chunk, self.held_out).attach(model)
        originals = replace(self.sampling, model=hooked).each(start)
        callbacks = self.sampling.progress(len(originals))
        seeds = seeds_from(seed, particles * len(originals))
        steps, kept, scores, origins = list[ParticleStep](), list[Tensor](), list[float](), list[int]()
        for i, (sampling, latent) in enumerate(originals):

            def report(step: ParticleStep, latents_before: int = i) -> None:
                total = len(originals) * step.steps
                steps.append(replace(step, step=latents_before * step.steps + step.step, steps=total))
                on_step(steps[-1])

            own = seeds[i * particles : (i + 1) * particles]
            samples, rewards = replace(self, sampling=sampling)(latent, own, callbacks(i), report)
            kept.append(samples)
            scores += rewards
            origins += [i] * len(rewards)
        out = sampled_latent(start, origins, torch.cat(kept), seeds if particles == 1 else None)
        return Particles(out, scores, steps)

    def __call__(
        self, latent: dict, seeds: list[int], callback: Callback, on_step: Callable[[ParticleStep], None]
    ) -> tuple[Tensor, list[float]]:
        """The best particles of one latent (M,...) and their standardized rewards.

        Each starts from the noise of its seed.
        """
        population = Population(len(seeds), self.temperature, generator(seeds[0]), self.resample_below)
        sampler = comfy.samplers.sampler_object(self.sampling.sampler_name)
        particles = ParticleSampler(
            sampler.sampler_function,
            one_at_a_time(self.reward),
            population,
            self.every,
            on_step,
            self.held_out and one_at_a_time(self.held_out),
        )
        sampler.sampler_function = particles
        samples = self.sampling.run(sampler, latent, seeds, callback)
        rewards = particles.rewards.tolist()
        order = ranked(particles.rows, rewards)[: self.keep]
        return samples[order], [rewards[i] for i in order]


def one_at_a_time(reward: LatentReward) -> Callable[[Tensor], Tensor]:
    """The reward, evaluated for one latent after the other: memory does not grow with the number of particles."""
    return lambda latents: torch.cat([reward(latent) for latent in latents.split(1)])


def require_noise(sampler_name: str) -> None:
    """Raise GuidanceError for a sampler that cannot sample particles."""
    if sampler_name not in SAMPLERS:
        raise GuidanceError(
            f"{sampler_name} cannot sample particles: it adds no noise to make copies different, or it keeps state "
            f"from earlier steps. Choose one of {', '.join(SAMPLERS)}."
        )
