"""Makes and labels samples with a model: what Collect Guidance Data keeps, and what a training shows of its network."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import comfy.sample
import comfy.samplers
import torch
from PIL import Image
from torch import Tensor

from ..guidance.errors import GuidanceError, quoted
from ..guidance.files import write
from ..guidance.process import Process, column
from ..guidance.rewards import CombinedReward, Reward, RewardError
from ..guidance.samples import Collection, Sample, Samples, Texts, half, noise, percents, states
from .rewards import score_parts
from .runtime import LoadedReward, process_of, text_of_conditioning
from .sampling import Sampling, start_of
from .selection import decode

log = logging.getLogger(__name__)

PROBED = 4
"""Samples that are looked at again before a collection goes on."""
SAME, SAME_SCORE = 0.03, 0.1
"""What another device may make otherwise: a share of D, and standard deviations of a reward."""

Tick = Callable[[int, Tensor], None]
"""Hears how many samples went a step further, and how they look."""


@dataclass(frozen=True)
class Studio:
    """Makes samples: a model that is told prompts and asked one way, and a reward that judges."""

    model: Any
    prompts: tuple[str, ...]
    encode: Callable[[str], list]
    """A prompt's CONDITIONING."""
    negative: str
    steps: int
    cfg: float
    sampler_name: str
    scheduler: str
    latent: dict
    """One, and empty."""
    batch: int
    """Samples that the model sees at once."""
    vae: Any
    reward: LoadedReward

    def sampling(self, positive: list) -> Sampling:
        return Sampling(self.model, self.steps, self.cfg, self.sampler_name, self.scheduler, positive, self.encode(self.negative), 1.0)

    def start(self) -> Tensor:
        """The empty latent (1,C,...) in the model's shape."""
        return start_of(self.model, self.latent)

    def together(self, prompts: Sequence[int], ask: Callable[[Sampling, list[int]], Tensor]) -> Tensor:
        """What is asked of samples (N,...) with these prompts, in groups that the model can be shown at once."""
        conditionings = [self.encode(self.prompts[prompt]) for prompt in prompts]
        parts, order = [], []
        for chosen in alike(conditionings, self.batch):
            parts.append(ask(self.sampling(stacked([conditionings[i] for i in chosen])), chosen))
            order += chosen
        return torch.cat(parts)[torch.tensor(order).argsort()]

    def sample(self, prompts: Sequence[int], seeds: Sequence[int], tick: Tick, through: Callable[[Sampling], Sampling] = lambda s: s) -> Tensor:
        """Latents (N,...), each from the noise of its own seed. `through` may guide the sampling."""

        def ask(sampling: Sampling, chosen: list[int]) -> Tensor:
            at_once = sampling.at_once(len(chosen), self.latent, len(chosen))
            if at_once < len(chosen):
                return torch.cat([self.sample([prompts[i]], [seeds[i]], tick, through) for i in chosen])
            return through(sampling)(self.latent, [seeds[i] for i in chosen], lambda step, x0, x, steps: tick(len(chosen), x0))

        return self.together(prompts, ask)

    def denoise(self, x: Tensor, sigma: Tensor, prompts: Sequence[int]) -> Tensor:
        """D (N,...) of states x (N,...) at noise levels (N,), in the model's space and as the guider asks for it, with CFG."""
        return self.together(prompts, lambda sampling, chosen: asked(sampling, self.latent, x[chosen], sigma[chosen]))

    def judge(self, clip: Tensor, prompt: str) -> Tensor:
        """Raw scores (R,) of a picture or video (T,H,W,C), the mean over its frames."""
        scored = score_parts(clip, self.reward, prompt)
        parts = scored[1:] if isinstance(scored[0][0], CombinedReward) else scored
        return torch.stack([scores.mean() for _, scores in parts])

    def text(self) -> Texts:
        """What the model is told with each prompt, as networks read it."""
        texts = [text_of_conditioning(self.encode(prompt)) for prompt in self.prompts]
        return Texts([half(text.tokens[0].cpu()) for text in texts], torch.cat([text.pooled[:1].cpu() for text in texts]))


