"""Weighted sums of rewards on one scale."""

import math
from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ..errors import quoted
from .base import Reward, RewardError, evaluate, evaluate_unchecked


class CombinedReward(Reward):
    """sum_i w_i z_i / sqrt(sum_i w_i^2), with z_i the standardized score of part i.

    The division by the norm gives a standard deviation of 1 if the parts are uncorrelated. Weights therefore set the
    shares of the parts, and the temperature the strength of the whole. A nested combination is replaced by its parts.
    This changes no score, because the norm of its weights is 1.
    """

    def __init__(self, rewards: Sequence[Reward], weights: Sequence[float]):
        super().__init__()
        norm = math.hypot(*weights)
        if not rewards or len(rewards) != len(weights) or not 0 < norm < math.inf:
            raise RewardError(
                f"A combination of {len(rewards)} rewards needs as many finite weights, not all 0; "
                f"it got {quoted(list(weights))}."
            )
        rewards, weights = zip(
            *(part for pair in zip(rewards, weights, strict=True) for part in _parts(*pair)), strict=True
        )
        self.rewards = nn.ModuleList(rewards)
        self.weights = [weight / norm for weight in weights]
        self.name = " + ".join(
            reward.name if weight >= 0 else f"less {reward.name}"
            for reward, weight in zip(rewards, weights, strict=True)
        )
        self.differentiable = all(reward.differentiable for reward in rewards)
        self.needs_prompt = any(reward.needs_prompt for reward in rewards)

    def parts(self, pixels: Tensor, prompts: Sequence[str]) -> list[tuple[Reward, Tensor]]:
        """Each part with its raw scores (B,)."""
        return [(reward, evaluate(reward, pixels, prompts)) for reward in cast(Iterable[Reward], self.rewards)]

    def forward(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.combine(
            [(reward, evaluate_unchecked(reward, pixels, prompts)) for reward in cast(Iterable[Reward], self.rewards)]
        )

    def at_fault(self, pixels: Tensor, prompts: Sequence[str]) -> str:
        broken = (
            reward
            for reward in cast(Iterable[Reward], self.rewards)
            if not evaluate_unchecked(reward, pixels, prompts).isfinite().all()
        )
        return next((reward.at_fault(pixels, prompts) for reward in broken), self.name)

    def combine(self, parts: Sequence[tuple[Reward, Tensor]]) -> Tensor:
        """Raw scores (B,) of the parts -> the combined score (B,)."""
        weighted = zip(self.weights, parts, strict=True)
        return torch.stack([weight * reward.standardize(scores) for weight, (reward, scores) in weighted]).sum(0)

    def truncated_text(self, prompt: str) -> str:
        """The longest text that one of the parts does not read."""
        return max((reward.truncated_text(prompt) for reward in cast(Iterable[Reward], self.rewards)), key=len)


def parts_of(reward: Reward) -> list[Reward]:
    """The parts of a combination, or the reward itself if it is not one."""
    return [part for part, _ in _parts(reward, 1.0)]


def _parts(reward: Reward, weight: float) -> list[tuple[Reward, float]]:
    if not isinstance(reward, CombinedReward):
        return [(reward, weight)]
    return [
        (part, weight * share)
        for part, share in zip(cast(Iterable[Reward], reward.rewards), reward.weights, strict=True)
    ]


def breakdown(reward: Reward, pixels: Tensor, prompts: Sequence[str]) -> list[tuple[Reward, Tensor]]:
    """The reward with its raw scores (B,), followed by the parts of a combination with theirs."""
    if not isinstance(reward, CombinedReward):
        return [(reward, evaluate(reward, pixels, prompts))]
    parts = reward.parts(pixels, prompts)
    return [(reward, reward.combine(parts)), *parts]
