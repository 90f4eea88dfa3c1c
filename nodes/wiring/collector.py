"""Makes and scores the missing samples of a collection."""

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
from .sample_maker import OnProgress, SampleMaker, to_image
from .scoring import decode, syntax_remarks, weighted_parts

log = logging.getLogger(__name__)
PROBED = 4
"""Samples that are made and scored again before a collection continues."""
SAME, SAME_SCORE = 0.03, 0.1
"""Tolerances for another device: relative error of D, and standard deviations of a reward."""


@dataclass(frozen=True)
class Collector:
    """Makes the missing samples of a collection, shard by shard."""

    maker: SampleMaker
    collection: Collection
    keep_images: bool
    on_progress: OnProgress

    def shard(self, numbers: range) -> list[Sample]:
        """Make and score the samples with these numbers. Raises RewardError if no picture can be scored."""
        description = self.collection.description
        prompts = [description.prompt_of(number) for number in numbers]
        seeds = [description.seed_of(number) for number in numbers]
        latents = self.maker.sample(prompts, seeds, self.on_progress)
        clips = (clip for part in latents.split(self.maker.batch) for clip in decode(self.maker.vae, part))
        scores = self.score_all(numbers, clips)
        if description.base.target == "noise":
            return noise_samples(self.maker.start(), seeds, scores)
        clean = self.maker.model.model.process_latent_in(latents.float())
        return states(
            clean, scores, seeds, self.sigmas(seeds), self.process, lambda x, sigma: self.denoise(x, sigma, prompts)
        )

    def score_all(self, numbers: range, clips: Iterator[Tensor]) -> Tensor:
        """Raw scores (N,R), NaN for a picture that cannot be scored. Raises RewardError if none can be scored."""
        description = self.collection.description
        scores, errors = torch.full((len(numbers), len(description.rewards)), math.nan), []
        for i, (number, clip) in enumerate(zip(numbers, clips, strict=True)):
            prompt = self.maker.prompts[description.prompt_of(number)]
            if self.keep_images:
                self.keep(number, clip)
            try:
                scores[i] = self.maker.score(clip, prompt)
            except RewardError as error:
                errors.append(
                    RewardError(f"{error} It was seed {description.seed_of(number)} of the prompt {quoted(prompt)}.")
                )
        if len(errors) == len(numbers):
            raise errors[0]
        for failure in errors:
            log.warning("%s It is left out.", failure)
        return scores

    def require_same(self) -> None:
        """Raise GuidanceError if the first samples would now be different, as with another LoRA or another colour.

        The description of a collection cannot tell such models and rewards apart.
        """
        samples = self.collection.first(min(PROBED, self.maker.batch))
        if samples is None:
            return
        clean = samples.clean[torch.arange(len(samples))].float()
        reason = self.model_difference(samples, clean) or self.score_difference(samples, clean)
        if reason:
            raise GuidanceError(
                f"{self.collection.folder.name} holds other samples: {reason}. Choose another folder, or set that back."
            )

    def model_difference(self, samples: Samples, clean: Tensor) -> str:
        """How the prediction for a noised state in the middle of the sampling has changed; "" if it has not.

        Samples of noise hold no predictions, so there is nothing to compare.
        """
        if not samples.description.levels:
            return ""
        middle = samples.description.levels // 2
        sigma = samples.sigma[:, middle]
        denoised = samples.denoised[torch.arange(len(samples)), torch.full((len(samples),), middle)].float()
        if (self.sigmas(samples.seeds)[:, middle] / sigma - 1).abs().max() > SAME:
            return "the model's noise levels have changed"
        drawn = torch.stack([noise(clean.shape[1:], seed, middle) for seed in samples.seeds])
        state = self.process.add_noise(clean, drawn, column(sigma, clean))
        now = self.maker.denoise(state, sigma, samples.prompts.tolist()).cpu()
        error = float((now - denoised).norm() / denoised.norm())
        if error < SAME:
            return ""
        return f"the model, its patches or its conditioning have changed, and predictions differ by {error:.0%}"

    def score_difference(self, samples: Samples, clean: Tensor) -> str:
        """How the scores of these samples have changed; "" if they have not."""
        description, prompts = samples.description, samples.prompts.tolist()
        if description.base.target == "noise":
            latents = self.maker.sample(prompts, samples.seeds, lambda *_: None)
        else:
            latents = self.maker.model.model.process_latent_out(clean)
        clips = decode(self.maker.vae, latents)
        now = torch.stack(
            [self.maker.score(clip, self.maker.prompts[prompt]) for clip, prompt in zip(clips, prompts, strict=True)]
        ).cpu()
        errors = ((now - samples.scores).abs() / torch.tensor(description.reward_stds)).nan_to_num(math.inf)
        sample, reward = divmod(int(errors.argmax()), len(description.rewards))
        if errors.max() < SAME_SCORE:
            return ""
        before, after = samples.scores[sample, reward], now[sample, reward]
        number, name = int(samples.numbers[sample]), description.rewards[reward]
        return f"the score of sample {number} by {name} was {before:.4f} and is now {after:.4f}"

    @property
    def process(self) -> Process:
        return process_of(self.maker.model.get_model_object("model_sampling"), self.maker.start().shape)

    def sigmas(self, seeds: Sequence[int]) -> Tensor:
        """The noise levels (N,K) of the predictions for the samples with these seeds."""
        sampling, levels = self.maker.model.get_model_object("model_sampling"), self.collection.description.levels
        return torch.tensor(
            [[sigma_at(sampling, percent) for percent in percents(seed, levels).tolist()] for seed in seeds]
        )

    def denoise(self, x: Tensor, sigma: Tensor, prompts: Sequence[int]) -> Tensor:
        """D (N,...) of states x (N,...) at noise levels sigma (N,)."""
        denoised = self.maker.denoise(x, sigma, prompts)
        self.on_progress(len(x), denoised)
        return denoised

    def keep(self, number: int, clip: Tensor) -> None:
        """Save an image or video (T,H,W,C) as PNG."""
        for i, frame in enumerate(clip):
            name = f"{number:06}.png" if len(clip) == 1 else f"{number:06}_{i:03}.png"
            write(self.collection.folder / "images" / name, partial(to_image(frame).save, format="PNG"))