def asked(sampling: Sampling, latent: dict, x: Tensor, sigma: Tensor) -> Tensor:
    """D of states of one's own choosing: a sampler that asks once and leaves."""
    answers = []

    def function(model, start: Tensor, sigmas: Tensor, extra_args=None, callback=None, disable=None) -> Tensor:
        answers.append(model(x.to(start.device), sigma.to(start.device), **(extra_args or {})))
        return start

    sampling.run(comfy.samplers.KSAMPLER(function), latent, [0] * len(x), lambda *_: None)
    return answers[0]


def alike(conditionings: Sequence[list], most: int) -> Iterator[list[int]]:
    """Groups of at most so many conditionings that can be shown to a model as one."""
    groups: dict[Any, list[int]] = {}
    for i, conditioning in enumerate(conditionings):
        groups.setdefault(shapes(conditioning) or i, []).append(i)
    for group in groups.values():
        yield from (group[start : start + most] for start in range(0, len(group), most))


def shapes(conditioning: list) -> tuple | None:
    """None where there is more than tensors of one row, which cannot be stacked."""
    parts = {"": conditioning[0][0], **conditioning[0][1]}
    if len(conditioning) > 1 or not all(isinstance(part, Tensor) and part.ndim and len(part) == 1 for part in parts.values()):
        return None
    return tuple(sorted((name, part.shape) for name, part in parts.items()))


def stacked(conditionings: Sequence[list]) -> list:
    """Conditionings of the same shapes as one, of a row for each."""
    if len(conditionings) == 1:
        return conditionings[0]
    tokens, options = zip(*(conditioning[0] for conditioning in conditionings), strict=True)
    return [[torch.cat(tokens), {name: torch.cat([each[name] for each in options]) for name in options[0]}]]


