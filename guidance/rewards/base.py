"""The interface of rewards: pictures and prompts -> one score per picture."""

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
    """A reward, or its input, cannot be used. The message says what to do."""


class Reward(nn.Module):
    """Scores pictures. Subclasses implement `forward` and set the class attributes.

    nodes/web/docs/your_own_reward.md shows one in ten lines.

    forward(pixels, prompts): pixels (B,3,H,W) in [0,1] of any size, one prompt per picture -> raw scores (B,).
    Decoders return values slightly outside [0,1]. Do not clamp them: a clamp has no gradient.
    A differentiable reward has a useful gradient with respect to the pixels (resize tensors, never round).
    The caller freezes the reward (`requires_grad_(False)`), sets evaluation mode, and moves it between devices.
    """

    name = "reward"
    compared_with = ""
    """A short id of what pictures are compared with. It distinguishes rewards of the same name."""
    description = ""
    """What kind of reward a file was recognised as."""
    files: tuple[Path, ...] = ()
    """All files that it was read from."""
    differentiable = True
    needs_prompt = False
    reference_mean = 0.0
    """Typical raw score, subtracted before rewards are compared or combined."""
    reference_std = 1.0
    """Typical standard deviation of raw scores, so that a temperature means the same for every reward."""
    activation_bytes = 64 * 2**20
    """Approximate memory for scoring one picture with a graph, without the weights."""

    def forward(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Raw scores (B,) of pixels (B,3,H,W) with one prompt each."""
        raise NotImplementedError

    def at_fault(self, pixels: Tensor, prompts: Sequence[str]) -> str:
        """The name of the reward, or the part of it, that returned a score which is not finite."""
        return self.name

    def truncated_text(self, prompt: str) -> str:
        """The end of a prompt that the reward does not read, because the prompt is too long. Empty for most prompts."""
        return ""

    def standardize(self, scores: Tensor) -> Tensor:
        """Raw scores -> (score - reference_mean) / reference_std."""
        return (scores - self.reference_mean) / self.reference_std


K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class PromptMemory(Generic[K, V]):
    """A cache of values computed from prompts, of bounded size."""

    size = 256

    def __init__(self) -> None:
        self.known: dict[K, V] = {}

    def __call__(self, keys: Sequence[K], make: Callable[[list[K]], Iterable[V]]) -> list[V]:
        """One value for each key. `make` computes the values of all new keys together."""
        if len(self.known) > self.size:
            self.known.clear()
        if new := [key for key in dict.fromkeys(keys) if key not in self.known]:
            self.known |= zip(new, make(new), strict=True)
        return [self.known[key] for key in keys]


def warn_of_truncated_text(reward: Reward, prompts: Iterable[str]) -> None:
    """Log which ends of prompts the reward does not read."""
    for prompt in prompts:
        if truncated_text := reward.truncated_text(prompt):
            log.warning(
                "%s reads only the beginning of a prompt. It does not read: %s",
                reward.name,
                shorten(truncated_text, 100, placeholder=" ..."),
            )


def at_least_float32(pixels: Tensor) -> Tensor:
    """A tensor of half precision in single precision; others unchanged."""
    return pixels.to(torch.promote_types(pixels.dtype, torch.float32))


def require_prompt(reward: Reward, prompts: Sequence[str]) -> None:
    """Raise RewardError if the reward needs prompts and one is empty."""
    if reward.needs_prompt and not all(prompt.strip() for prompt in prompts):
        raise RewardError(
            f"{reward.name} compares pictures with a prompt, but the prompt is empty; write one into the prompt field."
        )


def evaluate(reward: Reward, pixels: Tensor, prompts: str | Sequence[str]) -> Tensor:
    """Raw scores (B,) in float32 of pixels (B,3,H,W), with one prompt for each picture or one for all.

    Raises RewardError for bad pixels, a missing prompt, or scores that are not (B,) finite numbers.
    """
    scores = evaluate_unchecked(reward, pixels, prompts)
    if not torch.isfinite(scores).all():
        if not torch.isfinite(pixels).all():
            raise RewardError(
                f"{reward.name} was given pictures with values that are not finite numbers; "
                "the VAE or the node that made them is at fault."
            )
        name = reward.at_fault(pixels, [prompts] if isinstance(prompts, str) else prompts)
        raise RewardError(f"{name} returned a score that is not a finite number; the reward's weights are damaged.")
    return scores


def evaluate_unchecked(reward: Reward, pixels: Tensor, prompts: str | Sequence[str]) -> Tensor:
    """`evaluate` without the check for finite scores, so that it does not wait for a GPU. The caller must check."""
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
            f"{reward.name} got {len(prompts)} prompts for {len(pixels)} pictures; "
            "give one prompt, or one for each picture."
        )
    scores = reward(pixels, prompts)
    if not isinstance(scores, Tensor):
        raise RewardError(
            f"{reward.name} returned a {type(scores).__name__}; it must return a tensor of one number for each picture."
        )
    if scores.shape != (len(pixels),):
        raise RewardError(
            f"{reward.name} returned scores of shape {tuple(scores.shape)}; "
            f"it must return one number for each of {len(pixels)} pictures."
        )
    return scores.float()