def sigma_at(sampling, percent: float) -> float:
    """The noise level after a share of the sampling, clamped to the model's range."""
    return min(max(sampling.percent_to_sigma(percent), float(sampling.sigma_min)), float(sampling.sigma_max))


def noise_samples(start: Tensor, seeds: list[int], scores: Tensor) -> list[Sample]:
    """Samples of a one-step generator: the initial noise of each seed, and the scores (N,R) of its pictures."""
    none = torch.empty(0, *start.shape[1:])
    return [
        Sample(comfy.sample.prepare_noise(start, seed)[0].cpu(), scores[i], torch.empty(0), none)
        for i, seed in enumerate(seeds)
    ]


class CollectionProgress:
    """A progress bar over all model calls, with previews."""

    def __init__(self, model, total: int):
        self.show, self.total, self.done = latent_preview.prepare_callback(model, total), total, 0

    def __call__(self, amount: int, denoised: Tensor) -> None:
        self.done = min(self.done + amount, self.total)
        self.show(self.done - 1, denoised, denoised, self.total)


def collect(node: str, maker: SampleMaker, collection: Collection, count: int, keep_images: bool) -> None:
    """Add the missing samples up to `count`. An interrupt keeps the shards that are on disk.

    Raises GuidanceError if the collection holds other samples, or if samples were deleted meanwhile.
    """
    missing = list(collection.missing(count))
    left = sum(map(len, missing))
    progress = CollectionProgress(maker.model, left * (maker.steps + collection.description.levels))
    collector = Collector(maker, collection, keep_images, progress)
    collector.require_same()

    def show(text: str) -> None:
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
            show(f"· reward {rewards.nanmean():+.3f}")
    except comfy.model_management.InterruptProcessingException:
        show("are on disk; queue again to continue")
        raise
    if next(collection.missing(count), None) is not None:
        raise GuidanceError(
            f"Samples in {collection.folder.name} were deleted while more were collected: "
            "queue again to make them anew."
        )


def collection_remarks(prompts: tuple[str, ...], reward: LoadedReward) -> list[str]:
    """Sentences about how many prompts have syntax that the reward does not read, with an example."""
    rewards = [part for part, _ in weighted_parts(reward.reward)]
    found = [remarks for prompt in prompts if (remarks := syntax_remarks(prompt, rewards))]
    count = f"The reward does not read ComfyUI's syntax in {len(found)} of {len(prompts)} prompts. For example:"
    return [count, *found[0]] if found else []
