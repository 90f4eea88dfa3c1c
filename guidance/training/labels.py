"""Labels of samples: rewards -> weights exp(r/β), and the effective sample size at that temperature."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import GuidanceError

LOW_SHARE = 0.1
"""Warn if the effective share of the samples is smaller: most of the cost of collecting them is then wasted."""
FEW = 100
"""Warn if the effective sample size is smaller: averages then have a relative error above a tenth."""


@dataclass(frozen=True)
class Health:
    """Statistics of labels, known before training."""

    count: int
    prompts: int
    mean: float
    std: float
    """Standard deviation of the reward within a prompt, the unit of the temperature."""
    effective: float
    """Effective share of the samples: (Σw)²/Σw² divided by their number."""

    @property
    def effective_size(self) -> float:
        """Effective sample size (Σw)²/Σw²: as many samples of equal weight have the same information."""
        return self.effective * self.count

    def warnings(self) -> list[str]:
        """Sentences for people about labels that are little to learn from."""
        found = []
        if self.effective < LOW_SHARE:
            found.append(
                f"Only {self.effective:.1%} of {self.count} samples count at this temperature: "
                "raise it to use more of them."
            )
        if self.effective_size < FEW:
            found.append(
                f"Together the samples count as {self.effective_size:.0f}, which is little to learn from: "
                "collect more, or raise the temperature."
            )
        return found


def label(rewards: Tensor, prompts: Tensor, temperature: float) -> tuple[Tensor, Health]:
    """Rewards (N,) and prompt indices (N,) -> weights (N,) of mean 1, w ∝ exp(r/(β·std)) / E[exp(r/(β·std)) | prompt].

    std is the standard deviation within a prompt. Dividing by a prompt's mean weight changes no minimiser, and gives
    all prompts the same total weight. The mean weights of prompts with few samples are shrunk towards the mean of all
    prompts (empirical Bayes). Raises GuidanceError if the rewards are not finite or all equal.
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
    """Standard deviation within prompts (). With one sample per prompt, that of all samples."""
    if len(rewards) == len(count):
        return rewards.std(correction=min(1, len(rewards) - 1))
    mean = torch.zeros_like(count, dtype=rewards.dtype).index_add(0, group, rewards) / count
    return ((rewards - mean[group]).square().sum() / (len(rewards) - len(count))).sqrt()


def log_mean_weight(logits: Tensor, group: Tensor, count: Tensor) -> Tensor:
    """log E[exp(logit)] of each prompt (P,), shrunk to their mean by the share of sampling error in its variance."""
    highest = torch.full((len(count),), -torch.inf, dtype=logits.dtype).scatter_reduce(0, group, logits, "amax")
    total = torch.zeros_like(highest).index_add(0, group, (logits - highest[group]).exp())
    found = highest + (total / count).log()
    if len(logits) == len(count):
        return found.mean().expand_as(found)
    relative = (logits - found[group]).exp()  # mean 1 within each prompt
    error = (relative - 1).square().sum() / (len(logits) - len(count)) / count
    between = ((found - found.mean()).square().mean() - error.mean()).clamp_min(0)
    return torch.lerp(found.mean().expand_as(found), found, between / (between + error))
