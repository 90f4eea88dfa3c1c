"""Rewards -> weights exp(r/β), and how many samples count at that temperature."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import GuidanceError

LOW_SHARE = 0.1
"""Effective share of the samples below which most of what they cost is wasted."""
FEW = 100
"""Effective samples whose averages are uncertain by a tenth: fewer teach a network their accidents."""


@dataclass(frozen=True)
class Health:
    """What can be said of labels before anything is learned from them."""

    count: int
    prompts: int
    mean: float
    std: float
    """Of the reward within a prompt: the unit of the temperature."""
    effective: float
    """Effective sample size (Σw)²/Σw² over the number of samples."""

    @property
    def worth(self) -> float:
        """Effective sample size as a number: so many samples of equal weight say as much. It grows with the count; the share does not."""
        return self.effective * self.count

    def warnings(self) -> list[str]:
        found = []
        if self.effective < LOW_SHARE:
            found.append(
                f"Only {self.effective:.1%} of {self.count} samples count at this temperature: raise it to use more of them."
            )
        if self.worth < FEW:
            found.append(
                f"Together the samples count as {self.worth:.0f}, which is little to learn from: collect more, or raise the temperature."
            )
        return found


def label(rewards: Tensor, prompts: Tensor, temperature: float) -> tuple[Tensor, Health]:
    """Rewards (N,) and the prompt (N,) each belongs to -> weights (N,) of mean 1, w ∝ exp(r/(β·std)) / E[exp(r/(β·std)) | prompt].

    Dividing by a prompt's mean weight changes no minimiser and lets every prompt count alike; of prompts of which little is known it is
    shrunk towards that of all (empirical Bayes). std is the spread within a prompt. Raises GuidanceError where there is nothing to learn.
    """
    if not temperature > 0:
        raise GuidanceError(
            f"The temperature must be above 0, not {temperature}; smaller values follow the reward more closely."
        )
    if bad := int((~torch.isfinite(rewards)).sum()):
        raise GuidanceError(f"{bad} of {len(rewards)} rewards are not finite numbers: leave those samples out.")
    rewards = rewards.double()
    _, group, count = torch.unique(prompts, return_inverse=True, return_counts=True)
    std = spread(rewards, group, count)
    if not std > 1e-6 * rewards.abs().max():
        raise GuidanceError(
            f"All {len(rewards)} samples have the same reward for their prompt: there is nothing to learn from them."
        )
    logits = rewards / (std * temperature)
    weights = (logits - log_mean_weight(logits, group, count)[group]).softmax(0) * len(rewards)
    effective = float(len(rewards) / weights.square().sum())
    return weights.float(), Health(len(rewards), len(count), float(rewards.mean()), float(std), effective)


def spread(rewards: Tensor, group: Tensor, count: Tensor) -> Tensor:
    """Standard deviation within prompts; of one sample per prompt, that of all."""
    if len(rewards) == len(count):
        return rewards.std(correction=min(1, len(rewards) - 1))
    mean = torch.zeros_like(count, dtype=rewards.dtype).index_add(0, group, rewards) / count
    return ((rewards - mean[group]).square().sum() / (len(rewards) - len(count))).sqrt()


def log_mean_weight(logits: Tensor, group: Tensor, count: Tensor) -> Tensor:
    """log E[exp(logit)] of each prompt (P,), shrunk to their mean by the share of its variance that is sampling error."""
    highest = torch.full((len(count),), -torch.inf, dtype=logits.dtype).scatter_reduce(0, group, logits, "amax")
    total = torch.zeros_like(highest).index_add(0, group, (logits - highest[group]).exp())
    found = highest + (total / count).log()
    if len(logits) == len(count):
        return found.mean().expand_as(found)
    relative = (logits - found[group]).exp()  # of mean 1 in each prompt
    error = (relative - 1).square().sum() / (len(logits) - len(count)) / count
    between = ((found - found.mean()).square().mean() - error.mean()).clamp_min(0)
    return torch.lerp(found.mean().expand_as(found), found, between / (between + error))
