"""What a reward is: pictures and prompts in, one number per picture out."""

import logging
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from ..errors import GuidanceError

log = logging.getLogger(__name__)


class RewardError(GuidanceError):
    """A reward, or what it was given, cannot be used. The message says what to do."""


class Reward(nn.Module):
    """Scores pictures. Subclasses implement `forward` and state the class attributes; nodes/web/docs/your_own_reward.md has one in ten lines.

    forward(pixels, prompts): pixels (B,3,H,W) in [0,1] of any size, one prompt per picture -> raw scores (B,).
    Values a little outside [0,1], as a decoder makes them, are scored too, never clamped: a clamp has no gradient.
    A differentiable reward has a useful gradient with respect to pixels (resize on tensors, never round).
    Whoever loads it freezes it (`requires_grad_(False)`), puts it into evaluation mode and moves it between devices.
    """

    name = "reward"
    compared_with = ""
    """What it compares pictures with, in a few letters: tells two rewards of one name apart."""
    description = ""
    """Of one from a file: what the file was taken for."""
    files: tuple[Path, ...] = ()
    """Of one from files: all that it was read from."""
    differentiable = True
    needs_prompt = False
    reference_mean = 0.0
    """Typical raw score, subtracted before rewards are compared or combined."""
    reference_std = 1.0
    """Typical spread of raw scores, so that a temperature means the same for every reward."""
    activation_bytes = 64 * 2**20
    """Rough memory of scoring one picture with a graph, weights not counted."""

    def forward(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        raise NotImplementedError

    def at_fault(self, pixels: Tensor, prompts: Sequence[str]) -> str:
        """The name of what returned a score that is not finite."""
        return self.name

    def truncated_text(self, prompt: str) -> str:
        """The end of a prompt that is too long to be read; empty for most."""
        return ""

    def standardize(self, scores: Tensor) -> Tensor:
        """Raw scores -> scores in units of the reference spread."""
        return (scores - self.reference_mean) / self.reference_std


K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class PromptMemory(Generic[K, V]):
    """What was made of each prompt, for a bounded number of them."""

    size = 256

    def __init__(self) -> None:
        self.known: dict[K, V] = {}

    def __call__(self, keys: Sequence[K], make: Callable[[list[K]], Iterable[V]]) -> list[V]:
        """One value for each key, of which the new ones are made together."""
        if len(self.known) > self.size:
            self.known.clear()
        if new := [key for key in dict.fromkeys(keys) if key not in self.known]:
            self.known |= zip(new, make(new), strict=True)
        return [self.known[key] for key in keys]


def warn_of_truncated_text(reward: Reward, prompts: Iterable[str]) -> None:
    for prompt in prompts:
        if truncated_text := reward.truncated_text(prompt):
            log.warning(
                "%s reads only the beginning of a prompt; it does not see: %s",
                reward.name,
                shorten(truncated_text, 100, placeholder=" ..."),
            )


def at_least_float32(pixels: Tensor) -> Tensor:
    return pixels.to(torch.promote_types(pixels.dtype, torch.float32))


def require_prompt(reward: Reward, prompts: Sequence[str]) -> None:
    if reward.needs_prompt and not all(prompt.strip() for prompt in prompts):
        raise RewardError(
            f"{reward.name} compares pictures with a prompt, but the prompt is empty; write one into the prompt field."
        )


def evaluate(reward: Reward, pixels: Tensor, prompts: str | Sequence[str]) -> Tensor:
    """Raw scores (B,), float32, of pixels (B,3,H,W), with everything that can go wrong said in a sentence.

    One prompt serves a whole batch. Raises RewardError on bad pixels, a missing prompt, or scores that are not (B,) finite numbers.
    """
    scores = judge(reward, pixels, prompts)
    if not torch.isfinite(scores).all():
        if not torch.isfinite(pixels).all():
            raise RewardError(
                f"{reward.name} was given pictures with values that are not finite numbers; the VAE or the node that made them is at fault."
            )
        name = reward.at_fault(pixels, [prompts] if isinstance(prompts, str) else prompts)
        raise RewardError(f"{name} returned a score that is not a finite number; the reward's weights are damaged.")
    return scores


def judge(reward: Reward, pixels: Tensor, prompts: str | Sequence[str]) -> Tensor:
    """The same without waiting for a GPU to know the scores: to refuse those that are not finite is left to the caller."""
    if pixels.ndim != 4 or pixels.shape[1] != 3 or 0 in pixels.shape:
        raise RewardError(
            f"{reward.name} scores pictures of shape (batch, 3, height, width), not {tuple(pixels.shape)}."
        )
    if not pixels.is_floating_point():
        raise RewardError(
            f"{reward.name} scores pictures with values from 0 to 1, not {pixels.dtype}; divide by 255 first."
        )
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if len(prompts) == 1:
        prompts = prompts * len(pixels)
    require_prompt(reward, prompts)
    if len(prompts) != len(pixels):
        raise RewardError(
            f"{reward.name} got {len(prompts)} prompts for {len(pixels)} pictures; give one prompt, or one for each picture."
        )
    scores = reward(pixels, prompts)
    if not isinstance(scores, Tensor):
        raise RewardError(
            f"{reward.name} returned a {type(scores).__name__}; it must return a tensor of one number for each picture."
        )
    if scores.shape != (len(pixels),):
        raise RewardError(
            f"{reward.name} returned scores of shape {tuple(scores.shape)}; it must return one number for each of {len(pixels)} pictures."
        )
    return scores.float()
