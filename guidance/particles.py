"""Guidance without gradients: selection of the best samples, and resampling of particles.

The distribution of resampled particles tends to q(x0) ∝ p(x0)·exp(r(x0)/β).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .errors import GuidanceError

_ROUNDING = 1e-9
"""Tolerance of an effective size, so that equal weights are never resampled."""


def best(scores: Tensor, keep: int) -> list[int]:
    """Indices of the `keep` highest scores (N,), best first; equal scores keep their order.

    Raises GuidanceError if there are no scores, or one is not a number.
    """
    if keep < 1:
        raise GuidanceError(f"At least 1 must be kept, not {keep}.")
    return _ranked(scores)[:keep]


def at_least(scores: Tensor, threshold: float) -> list[int]:
    """Indices of the scores (N,) that reach the threshold, best first. Raises GuidanceError if none does."""
    chosen = [i for i in _ranked(scores) if scores[i] >= threshold]
    if not chosen:
        highest = scores.max().double()
        reached = (highest * 100).floor() / 100
        raise GuidanceError(
            f"No score reaches the threshold of {threshold:g}; the best is {highest:g}. "
            f"Lower the threshold to {reached:.2f}."
        )
    return chosen


def _ranked(scores: Tensor) -> list[int]:
    if len(scores) == 0:
        raise GuidanceError("There is nothing to choose from: the batch is empty.")
    if scores.isnan().any():
        raise GuidanceError(f"Score {int(scores.isnan().nonzero()[0])} is not a number, so scores cannot be compared.")
    return scores.argsort(descending=True, stable=True).tolist()


def normalized(log_weights: Tensor) -> Tensor:
    """Log weights (..., n) -> weights that sum to 1. If all weights are 0, the result is uniform."""
    weights = log_weights.softmax(-1)
    return torch.where(weights.isnan(), 1 / weights.shape[-1], weights)


def effective_size(weights: Tensor) -> Tensor:
    """Effective sample size 1/Σw² (...) of normalized weights (..., n): n if they are equal, 1 if one weight is 1."""
    return 1 / weights.square().sum(-1)


def systematic(weights: Tensor, offsets: Tensor) -> Tensor:
    """Systematic resampling (Kitagawa 1996): ancestors (G, n) in rising order, for normalized weights (G, n).

    The points (i + u)/n, with one uniform offset u (G, 1) per row, select from the cumulative weights. Particle i has
    n·w_i copies on average, and always one of the two nearest integers.
    """
    n = weights.shape[-1]
    cumulative = weights.double().cumsum(-1)
    points = (torch.arange(n, dtype=torch.float64) + offsets) / n
    below_one = 1 - torch.finfo(torch.float64).eps
    return torch.searchsorted(cumulative / cumulative[:, -1:], points.clamp_max(below_one), right=True)


def settled(ancestors: Tensor) -> Tensor:
    """Ancestors (G, n) -> rows (G, n) of the whole population, in which survivors keep their positions.

    Copies take the positions of particles without offspring.
    """
    places = torch.arange(ancestors.numel()).view_as(ancestors)
    offspring = torch.bincount((ancestors + places[:, :1]).flatten(), minlength=ancestors.numel())
    rows = places.flatten().clone()
    rows[offspring == 0] = places.flatten().repeat_interleave((offspring - 1).clamp_min(0))
    return rows.view_as(ancestors)


def ranked(rows: Tensor, scores: Sequence[float]) -> list[int]:
    """Indices that sort a resampled population, rows (n,) with scores (n,): best first, copies after survivors."""
    copies = (rows != torch.arange(len(rows))).tolist()
    return sorted(range(len(rows)), key=lambda i: (copies[i], -scores[i]))


@dataclass(frozen=True)
class Resampled:
    """The result of one resampling of G groups."""

    rows: Tensor
    """The rows (G·n,) of the population that continue."""
    effective: Tensor
    """Effective number of particles (G,) before resampling."""


@dataclass
class Population:
    """G groups of n particles, resampled separately (FK steering, arXiv 2501.06848).

    It holds the state of one sampling run. Particle i has the weight exp((r_i - r'_i)/β): r_i is its current reward,
    r'_i its reward at the last resampling. Along a path, the product of these difference potentials is exp(r(x0)/β),
    whatever the rewards in between. The population therefore converges to q as it grows. The paper's other potentials,
    the maximum and the sum, have other limits.
    """

    size: int
    """Particles per group, n."""
    temperature: float
    """β, in units of the rewards."""
    generator: torch.Generator
    """A private generator on the CPU."""
    threshold: float = 0.8
    """Resample a group if its effective share of particles is below this: 0 resamples at the end only, 1 always."""
    last_rewards: Tensor = field(default_factory=lambda: torch.zeros(()), init=False)
    """The rewards (G, n) at the last resampling, r'."""

    def __post_init__(self):
        if self.size < 1:
            raise GuidanceError(f"A population needs at least 1 particle, not {self.size}.")
        if not self.temperature > 0:
            raise GuidanceError(
                f"The temperature must be above 0, not {self.temperature}; "
                "smaller values follow the reward more closely."
            )

    def resample(self, rewards: Tensor, final: bool = False) -> Resampled:
        """Resample by the rewards (G·n,); -inf removes a particle. After the final resampling all weights are equal.

        Raises GuidanceError if a reward is not a number, or infinite.
        """
        rewards = rewards.cpu().double().view(-1, self.size)
        if not (rewards < math.inf).all():
            raise GuidanceError(
                "The reward of a particle is not a finite number; the estimates or the reward's weights are damaged."
            )
        weights = normalized((rewards - self.last_rewards) / self.temperature)
        effective = effective_size(weights)
        due = (effective < (1 if final else self.threshold) * self.size - _ROUNDING)[:, None]
        rows = torch.arange(rewards.numel()).view_as(rewards)
        if due.any():
            offsets = torch.rand((len(weights), 1), generator=self.generator, dtype=torch.float64)
            rows = torch.where(due, settled(systematic(weights, offsets)), rows)
            self.last_rewards = torch.where(due, rewards.flatten()[rows], self.last_rewards)
        return Resampled(rows.flatten(), effective)
