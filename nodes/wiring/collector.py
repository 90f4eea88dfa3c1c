"""Samples and scores what a collection lacks."""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import comfy.model_management
import comfy.sample
import latent_preview
import torch
from server import PromptServer
from torch import Tensor

from ...guidance.data.collection import Collection
from ...guidance.data.samples import Sample, Samples, noise, percents, states
from ...guidance.disk import write
from ...guidance.errors import GuidanceError, quoted
from ...guidance.process import Process, column
from ...guidance.rewards import RewardError
from .loaded import LoadedReward
from .model_info import process_of
from .sample_maker import SampleMaker, Tick, picture
from .scoring import decode, left_out, weighted_parts

log = logging.getLogger(__name__)
PROBED = 4
"""Samples that are looked at again before a collection goes on."""
SAME, SAME_SCORE = 0.03, 0.1
"""What another device may make otherwise: a share of D, and standard deviations of a reward."""


@dataclass(frozen=True)
class Collector:
    """Samples and labels what is missing of a collection, shard by shard."""

    maker: SampleMaker
    collection: Collection
    keep_images: bool
    tick: Tick

    def shard(self, numbers: range) -> list[Sample]:
        description = self.collection.description
        prompts = [description.prompt_of(number) for number in numbers]
        seeds = [description.seed_of(number) for number in numbers]
        latents = self.maker.sample(prompts, seeds, self.tick)
        clips = (clip for part in latents.split(self.maker.batch) for clip in decode(self.maker.vae, part))
        scores = self.judge_all(numbers, clips)
        if description.base.target == "noise":
            return noises(self.maker.start(), seeds, scores)
        clean = self.maker.model.model.process_latent_in(latents.float())
        return states(
            clean, scores, seeds, self.sigmas(seeds), self.process, lambda x, sigma: self.denoise(x, sigma, prompts)
        )

    def judge_all(self, numbers: range, clips: Iterator[Tensor]) -> Tensor:
        """Raw scores (N,R); not numbers where a reward refuses a picture. Raises RewardError where it refuses all."""
        description = self.collection.description
        scores, refusals = torch.full((len(numbers), len(description.rewards)), math.nan), []
        for i, (number, clip) in enumerate(zip(numbers, clips, strict=True)):
            prompt = self.maker.prompts[description.prompt_of(number)]
            if self.keep_images:
                self.keep(number, clip)
            try:
                scores[i] = self.maker.judge(clip, prompt)
            except RewardError as error:
                refusals.append(
                    RewardError(f"{error} It was seed {description.seed_of(number)} of the prompt {quoted(prompt)}.")
                )
        if len(refusals) == len(numbers):
            raise refusals[0]
        for refusal in refusals:
            log.warning("%s It is left out.", refusal)
        return scores

    def require_same(self) -> None:
        """Raise GuidanceError where what is collected already is not what this model and these rewards make: settings say much of them, and
        not everything, such as what a LoRA holds or which colour is liked."""
        samples = self.collection.first(min(PROBED, self.maker.batch))
        if samples is None:
            return
        clean = samples.clean[torch.arange(len(samples))].float()
        reason = self.another_model(samples, clean) or self.other_scores(samples, clean)
        if reason:
            raise GuidanceError(
                f"{self.collection.folder.name} holds other samples: {reason}. Choose another folder, or set that back."
            )

    def another_model(self, samples: Samples, clean: Tensor) -> str:
        """What the model says otherwise of a noised state in the middle of the sampling, in words; nothing of noise, as it was drawn alone."""
        if not samples.description.levels:
            return ""
        middle = samples.description.levels // 2
        sigma, denoised = (
            samples.sigma[:, middle],
            samples.denoised[torch.arange(len(samples)), torch.full((len(samples),), middle)].float(),
        )
        if (self.sigmas(samples.seeds)[:, middle] / sigma - 1).abs().max() > SAME:
            return "the model's noise levels are not what they were"
        drawn = torch.stack([noise(clean.shape[1:], seed, middle) for seed in samples.seeds])
        state = self.process.add_noise(clean, drawn, column(sigma, clean))
        now = self.maker.denoise(state, sigma, samples.prompts.tolist()).cpu()
        apart = float((now - denoised).norm() / denoised.norm())
        return (
            "" if apart < SAME else f"the model, what patches it, or what it is told answers otherwise, by {apart:.0%}"
        )

    def other_scores(self, samples: Samples, clean: Tensor) -> str:
        """What the rewards say otherwise of these samples, in words."""
        description, prompts = samples.description, samples.prompts.tolist()
        if description.base.target == "noise":
            latents = self.maker.sample(prompts, samples.seeds, lambda *_: None)
        else:
            latents = self.maker.model.model.process_latent_out(clean)
        clips = decode(self.maker.vae, latents)
        now = torch.stack(
            [self.maker.judge(clip, self.maker.prompts[prompt]) for clip, prompt in zip(clips, prompts, strict=True)]
        ).cpu()
        apart = ((now - samples.scores).abs() / torch.tensor(description.reward_stds)).nan_to_num(math.inf)
        sample, reward = divmod(int(apart.argmax()), len(description.rewards))
        if apart.max() < SAME_SCORE:
            return ""
        before, after = samples.scores[sample, reward], now[sample, reward]
        return f"the score of sample {int(samples.numbers[sample])} by {description.rewards[reward]} was {before:.4f} and is now {after:.4f}"

    @property
    def process(self) -> Process:
        return process_of(self.maker.model.get_model_object("model_sampling"), self.maker.start().shape)

    def sigmas(self, seeds: Sequence[int]) -> Tensor:
        """The noise levels (N,K) at which the model is asked of the samples with these seeds."""
        sampling, levels = self.maker.model.get_model_object("model_sampling"), self.collection.description.levels
        return torch.tensor(
            [[level(sampling, percent) for percent in percents(seed, levels).tolist()] for seed in seeds]
        )

    def denoise(self, x: Tensor, sigma: Tensor, prompts: Sequence[int]) -> Tensor:
        denoised = self.maker.denoise(x, sigma, prompts)
        self.tick(len(x), denoised)
        return denoised

    def keep(self, number: int, clip: Tensor) -> None:
        for i, frame in enumerate(clip):
            name = f"{number:06}.png" if len(clip) == 1 else f"{number:06}_{i:03}.png"
            write(self.collection.folder / "images" / name, partial(picture(frame).save, format="PNG"))


