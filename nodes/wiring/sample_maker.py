"""Makes samples with a model, its text encoder and its VAE, and scores them by a reward."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import comfy.samplers
import torch
from PIL import Image
from torch import Tensor

from ...guidance.data.collection import Collection
from ...guidance.data.description import Description
from ...guidance.data.samples import Texts, half
from ...guidance.errors import GuidanceError
from ...guidance.rewards import CombinedReward
from .latents import fit_samples
from .loaded import LoadedReward
from .model_info import base_of, name_of, text_of_conditioning
from .sampling import Sampling
from .scoring import score_parts, weighted_parts

OnProgress = Callable[[int, Tensor], None]
"""Called with the number of samples that made a step, and their denoised latents."""


@dataclass(frozen=True)
class SampleMaker:
    """Makes and scores samples of a list of prompts, with fixed sampler settings."""

    model: Any
    prompts: tuple[str, ...]
    encode: Callable[[str], list]
    """Prompt -> CONDITIONING."""
    negative: str
    steps: int
    cfg: float
    sampler_name: str
    scheduler: str
    latent: dict
    """A LATENT with one empty sample."""
    batch: int
    """Most samples in one model call."""
    vae: Any
    reward: LoadedReward

    def sampling(self, positive: list) -> Sampling:
        settings = self.steps, self.cfg, self.sampler_name, self.scheduler
        return Sampling(self.model, *settings, positive, self.encode(self.negative), 1.0)

    def start(self) -> Tensor:
        """The empty latent (1,C,...) in the model's shape."""
        return fit_samples(self.model, self.latent)

    def in_groups(self, prompts: Sequence[int], run: Callable[[Sampling, list[int]], Tensor]) -> Tensor:
        """Run groups of samples whose prompts fit in one batch. Returns the results (N,...) in the order of `prompts`.

        prompts: indices into the list of prompts. run: a sampling and the positions of a group (M) -> (M,...).
        """
        conditionings = [self.encode(self.prompts[prompt]) for prompt in prompts]
        parts, order = [], []
        for chosen in stackable(conditionings, self.batch):
            parts.append(run(self.sampling(stacked([conditionings[i] for i in chosen])), chosen))
            order += chosen
        return torch.cat(parts)[torch.tensor(order).argsort()]

    def sample(
        self,
        prompts: Sequence[int],
        seeds: Sequence[int],
        on_progress: OnProgress,
        guide: Callable[[Sampling], Sampling] = lambda s: s,
    ) -> Tensor:
        """Latents (N,...), each from the noise of its own seed. `guide` may patch the sampling."""

        def run(sampling: Sampling, chosen: list[int]) -> Tensor:
            at_once = sampling.at_once(len(chosen), self.latent, len(chosen))
            if at_once < len(chosen):
                return torch.cat([self.sample([prompts[i]], [seeds[i]], on_progress, guide) for i in chosen])
            return guide(sampling)(
                self.latent, [seeds[i] for i in chosen], lambda step, x0, x, steps: on_progress(len(chosen), x0)
            )

        return self.in_groups(prompts, run)

    def denoise(self, x: Tensor, sigma: Tensor, prompts: Sequence[int]) -> Tensor:
        """The prediction D (N,...) for states x (N,...) at noise levels sigma (N,), in the model's space, with CFG."""
        return self.in_groups(
            prompts, lambda sampling, chosen: denoise_once(sampling, self.latent, x[chosen], sigma[chosen])
        )

    def score(self, clip: Tensor, prompt: str) -> Tensor:
        """Raw scores (R,) by each reward of an image or video (T,H,W,C): the mean over its frames."""
        parts = score_parts(clip, self.reward, prompt)
        parts = parts[1:] if isinstance(parts[0][0], CombinedReward) else parts
        return torch.stack([scores.mean() for _, scores in parts])

    def text(self) -> Texts:
        """The text tensors of all prompts, as guidance networks read them."""
        texts = [text_of_conditioning(self.encode(prompt)) for prompt in self.prompts]
        return Texts(
            [half(text.tokens[0].cpu()) for text in texts], torch.cat([text.pooled[:1].cpu() for text in texts])
        )


