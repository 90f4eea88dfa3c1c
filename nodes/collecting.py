"""The nodes that make and find labelled samples: what a guidance network is trained on."""

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, cast

import comfy.model_management
import comfy.sample
import comfy.samplers
import folder_paths
import latent_preview
import torch
from comfy_api.v0_0_2 import io, ui
from PIL import Image
from server import PromptServer
from torch import Tensor

from ..guidance.errors import GuidanceError
from ..guidance.files import write
from ..guidance.fitting import overview
from ..guidance.process import Process, column
from ..guidance.rewards import CombinedReward, Reward, RewardError
from ..guidance.samples import SHARD, Collection, Description, Sample, Samples, Texts, half, noise, percents, states
from .decoders import check_belongs
from .guidance import sampler_inputs
from .rewards import REWARD, score_parts
from .runtime import LoadedReward, base_of, name_of, process_of, require_unguided, text_of_conditioning
from .sampling import Sampling, samples_of, start_of
from .selection import decode

log = logging.getLogger(__name__)

DATA = io.Custom("GUIDANCE_DATA")
CATEGORY = "reward guidance/training"
FOLDER = "guidance_data"
LONGEST = 200
"""Bytes of a folder's name."""
PROBED = 4
"""Samples that are looked at again before a collection goes on."""
SAME, SAME_SCORE = 0.03, 0.1
"""What another device may make otherwise: a share of D, and standard deviations of a reward."""
REMEMBERED = 256
"""Prompts whose encodings are kept."""

_collected: dict[str, tuple[Collection, int]] = {}
"""Node -> what it filled up, and to how many samples."""
_damaged: Counter[str] = Counter()
"""Node -> how often something was gone of that when it was queued again. It is collected anew instead of being taken from ComfyUI's cache."""

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
class GuidanceData:
    """What travels along a GUIDANCE_DATA link: labelled samples, and what made them, if it is at hand."""

    collection: Collection
    studio: Studio | None = None

    def ask(self, what: str) -> Studio:
        if self.studio is None:
            raise GuidanceError(f"{what} needs the model that made the samples: connect Collect Guidance Data in place of Load Guidance Data.")
        return self.studio


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
                refusals.append(RewardError(f"{error} It was seed {description.seed_of(number)} of the prompt {prompt[:60]!r}."))
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
        reason = self.another_model(samples) or self.other_scores(samples)
        if reason:
            raise GuidanceError(f"{self.collection.folder.name} holds other samples: {reason}. Choose another folder, or set that back.")

    def another_model(self, samples: Samples) -> str:
        """What the model says otherwise of a noised state in the middle of the sampling, in words; nothing of noise, as it was drawn alone."""
        if not samples.description.levels:
            return ""
        seeds = [samples.description.seed_of(number) for number in samples.numbers.tolist()]
        middle, clean = samples.description.levels // 2, samples.clean[torch.arange(len(samples))].float()
        sigma, denoised = samples.sigma[:, middle], samples.denoised[torch.arange(len(samples)), torch.full((len(samples),), middle)].float()
        if (self.sigmas(seeds)[:, middle] / sigma - 1).abs().max() > SAME:
            return "the model's noise levels are not what they were"
        drawn = torch.stack([noise(clean.shape[1:], seed, middle) for seed in seeds])
        state = self.process.add_noise(clean, drawn, column(sigma, clean))
        now = self.studio.denoise(state, sigma, samples.prompts.tolist()).cpu()
        apart = float((now - denoised).norm() / denoised.norm())
        return "" if apart < SAME else f"the model, what patches it, or what it is told answers otherwise, by {apart:.0%}"

    def other_scores(self, samples: Samples) -> str:
        """What the rewards say otherwise of these samples, in words."""
        description, numbers = samples.description, samples.numbers.tolist()
        latents = samples.clean[torch.arange(len(samples))].float()
        prompts = samples.prompts.tolist()
        if description.base.target == "noise":
            latents = self.studio.sample(prompts, [description.seed_of(number) for number in numbers], lambda *_: None)
        else:
            latents = self.studio.model.model.process_latent_out(latents)
        clips = decode(self.studio.vae, latents)
        now = torch.stack([self.studio.judge(clip, self.studio.prompts[prompt]) for clip, prompt in zip(clips, prompts, strict=True)]).cpu()
        apart = ((now - samples.scores).abs() / torch.tensor(description.reward_stds)).nan_to_num(math.inf)
        sample, reward = divmod(int(apart.argmax()), len(description.rewards))
        if apart.max() < SAME_SCORE:
            return ""
        before, after = samples.scores[sample, reward], now[sample, reward]
        return f"the score of sample {numbers[sample]} by {description.rewards[reward]} was {before:.4f} and is now {after:.4f}"

    @property
    def process(self) -> Process:
        return process_of(self.studio.model.get_model_object("model_sampling"))

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


