"""Makes samples with a model, its text encoder, its VAE and a reward."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import comfy.samplers
import torch
from PIL import Image
from torch import Tensor

from ...guidance.data.collection import Collection
from ...guidance.data.samples import Texts, half
from ...guidance.errors import GuidanceError
from ...guidance.rewards import CombinedReward
from .latents import start_of
from .loaded import LoadedReward
from .model_info import text_of_conditioning
from .sampling import Sampling
from .scoring import score_parts

Tick = Callable[[int, Tensor], None]
"""Hears how many samples went a step further, and how they look."""


@dataclass(frozen=True)
class SampleMaker:
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
        return Sampling(
            self.model,
            self.steps,
            self.cfg,
            self.sampler_name,
            self.scheduler,
            positive,
            self.encode(self.negative),
            1.0,
        )

    def start(self) -> Tensor:
        """The empty latent (1,C,...) in the model's shape."""
        return start_of(self.model, self.latent)

    def together(self, prompts: Sequence[int], ask: Callable[[Sampling, list[int]], Tensor]) -> Tensor:
        """What is asked of samples (N,...) with these prompts, in groups that the model can be shown at once."""
        conditionings = [self.encode(self.prompts[prompt]) for prompt in prompts]
        parts, order = [], []
        for chosen in stackable(conditionings, self.batch):
            parts.append(ask(self.sampling(stacked([conditionings[i] for i in chosen])), chosen))
            order += chosen
        return torch.cat(parts)[torch.tensor(order).argsort()]

    def sample(
        self,
        prompts: Sequence[int],
        seeds: Sequence[int],
        tick: Tick,
        through: Callable[[Sampling], Sampling] = lambda s: s,
    ) -> Tensor:
        """Latents (N,...), each from the noise of its own seed. `through` may guide the sampling."""

        def ask(sampling: Sampling, chosen: list[int]) -> Tensor:
            at_once = sampling.at_once(len(chosen), self.latent, len(chosen))
            if at_once < len(chosen):
                return torch.cat([self.sample([prompts[i]], [seeds[i]], tick, through) for i in chosen])
            return through(sampling)(
                self.latent, [seeds[i] for i in chosen], lambda step, x0, x, steps: tick(len(chosen), x0)
            )

        return self.together(prompts, ask)

    def denoise(self, x: Tensor, sigma: Tensor, prompts: Sequence[int]) -> Tensor:
        """D (N,...) of states x (N,...) at noise levels (N,), in the model's space and as the guider asks for it, with CFG."""
        return self.together(
            prompts, lambda sampling, chosen: denoise_once(sampling, self.latent, x[chosen], sigma[chosen])
        )

    def judge(self, clip: Tensor, prompt: str) -> Tensor:
        """Raw scores (R,) of a picture or video (T,H,W,C), the mean over its frames."""
        scored = score_parts(clip, self.reward, prompt)
        parts = scored[1:] if isinstance(scored[0][0], CombinedReward) else scored
        return torch.stack([scores.mean() for _, scores in parts])

    def text(self) -> Texts:
        """What the model is told with each prompt, as networks read it."""
        texts = [text_of_conditioning(self.encode(prompt)) for prompt in self.prompts]
        return Texts(
            [half(text.tokens[0].cpu()) for text in texts], torch.cat([text.pooled[:1].cpu() for text in texts])
        )


def denoise_once(sampling: Sampling, latent: dict, x: Tensor, sigma: Tensor) -> Tensor:
    """D of states of one's own choosing: a sampler that asks once and leaves."""
    answers = []

    def function(model, start: Tensor, sigmas: Tensor, extra_args=None, callback=None, disable=None) -> Tensor:
        answers.append(model(x.to(start.device), sigma.to(start.device), **(extra_args or {})))
        return start

    sampling.run(comfy.samplers.KSAMPLER(function), latent, [0] * len(x), lambda *_: None)
    return answers[0]


def stackable(conditionings: Sequence[list], most: int) -> Iterator[list[int]]:
    """Groups of at most so many conditionings that can be shown to a model as one."""
    groups: dict[Any, list[int]] = {}
    for i, conditioning in enumerate(conditionings):
        groups.setdefault(stacking_key(conditioning) or i, []).append(i)
    for group in groups.values():
        yield from (group[start : start + most] for start in range(0, len(group), most))


def stacking_key(conditioning: list) -> tuple | None:
    """None where there is more than tensors of one row, which cannot be stacked."""
    parts = {"": conditioning[0][0], **conditioning[0][1]}
    if len(conditioning) > 1 or not all(
        isinstance(part, Tensor) and part.ndim and len(part) == 1 for part in parts.values()
    ):
        return None
    return tuple(sorted((name, part.shape) for name, part in parts.items()))


def stacked(conditionings: Sequence[list]) -> list:
    """Conditionings of the same shapes as one, of a row for each."""
    if len(conditionings) == 1:
        return conditionings[0]
    tokens, options = zip(*(conditioning[0] for conditioning in conditionings), strict=True)
    return [[torch.cat(tokens), {name: torch.cat([each[name] for each in options]) for name in options[0]}]]


def picture(frame: Tensor) -> Image.Image:
    """Of pixels (H,W,C) in [0,1]."""
    return Image.fromarray((frame[..., :3].cpu() * 255).round().clamp(0, 255).byte().numpy())


@dataclass(frozen=True)
class GuidanceData:
    """What travels along a GUIDANCE_DATA link: labelled samples, and what made them, if it is at hand."""

    collection: Collection
    maker: SampleMaker | None = None

    def ask(self, what: str) -> SampleMaker:
        if self.maker is None:
            raise GuidanceError(
                f"{what} needs the model that made the samples: connect Collect Guidance Data in place of Load Guidance Data."
            )
        return self.maker


REMEMBERED = 256
"""Prompts whose encodings are kept."""


def encoder(clip) -> Callable[[str], list]:
    if clip is None:
        raise GuidanceError(
            "There is no text encoder: the checkpoint holds none. Load one with a CLIP loader and connect it."
        )
    return lru_cache(REMEMBERED)(lambda prompt: clip.encode_from_tokens_scheduled(clip.tokenize(prompt)))
