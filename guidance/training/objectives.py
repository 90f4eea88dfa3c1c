"""Fits a guidance network to labelled samples.

Draw x0 ~ p, label it with a weight w = exp(r(x0)/β), noise it to x. The reward-weighted posterior mean is then the solution of a weighted
least-squares regression, in which no reward and no model is differentiated:

    D_q = D + s·G,    G = argmin E[ w·|y - G(x)|² ],    y = (x0 - D)/s

As E[y|x] = 0 without weights, E[ w·|G|² - 2(w - 1)·y·G ] has the same minimiser, and far less noise where w says little about x.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..data.batches import Batch
from ..errors import GuidanceError
from ..network.forms import FORMS
from ..process import Process, column


@dataclass(frozen=True)
class Plan:
    """How to train. Two runs of the same plan on the same labels give the same network."""

    objective: str = "weighted"
    form: str = "correction"
    steps: int = 4000
    batch: int = 128
    learning_rate: float = 1e-3
    ema: float = 0.998
    check_every: int = 200
    """Steps between two looks at held-out samples; the best network so far is kept."""
    baseline: float = 1.0
    """What is taken off the weights of y; any value has the same minimiser."""
    temperature: float = 1.0
    """β in standard deviations of the reward within a prompt; labels have it in their weights."""
    answers: float = 1.0
    """How much a potential learns to answer as the model does, which needs no labels and teaches it what is in a picture."""
    fresh: bool = False
    """Whether a potential sees fresh noise in every batch, and clean latents in place of the model's D, instead of the collected states."""
    seed: int = 0

    def __post_init__(self):
        if self.objective not in OBJECTIVES or self.form not in FORMS:
            raise GuidanceError(f"Known objectives are {', '.join(OBJECTIVES)}; known forms {', '.join(FORMS)}.")
        if self.objective.startswith("potential") != (self.form == "potential"):
            raise GuidanceError(f"The objective {self.objective} does not train the form {self.form}.")
        if self.fresh and self.objective != "potential":
            raise GuidanceError(
                f"The objective {self.objective} needs the model's answers at the collected states: it cannot have fresh noise."
            )
        if min(self.steps, self.batch, self.check_every) < 1 or not 0 < self.learning_rate < math.inf:
            raise GuidanceError(
                f"A training needs at least 1 step, a batch of at least 1 and a learning rate above 0, not {self.steps}, {self.batch} and "
                f"{self.learning_rate:g}."
            )


@dataclass(frozen=True)
class Task:
    """What an objective needs beside a batch."""

    process: Process
    plan: Plan
    reward: Callable[[Tensor, Batch], Tensor] | None = None
    """Denoised latents (B,...) -> rewards (B,) in the unit of the temperature, differentiable; for `reward_gradient`."""

    def correction(self, network: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """D_q and (D_q - D)/s, (B,...)."""
        form = FORMS[self.plan.form]
        denoise = batch.denoise if form.moves and batch.denoise is not None else lambda _: batch.denoised
        tilted = form(network, self.process, denoise, batch.x, batch.sigma, batch.text)
        return tilted, (tilted - batch.denoised) / self.std(batch)

    def std(self, batch: Batch) -> Tensor:
        return self.process.posterior_variance(column(batch.sigma, batch.x)) ** 0.5


Objective = Callable[[nn.Module, Task, Batch], Tensor]


def weighted(network: nn.Module, task: Task, batch: Batch) -> Tensor:
    """E[ w·|G|² - 2(w - 1)·y·G ] per element."""
    _, correction = task.correction(network, batch)
    target = (batch.clean - batch.denoised) / task.std(batch)
    weights = column(batch.weights, batch.x)
    return (weights * correction.square() - 2 * (weights - task.plan.baseline) * target * correction).mean()


def reward_gradient(network: nn.Module, task: Task, batch: Batch) -> Tensor:
    """E[ |G|²/2 - r(D_q)/β ]: the KL-regularised step, amortised. For rewards with a gradient, where labels are few (arXiv 2508.09968)."""
    if task.reward is None:
        raise GuidanceError(
            "The objective reward_gradient needs the reward itself, with a gradient; labels are not enough."
        )
    tilted, correction = task.correction(network, batch)
    scores = task.reward(tilted, batch)
    if torch.is_grad_enabled() and not scores.requires_grad:
        raise GuidanceError("This reward has no gradient to train by: choose the objective weighted.")
    return (correction.square().flatten(1).sum(1) / 2 - scores / task.plan.temperature).mean()


def in_parts(reward: Callable[[Tensor, slice], Tensor], points: Tensor, size: int) -> Tensor:
    """reward(points[part], part) of each part of points (B,...) -> (B,). The way back is gone at once, `size` points at a time, so that no more
    graphs are held, and can be gone once."""
    parts = [slice(start, start + size) for start in range(0, len(points), size)]
    if not torch.is_grad_enabled():
        return torch.cat([reward(points[part], part) for part in parts])
    found = []
    for part in parts:
        point = points[part].detach().requires_grad_()
        scores = reward(point, part)
        if scores.requires_grad:
            (gradient,) = torch.autograd.grad(scores.sum(), point)
            scores = scores.detach() + (gradient * (points[part] - point.detach())).flatten(1).sum(1)
        found.append(scores)
    return torch.cat(found)


def potential(loss: Callable[[Tensor, Tensor], Tensor]) -> Objective:
    """A scalar network f(x) and the weights -> the loss per sample, to which that of its guess of D is added while it learns."""

    def objective(network: nn.Module, task: Task, batch: Batch) -> Tensor:
        unit = task.process.unit(batch.x, column(batch.sigma, batch.x))
        value, answer = network((unit,), task.process.angle(batch.sigma), batch.text, answers=True)
        lost = loss(value, batch.weights).mean()
        return lost + task.plan.answers * (answer - batch.denoised).square().mean() if torch.is_grad_enabled() else lost

    return objective


OBJECTIVES: dict[str, Objective] = {
    "weighted": weighted,
    "reward_gradient": reward_gradient,
    "potential": potential(lambda f, w: f.exp() - w * f),  # f -> log E[w|x], by the Poisson loss
}