def lines(text: str) -> tuple[str, ...]:
    """The prompts of a text, one on each line."""
    found = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not found:
        raise GuidanceError("There is no prompt: write one on each line.")
    return found


def folder_named(name: str) -> Path:
    """output/guidance_data/NAME"""
    name = name.strip()
    if not name or name != Path(name).name or name == ".." or "\0" in name or len(name.encode()) > LONGEST:
        raise GuidanceError(f"{name[:60]!r} is not a name for a folder in output/{FOLDER}: write a short one without slashes.")
    return folder_root() / name


def folder_root() -> Path:
    return Path(folder_paths.get_output_directory()) / FOLDER


def encoder(clip) -> Callable[[str], list]:
    if clip is None:
        raise GuidanceError("There is no text encoder: the checkpoint holds none. Load one with a CLIP loader and connect it.")
    return lru_cache(REMEMBERED)(lambda prompt: clip.encode_from_tokens_scheduled(clip.tokenize(prompt)))


class Bar:
    """A progress bar over all samples, with previews."""

    def __init__(self, model, total: int):
        self.show, self.total, self.done = latent_preview.prepare_callback(model, total), total, 0

    def __call__(self, amount: int, denoised: Tensor) -> None:
        self.done = min(self.done + amount, self.total)
        self.show(self.done - 1, denoised, denoised, self.total)