def describe(maker: SampleMaker, target: str, levels: int, seed: int) -> Description:
    """The description of a collection. target: "data" or "noise"; levels: noise levels per sample."""
    shape = tuple(maker.start().shape[1:])
    parts = weighted_parts(maker.reward.reward)
    return Description(
        base=base_of(maker.model, target, shape),
        shape=shape,
        levels=levels if target == "data" else 0,
        prompts=maker.prompts,
        rewards=tuple(part.name for part, _ in parts),
        reward_means=tuple(float(part.reference_mean) for part, _ in parts),
        reward_stds=tuple(float(part.reference_std) for part, _ in parts),
        seed=seed,
        settings=settings_text(maker),
        reward_weights=tuple(weight for _, weight in parts),
    )


def settings_text(maker: SampleMaker) -> str:
    """The settings that samples depend on, one a line: a collection continues only if they are the same."""
    parts = weighted_parts(maker.reward.reward)
    return "\n".join(
        [
            name_of(maker.model),
            f"{maker.steps} steps",
            maker.sampler_name,
            maker.scheduler,
            f"cfg {maker.cfg:g}",
            f"negative prompt {maker.negative!r}",
            *(f"{part.name} {part.compared_with}" for part, _ in parts if part.compared_with),
        ]
    )


def denoise_once(sampling: Sampling, latent: dict, x: Tensor, sigma: Tensor) -> Tensor:
    """D of given states: runs a sampler that calls the model once."""
    predictions = []

    def function(model, start: Tensor, sigmas: Tensor, extra_args=None, callback=None, disable=None) -> Tensor:
        predictions.append(model(x.to(start.device), sigma.to(start.device), **(extra_args or {})))
        return start

    sampling.run(comfy.samplers.KSAMPLER(function), latent, [0] * len(x), lambda *_: None)
    return predictions[0]


def stackable(conditionings: Sequence[list], most: int) -> Iterator[list[int]]:
    """Groups of at most `most` conditionings that can be stacked, as indices."""
    groups: dict[Any, list[int]] = {}
    for i, conditioning in enumerate(conditionings):
        groups.setdefault(stacking_key(conditioning) or i, []).append(i)
    for group in groups.values():
        yield from (group[start : start + most] for start in range(0, len(group), most))


def stacking_key(conditioning: list) -> tuple | None:
    """Conditionings with equal keys can be stacked.

    None: it holds more than tensors of one row, and cannot be stacked.
    """
    parts = {"": conditioning[0][0], **conditioning[0][1]}
    if len(conditioning) > 1 or not all(
        isinstance(part, Tensor) and part.ndim and len(part) == 1 for part in parts.values()
    ):
        return None
    return tuple(sorted((name, part.shape) for name, part in parts.items()))


def stacked(conditionings: Sequence[list]) -> list:
    """Stack conditionings with equal keys: one row for each."""
    if len(conditionings) == 1:
        return conditionings[0]
    tokens, options = zip(*(conditioning[0] for conditioning in conditionings), strict=True)
    return [[torch.cat(tokens), {name: torch.cat([each[name] for each in options]) for name in options[0]}]]


def to_image(frame: Tensor) -> Image.Image:
    """frame: (H,W,C) in [0,1]; only the first three channels are used."""
    return Image.fromarray((frame[..., :3].cpu() * 255).round().clamp(0, 255).byte().numpy())


@dataclass(frozen=True)
class GuidanceData:
    """The value of a GUIDANCE_DATA link: labelled samples, and the maker of them, if it is connected."""

    collection: Collection
    maker: SampleMaker | None = None

    def require_maker(self, what: str) -> SampleMaker:
        """The maker of the samples. Raises GuidanceError, which names the feature `what`, if there is none."""
        if self.maker is None:
            raise GuidanceError(
                f"{what} needs the model that made the samples: "
                "connect Collect Guidance Data in place of Load Guidance Data."
            )
        return self.maker


CACHED_PROMPTS = 256
"""Prompts whose conditionings are cached."""


def encoder(clip) -> Callable[[str], list]:
    """The function from a prompt to its CONDITIONING, with a cache.

    Raises GuidanceError if there is no text encoder.
    """
    if clip is None:
        raise GuidanceError(
            "There is no text encoder: the checkpoint holds none. Load one with a CLIP loader and connect it."
        )
    return lru_cache(CACHED_PROMPTS)(lambda prompt: clip.encode_from_tokens_scheduled(clip.tokenize(prompt)))
