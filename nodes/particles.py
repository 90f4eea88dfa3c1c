"""A KSampler whose samples are particles: copied and dropped on the way so that they follow a reward, which needs no gradient."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import comfy.samplers
import torch
from comfy_api.v0_0_2 import io
from torch import Tensor
from tqdm.auto import tqdm

from ..guidance.errors import GuidanceError
from ..guidance.particles import Population, ranked
from ..guidance.randomness import generator
from .decoders import make_decoder
from .guidance import HIDDEN, judging_inputs, sampler_inputs
from .node import prepares_inputs
from .reporting import Reporter
from .rewards import REWARD, remarks
from .runtime import LatentReward, LoadedReward, Progress, RewardBeside, resampled, rewards_of
from .sampling import Callback, Sampling, fitted, sampled, seeds_from
from .selection import CATEGORY

SAMPLERS = ("euler_ancestral", "dpm_2_ancestral", "dpmpp_2s_ancestral", "exp_heun_2_x0_sde", "seeds_2", "seeds_3", "ddpm", "lcm")
"""They add noise in every step, without which copies stay copies, remember no earlier step, so that a run can be cut into segments, and draw
noise for intervals that do not overlap (those of dpmpp_sde do)."""


@dataclass(frozen=True, kw_only=True)
class Look(Progress):
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
    report: Callable[[Look], None] = lambda look: None
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
            Look(
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
class Swarm:
    """Particles of one latent at a time."""

    sampling: Sampling
    reward: LatentReward
    temperature: float
    resample_below: float
    every: int
    keep: int
    held_out: LatentReward | None = None

    def __call__(self, latent: dict, seeds: list[int], callback: Callback, report: Callable[[Look], None]) -> tuple[Tensor, list[float]]:
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


@prepares_inputs
class ParticlesKSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        rare = dict[str, Any](advanced=True, optional=True)
        return io.Schema(
            node_id="RewardGuidanceKSamplerParticles",
            display_name="KSampler (Reward Particles)",
            category=CATEGORY,
            description="Samples several particles of every latent together, copies those that a reward likes and drops the others on the way. "
            "Works with rewards that have no gradient.",
            search_aliases=["FK steering", "Feynman-Kac", "particle sampler", "SMC", "sequential Monte Carlo", "gradient-free guidance"],
            inputs=[
                io.Model.Input("model", tooltip="The model. Its weights stay as they are."),
                *sampler_inputs(
                    io.Combo.Input(
                        "sampler_name",
                        options=comfy.samplers.KSampler.SAMPLERS,
                        default=SAMPLERS[0],
                        tooltip=f"How each step is taken. One that adds noise in every step, so that copies part again: {', '.join(SAMPLERS)}.",
                    )
                ),
                REWARD.Input("reward", tooltip="What the particles should follow. It needs no gradient."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip="The prompt, for rewards that compare the picture with it. Write the same text as in the positive prompt.",
                ),
                io.Int.Input(
                    "particles",
                    default=4,
                    min=1,
                    max=4096,
                    optional=True,
                    tooltip="Particles for each latent of the batch: more follow the reward more exactly, and take so many times as long. 4 to 16; "
                    "1 is the stock KSampler.",
                ),
                io.Float.Input(
                    "temperature",
                    default=0.05,
                    min=0.001,
                    max=100.0,
                    step=0.005,
                    tooltip="β in exp(reward/β), in units of the reward's typical spread. Lower values copy the best particles more. 0.03 to 1.",
                    **rare,
                ),
                io.Int.Input(
                    "keep",
                    default=1,
                    min=1,
                    max=4096,
                    tooltip="How many of the final particles to keep, best first, copies last. 1 to 4.",
                    **rare,
                ),
                io.Int.Input(
                    "every",
                    default=4,
                    min=1,
                    max=1000,
                    tooltip="Steps between two looks at the rewards. Fewer choose more often, which costs looks and leaves fewer different pictures. "
                    "1 to 5.",
                    **rare,
                ),
                io.Float.Input(
                    "resample_below",
                    default=0.8,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Copy and drop particles when the share of them that still counts falls below this: 0 only at the end, 1 at every look. "
                    "Higher follows more closely, and leaves fewer different pictures. 0.5 to 1.",
                    **rare,
                ),
                io.Int.Input(
                    "chunk",
                    default=0,
                    min=0,
                    max=4096,
                    tooltip="How many particles the model sees at once, 1 to 16; 0 is all. Lower it if memory runs out.",
                    **rare,
                ),
                *judging_inputs(),
            ],
            outputs=[
                io.Latent.Output(display_name="latents", tooltip="The particles kept, best first, latent by latent of the batch."),
                io.Float.Output(display_name="scores", is_output_list=True, tooltip="Their rewards, in units of the reward's typical spread."),
                io.String.Output(display_name="report", tooltip="What happened at every look, as readable lines."),
            ],
            hidden=HIDDEN,
        )

    @classmethod
    def execute(
        cls,
        model,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        positive,
        negative,
        latent_image: dict,
        denoise: float,
        reward: LoadedReward,
        prompt: str,
        particles: int,
        temperature: float,
        keep: int,
        every: int,
        resample_below: float,
        chunk: int,
        decoder: str,
        frames: int,
        vae=None,
        held_out: LoadedReward | None = None,
    ) -> io.NodeOutput:
        if denoise <= 0:
            raise GuidanceError("With a denoise of 0 there is nothing to sample; raise it.")
        if particles > 1:
            require_noise(sampler_name)
        latent_reward = LatentReward(reward, make_decoder(decoder, model.get_model_object("latent_format"), vae), prompt, frames)
        watched = LatentReward(held_out, latent_reward.decoder, prompt, frames) if held_out else None
        begun = fitted(model, latent_image)
        beside = RewardBeside(latent_reward, chunk, watched).attach(model)
        sampling = Sampling(beside, steps, cfg, sampler_name, scheduler, positive, negative, denoise)
        originals = sampling.each(begun)
        swarm = Swarm(sampling, latent_reward, temperature, resample_below, every, keep, watched)
        reporter, looks = Reporter(cls.hidden, decoder=latent_reward.decoder.name), list[Look]()
        callbacks = sampling.progress(len(originals))
        seeds = seeds_from(seed, particles * len(originals))
        kept, scores, origins = [], [], []
        for i, (alone, latent) in enumerate(originals):

            def report(look: Look, done: int = i) -> None:
                looks.append(replace(look, step=done * look.steps + look.step, steps=len(originals) * look.steps))
                reporter(looks[-1])

            own = seeds[i * particles : (i + 1) * particles]
            samples, rewards = replace(swarm, sampling=alone)(latent, own, callbacks(i), report)
            kept.append(samples)
            scores += rewards
            origins += [i] * len(rewards)
        out = sampled(begun, origins, torch.cat(kept), seeds if particles == 1 else None)
        text = "\n".join([summary(looks), *remarks(prompt, reward, held_out)])
        return io.NodeOutput(out, scores, text, ui={"reward_guidance": reporter.history})


def summary(looks: list[Look]) -> str:
    return "\n".join(
        f"step {look.step} of {look.steps}: {look.survivors} of {len(look.series['reward'])} live on, ESS {look.series['ess'][0]:.1f}, rewards "
        + ", ".join(f"{reward:+.2f}" for reward in look.series["reward"])
        for look in looks
    )


NODES = [ParticlesKSampler]