class CollectData(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        _, steps, cfg, sampler_name, scheduler, *_ = sampler_inputs()
        rare = {"advanced": True}
        return io.Schema(
            node_id="RewardGuidanceCollect",
            display_name="Collect Guidance Data",
            category=CATEGORY,
            description="Samples pictures of a list of prompts, scores them, and keeps both for training a guidance network. It goes on where it "
            "was stopped, and raising the count adds samples to those that are there. A picture that cannot be scored is left out.",
            search_aliases=["label samples", "training data", "dataset", "reward labels"],
            inputs=[
                io.Model.Input("model", tooltip="The model to learn about, before any reward guidance. Any family, with or without LoRA."),
                io.Clip.Input("clip", tooltip="Its text encoder."),
                io.Vae.Input("vae", tooltip="Decodes the samples, to be scored."),
                REWARD.Input("reward", tooltip="What to learn. Of Combine Rewards each part is kept, so that weights can be changed later."),
                io.Latent.Input(
                    "latent_image",
                    tooltip="An empty latent: its size is that of the samples, its batch size how many are made at once. Its content does not count.",
                ),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="",
                    tooltip="One prompt on each line; they take turns. What the network will be used for: 10 to 10,000 prompts.",
                ),
                io.String.Input("negative_prompt", default="", tooltip="What the pictures should not show; without effect at a cfg of 1.", **rare),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**64 - 1,
                    control_after_generate=False,
                    tooltip="The seed of the first sample; the others follow. A collection goes on only with the seed that it began with.",
                    **rare,
                ),
                steps,
                cfg,
                sampler_name,
                scheduler,
                io.Int.Input(
                    "count",
                    default=1024,
                    min=1,
                    max=10_000_000,
                    tooltip=f"Samples in all, kept {SHARD} to a file. 500 to 20,000: more follow the reward more closely. On disk each takes 0.3 MB "
                    "(SD1.5 at 512 pixels) to 4.7 MB (Flux at 1024).",
                ),
                io.Combo.Input(
                    "target",
                    options=["data", "noise"],
                    tooltip="data: for models that take several steps. noise: for one-step generators such as SD-Turbo, whose first noise is "
                    "what will be chosen; set steps and cfg as you use them.",
                ),
                io.String.Input(
                    "folder",
                    default="guidance",
                    tooltip=f"Where in output/{FOLDER} the samples go: a folder of its own for each model and way of sampling.",
                ),
                io.Int.Input(
                    "levels",
                    default=8,
                    min=1,
                    max=1000,
                    tooltip="data: noise levels at which the model is asked about each sample. More teach more from a sample; each costs a "
                    "model call and disk space. 4 to 16.",
                    **rare,
                ),
                io.Boolean.Input("keep_images", default=False, tooltip="Also keep every new picture, as PNG in the subfolder images.", **rare),
            ],
            outputs=[
                DATA.Output(display_name="data", tooltip="For Train Guidance Network."),
                io.String.Output(display_name="report", tooltip="How many samples there are, how they score, and what can be learned from them."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        model,
        clip,
        vae,
        reward: LoadedReward,
        latent_image: dict,
        prompts: str,
        negative_prompt: str,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        count: int,
        target: str,
        folder: str,
        levels: int,
        keep_images: bool,
    ) -> io.NodeOutput:
        if min(count, levels) < 1:
            raise GuidanceError(f"Count and levels must be at least 1, not {count} and {levels}.")
        require_unguided(model)
        check_belongs(vae, model.get_model_object("latent_format"))
        samples, told = samples_of(latent_image), lines(prompts)
        empty = {name: value for name, value in latent_image.items() if name.startswith("downscale_ratio")}
        empty["samples"] = torch.zeros_like(samples[:1])
        how = (steps, cfg, sampler_name, scheduler)
        studio = Studio(model, told, encoder(clip), negative_prompt, *how, empty, len(samples), vae, reward)
        parts = parts_of(reward.reward)
        description = Description(
            base=base_of(model, target),
            shape=tuple(studio.start().shape[1:]),
            levels=levels if target == "data" else 0,
            prompts=told,
            rewards=tuple(part.name for part, _ in parts),
            reward_means=tuple(float(part.reference_mean) for part, _ in parts),
            reward_stds=tuple(float(part.reference_std) for part, _ in parts),
            seed=seed,
            settings="\n".join([
                name_of(model), f"{steps} steps", sampler_name, scheduler, f"cfg {cfg:g}", f"negative prompt {negative_prompt!r}",
                *(f"{part.name} {part.compared_with}" for part, _ in parts if part.compared_with),
            ]),
            reward_weights=tuple(weight for _, weight in parts),
        )
        collection = Collection.create(folder_named(folder), description, studio.text)
        collect(cls.hidden.unique_id, studio, collection, count, keep_images)
        _collected[cls.hidden.unique_id] = collection, count
        report = overview(collection)
        return io.NodeOutput(GuidanceData(collection, studio), report, ui=ui.PreviewText(report))

    @classmethod
    def fingerprint_inputs(cls, **_) -> int:
        node = cls.hidden.unique_id
        if node in _collected:
            collection, count = _collected[node]
            _damaged[node] += not collection.whole(count)
        return _damaged[node]


def collect(node: str, studio: Studio, collection: Collection, count: int, keep_images: bool) -> None:
    """Fill up a collection. What is on disk when it is interrupted stays there."""
    missing = list(collection.missing(count))
    left = sum(map(len, missing))
    collector = Collector(studio, collection, keep_images, Bar(studio.model, left * (studio.steps + collection.description.levels)))
    collector.require_same()

    def say(text: str) -> None:
        PromptServer.instance.send_progress_text(f"{count - left} of {count} samples {text}", node)

    try:
        for numbers in missing:
            samples = collector.shard(numbers)
            collection.add(numbers, samples)
            left -= len(numbers)
            rewards = collection.description.combined(torch.stack([sample.scores for sample in samples]))
            say(f"· reward {rewards.nanmean():+.3f}")
    except comfy.model_management.InterruptProcessingException:
        say("are on disk; queue again to go on")
        raise


class LoadData(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RewardGuidanceLoadData",
            display_name="Load Guidance Data",
            category=CATEGORY,
            description=f"Finds samples that were collected before, or on another machine, in output/{FOLDER}.",
            search_aliases=["training data", "dataset", "shards"],
            inputs=[
                io.Combo.Input(
                    "folder",
                    options=sorted(path.parent.name for path in folder_root().glob("*/collection.json")),
                    tooltip=f"A folder in output/{FOLDER} with samples.",
                )
            ],
            outputs=[
                DATA.Output(display_name="data", tooltip="For Train Guidance Network."),
                io.String.Output(display_name="report", tooltip="How many samples there are, how they score, and what can be learned from them."),
            ],
        )

    @classmethod
    def execute(cls, folder: str) -> io.NodeOutput:
        collection = Collection.open(folder_named(folder))
        report = overview(collection)
        return io.NodeOutput(GuidanceData(collection), report, ui=ui.PreviewText(report))

    @classmethod
    def fingerprint_inputs(cls, folder: str) -> list:
        """Samples may have been added, or the rewards weighted anew."""
        return [(path.name, path.stat().st_mtime) for path in sorted(folder_named(folder).glob("*")) if path.suffix in (".safetensors", ".json")]


NODES = [CollectData, LoadData]