def level(sampling, percent: float) -> float:
    """The noise level at a share of the sampling, within what the model was trained on."""
    return min(max(sampling.percent_to_sigma(percent), float(sampling.sigma_min)), float(sampling.sigma_max))


def noises(start: Tensor, seeds: list[int], scores: Tensor) -> list[Sample]:
    """What a one-step generator began with, and how its pictures were liked."""
    none = torch.empty(0, *start.shape[1:])
    return [
        Sample(comfy.sample.prepare_noise(start, seed)[0].cpu(), scores[i], torch.empty(0), none)
        for i, seed in enumerate(seeds)
    ]


class Bar:
    """A progress bar over all samples, with previews."""

    def __init__(self, model, total: int):
        self.show, self.total, self.done = latent_preview.prepare_callback(model, total), total, 0

    def __call__(self, amount: int, denoised: Tensor) -> None:
        self.done = min(self.done + amount, self.total)
        self.show(self.done - 1, denoised, denoised, self.total)


def collect(node: str, maker: SampleMaker, collection: Collection, count: int, keep_images: bool) -> None:
    """Fill up a collection. What is on disk when it is interrupted stays there."""
    missing = list(collection.missing(count))
    left = sum(map(len, missing))
    collector = Collector(
        maker, collection, keep_images, Bar(maker.model, left * (maker.steps + collection.description.levels))
    )
    collector.require_same()

    def say(text: str) -> None:
        PromptServer.instance.send_progress_text(f"{count - left} of {count} samples {text}", node)

    try:
        for numbers in missing:
            if collection.has(numbers):  # another server was faster
                left -= len(numbers)
                continue
            samples = collector.shard(numbers)
            collection.add(numbers, samples)
            left -= len(numbers)
            rewards = collection.description.combined(torch.stack([sample.scores for sample in samples]))
            say(f"· reward {rewards.nanmean():+.3f}")
    except comfy.model_management.InterruptProcessingException:
        say("are on disk; queue again to go on")
        raise
    if next(collection.missing(count), None) is not None:
        raise GuidanceError(
            f"Samples in {collection.folder.name} were deleted while more were collected: queue again, which makes them anew."
        )


def remarks_on(prompts: tuple[str, ...], reward: LoadedReward) -> list[str]:
    """Of how many prompts the reward leaves out ComfyUI's syntax, and what it reads of the first of them."""
    found = [
        said for prompt in prompts if (said := left_out(prompt, [part for part, _ in weighted_parts(reward.reward)]))
    ]
    count = f"The reward does not read ComfyUI's syntax in {len(found)} of {len(prompts)} prompts. For example:"
    return [count, *found[0]] if found else []
