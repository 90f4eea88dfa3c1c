"""What a reward is: pictures and prompts in, one number per picture out."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import GuidanceError


class RewardError(GuidanceError):
    """A reward, or what it was given, cannot be used. The message says what to do."""


class Reward(nn.Module):
    """Scores pictures. Subclasses implement `forward` and state the class attributes.

    forward(pixels, prompts): pixels (B,3,H,W) in [0,1] of any size, one prompt per picture -> raw scores (B,), float32.
    A differentiable reward has a useful gradient with respect to pixels (resize on tensors, never round).
    """

    name = "reward"
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

    def standardize(self, scores: Tensor) -> Tensor:
        """Raw scores -> scores in units of the reference spread."""
        return (scores - self.reference_mean) / self.reference_std


def evaluate(reward: Reward, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
    """Raw scores (B,) of pixels (B,3,H,W), with everything that can go wrong said in a sentence.

    One prompt serves a whole batch. Raises RewardError on bad pixels, a missing prompt, or scores that are not (B,) finite numbers.
    """
    if pixels.ndim != 4 or pixels.shape[1] != 3 or 0 in pixels.shape:
        raise RewardError(f"{reward.name} scores pictures of shape (batch, 3, height, width), not {tuple(pixels.shape)}.")
    if len(prompts) == 1:
        prompts = list(prompts) * len(pixels)
    if reward.needs_prompt and not all(prompt.strip() for prompt in prompts):
        raise RewardError(f"{reward.name} compares pictures with a prompt, but the prompt is empty. Write the prompt into the node's prompt field.")
    if len(prompts) != len(pixels):
        raise RewardError(f"{reward.name} got {len(prompts)} prompts for {len(pixels)} pictures; give one prompt, or one for each picture.")
    scores = reward(pixels, prompts)
    if scores.shape != (len(pixels),):
        raise RewardError(f"{reward.name} returned scores of shape {tuple(scores.shape)} for {len(pixels)} pictures; it must return one number for each.")
    if not torch.isfinite(scores).all():
        raise RewardError(f"{reward.name} returned a score that is not a finite number; the pictures or the reward's weights are damaged.")
    return scores.float()
