"""Choosing among samples: the best of many, and a population that follows q(x0) ∝ p(x0)·exp(r(x0)/β). No reward gradient is taken."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .errors import GuidanceError

_ROUNDING = 1e-9
"""Of an effective size: equal weights never count as unequal."""


def best(scores: Tensor, keep: int) -> list[int]:
    """Indices of the `keep` highest of the scores (N,), best first; of equal ones the earlier."""
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
            f"No score reaches the threshold of {threshold:g}; the best is {highest:g}. Lower the threshold to {reached:.2f}."
        )
    return chosen


def _ranked(scores: Tensor) -> list[int]:
    if len(scores) == 0:
        raise GuidanceError("There is nothing to choose from: the batch is empty.")
    if scores.isnan().any():
        raise GuidanceError(f"Score {int(scores.isnan().nonzero()[0])} is not a number; without it there is no best.")
    return scores.argsort(descending=True, stable=True).tolist()


def normalized(log_weights: Tensor) -> Tensor:
    """Weights (..., n) that sum to 1. Where every weight is 0 there is nothing to go by, and all count alike."""
    weights = log_weights.softmax(-1)
    return torch.where(weights.isnan(), 1 / weights.shape[-1], weights)


def effective_size(weights: Tensor) -> Tensor:
    """ESS = 1/Σw² of normalized weights (..., n): n if all are alike, 1 if one has everything."""
    return 1 / weights.square().sum(-1)


def systematic(weights: Tensor, offsets: Tensor) -> Tensor:
    """Systematic resampling (Kitagawa 1996): n ancestors for each row of normalized weights (G, n), in rising order.

    The points (i + u)/n of one uniform offset u (G, 1) pick from the cumulated weights, so that particle i has n·w_i offspring on average,
    and always one of the two integers around that.
    """
    n = weights.shape[-1]
    cumulated = weights.double().cumsum(-1)
    points = (torch.arange(n, dtype=torch.float64) + offsets) / n
    below_one = 1 - torch.finfo(torch.float64).eps
    return torch.searchsorted(cumulated / cumulated[:, -1:], points.clamp_max(below_one), right=True)


def settled(ancestors: Tensor) -> Tensor:
    """Ancestors (G, n) as rows of the whole population, in which survivors keep their places and copies take those of the dead."""
    places = torch.arange(ancestors.numel()).view_as(ancestors)
    offspring = torch.bincount((ancestors + places[:, :1]).flatten(), minlength=ancestors.numel())
    rows = places.flatten().clone()
    rows[offspring == 0] = places.flatten().repeat_interleave((offspring - 1).clamp_min(0))
    return rows.view_as(ancestors)


def ranked(rows: Tensor, scores: Sequence[float]) -> list[int]:
    """The order of one resampled population, rows (n,) with scores (n,): best first, and copies after all survivors."""
    copies = (rows != torch.arange(len(rows))).tolist()
    return sorted(range(len(rows)), key=lambda i: (copies[i], -scores[i]))


@dataclass(frozen=True)
class Resampled:
    """One look at a population of G groups: rows (G·n,) that live on, and the effective number of particles before (G,)."""

    rows: Tensor
    effective: Tensor


@dataclass
class Population:
    """G groups of n particles, each resampled by itself (FK steering, arXiv 2501.06848). Holds the state of one sampling run.

    Particle i is weighted by exp((r_i - r'_i)/β), with r_i the reward of its estimate now and r'_i the one it was last resampled by. Along a
    path these difference potentials multiply to exp(r(x0)/β), whatever the estimates in between were worth, so the population tends to q as
    it grows. The maximum or the sum over a path, the paper's other potentials, tend to other distributions.
    """

    size: int
    """n"""
    temperature: float
    """β, in the rewards' units."""
    generator: torch.Generator
    """Private; on the CPU."""
    threshold: float = 0.8
    """Resample where the effective share of the particles falls below this: only at the end if 0, at every look if 1."""
    paid: Tensor = field(default_factory=lambda: torch.zeros(()), init=False)
    """r' (G, n)"""

    def __post_init__(self):
        if self.size < 1:
            raise GuidanceError(f"A population needs at least 1 particle, not {self.size}.")
        if not self.temperature > 0:
            raise GuidanceError(
                f"The temperature must be above 0, not {self.temperature}; smaller values follow the reward more closely."
            )

    def resample(self, rewards: Tensor, final: bool = False) -> Resampled:
        """Look at rewards (G·n,), of which -inf forbids a particle. After the final look all particles count alike."""
        rewards = rewards.cpu().double().view(-1, self.size)
        if not (rewards < math.inf).all():
            raise GuidanceError(
                "The reward of a particle is not a finite number; the estimates or the reward's weights are damaged."
            )
        weights = normalized((rewards - self.paid) / self.temperature)
        effective = effective_size(weights)
        due = (effective < (1 if final else self.threshold) * self.size - _ROUNDING)[:, None]
        rows = torch.arange(rewards.numel()).view_as(rewards)
        if due.any():
            offsets = torch.rand((len(weights), 1), generator=self.generator, dtype=torch.float64)
            rows = torch.where(due, settled(systematic(weights, offsets)), rows)
            self.paid = torch.where(due, rewards.flatten()[rows], self.paid)
        return Resampled(rows.flatten(), effective)
