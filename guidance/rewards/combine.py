"""Weighted sums of rewards on one scale."""

import math
from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from .base import Reward, RewardError, evaluate


class CombinedReward(Reward):
    """sum_i w_i z_i / sqrt(sum_i w_i^2), with z_i the standardised score of part i.

    The norm of the weights divides out, so that the result has spread 1 when the parts are uncorrelated: weights say how the parts
    share, the temperature says how strong the whole is.
    """

    def __init__(self, rewards: Sequence[Reward], weights: Sequence[float]):
        super().__init__()
        norm = math.hypot(*weights)
        if not rewards or len(rewards) != len(weights) or not 0 < norm < math.inf:
            raise RewardError(f"A combination of {len(rewards)} rewards needs as many finite weights, not all 0; it got {list(weights)}.")
        self.rewards = nn.ModuleList(rewards)
        self.weights = [weight / norm for weight in weights]
        self.name = " + ".join(reward.name for reward in rewards)
        self.differentiable = all(reward.differentiable for reward in rewards)
        self.needs_prompt = any(reward.needs_prompt for reward in rewards)

    def parts(self, pixels: Tensor, prompts: Sequence[str]) -> list[tuple[Reward, Tensor]]:
        """Each reward with its raw scores (B,)."""
        return [(reward, evaluate(reward, pixels, prompts)) for reward in cast(Iterable[Reward], self.rewards)]

    def forward(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        parts = zip(self.weights, self.parts(pixels, prompts), strict=True)
        return torch.stack([weight * reward.standardize(scores) for weight, (reward, scores) in parts]).sum(0)