@dataclass(frozen=True)
class Collector:
    """Samples and labels what is missing of a collection, shard by shard."""

    studio: Studio
    collection: Collection
    keep_images: bool
    tick: Tick

    def shard(self, numbers: range) -> list[Sample]:
        description = self.collection.description
        prompts = [description.prompt_of(number) for number in numbers]
        seeds = [description.seed_of(number) for number in numbers]
        latents = self.studio.sample(prompts, seeds, self.tick)
        clips = (clip for part in latents.split(self.studio.batch) for clip in decode(self.studio.vae, part))
        scores = self.judge_all(numbers, clips)
        if description.base.target == "noise":
            return noises(self.studio.start(), seeds, scores)
        clean = self.studio.model.model.process_latent_in(latents.float())
        return states(clean, scores, seeds, self.sigmas(seeds), self.process, lambda x, sigma: self.denoise(x, sigma, prompts))

    def judge_all(self, numbers: range, clips: Iterator[Tensor]) -> Tensor:
        """Raw scores (N,R); not numbers where a reward refuses a picture. Raises RewardError where it refuses all."""
        description = self.collection.description
        scores, refusals = torch.full((len(numbers), len(description.rewards)), math.nan), []
        for i, (number, clip) in enumerate(zip(numbers, clips, strict=True)):
            prompt = self.studio.prompts[description.prompt_of(number)]
            if self.keep_images:
                self.keep(number, clip)
            try:
                scores[i] = self.studio.judge(clip, prompt)
            except RewardError as error:
                refusals.append(RewardError(f"{error} It was seed {description.seed_of(number)} of the prompt {quoted(prompt)}."))
        if len(refusals) == len(numbers):
            raise refusals[0]
        for refusal in refusals:
            log.warning("%s It is left out.", refusal)
        return scores

    def require_same(self) -> None:
        """Raise GuidanceError where what is collected already is not what this model and these rewards make: settings say much of them, and
        not everything, such as what a LoRA holds or which colour is liked."""
        samples = self.collection.first(min(PROBED, self.studio.batch))
        if samples is None:
            return
        clean = samples.clean[torch.arange(len(samples))].float()
        reason = self.another_model(samples, clean) or self.other_scores(samples, clean)
        if reason:
            raise GuidanceError(f"{self.collection.folder.name} holds other samples: {reason}. Choose another folder, or set that back.")

    def another_model(self, samples: Samples, clean: Tensor) -> str:
        """What the model says otherwise of a noised state in the middle of the sampling, in words; nothing of noise, as it was drawn alone."""
        if not samples.description.levels:
            return ""
        middle = samples.description.levels // 2
        sigma, denoised = samples.sigma[:, middle], samples.denoised[torch.arange(len(samples)), torch.full((len(samples),), middle)].float()
        if (self.sigmas(samples.seeds)[:, middle] / sigma - 1).abs().max() > SAME:
            return "the model's noise levels are not what they were"
        drawn = torch.stack([noise(clean.shape[1:], seed, middle) for seed in samples.seeds])
        state = self.process.add_noise(clean, drawn, column(sigma, clean))
        now = self.studio.denoise(state, sigma, samples.prompts.tolist()).cpu()
        apart = float((now - denoised).norm() / denoised.norm())
        return "" if apart < SAME else f"the model, what patches it, or what it is told answers otherwise, by {apart:.0%}"

    def other_scores(self, samples: Samples, clean: Tensor) -> str:
        """What the rewards say otherwise of these samples, in words."""
        description, prompts = samples.description, samples.prompts.tolist()
        if description.base.target == "noise":
            latents = self.studio.sample(prompts, samples.seeds, lambda *_: None)
        else:
            latents = self.studio.model.model.process_latent_out(clean)
        clips = decode(self.studio.vae, latents)
        now = torch.stack([self.studio.judge(clip, self.studio.prompts[prompt]) for clip, prompt in zip(clips, prompts, strict=True)]).cpu()
        apart = ((now - samples.scores).abs() / torch.tensor(description.reward_stds)).nan_to_num(math.inf)
        sample, reward = divmod(int(apart.argmax()), len(description.rewards))
        if apart.max() < SAME_SCORE:
            return ""
        before, after = samples.scores[sample, reward], now[sample, reward]
        return f"the score of sample {int(samples.numbers[sample])} by {description.rewards[reward]} was {before:.4f} and is now {after:.4f}"

    @property
    def process(self) -> Process:
        return process_of(self.studio.model.get_model_object("model_sampling"), self.studio.start().shape)

    def sigmas(self, seeds: Sequence[int]) -> Tensor:
        """The noise levels (N,K) at which the model is asked of the samples with these seeds."""
        sampling, levels = self.studio.model.get_model_object("model_sampling"), self.collection.description.levels
        return torch.tensor([[level(sampling, percent) for percent in percents(seed, levels).tolist()] for seed in seeds])

    def denoise(self, x: Tensor, sigma: Tensor, prompts: Sequence[int]) -> Tensor:
        denoised = self.studio.denoise(x, sigma, prompts)
        self.tick(len(x), denoised)
        return denoised

    def keep(self, number: int, clip: Tensor) -> None:
        for i, frame in enumerate(clip):
            name = f"{number:06}.png" if len(clip) == 1 else f"{number:06}_{i:03}.png"
            write(self.collection.folder / "images" / name, partial(picture(frame).save, format="PNG"))


def picture(frame: Tensor) -> Image.Image:
    """Of pixels (H,W,C) in [0,1]."""
    return Image.fromarray((frame[..., :3].cpu() * 255).round().clamp(0, 255).byte().numpy())


def level(sampling, percent: float) -> float:
    """The noise level at a share of the sampling, within what the model was trained on."""
    return min(max(sampling.percent_to_sigma(percent), float(sampling.sigma_min)), float(sampling.sigma_max))


def noises(start: Tensor, seeds: list[int], scores: Tensor) -> list[Sample]:
    """What a one-step generator began with, and how its pictures were liked."""
    none = torch.empty(0, *start.shape[1:])
    return [Sample(comfy.sample.prepare_noise(start, seed)[0].cpu(), scores[i], torch.empty(0), none) for i, seed in enumerate(seeds)]


def parts_of(reward: Reward) -> list[tuple[Reward, float]]:
    """The rewards of a combination with their weights, or one reward alone."""
    if isinstance(reward, CombinedReward):
        return list(zip(cast(Sequence[Reward], reward.rewards), reward.weights, strict=True))
    return [(reward, 1.0)]
