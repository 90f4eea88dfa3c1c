"""The objectives that fit a guidance network, and the plan of a training.

Draw x0 ~ p, label it with a weight w = exp(r(x0)/β), noise it to x. The reward-weighted posterior mean then solves a
weighted least-squares regression, in which no reward and no model is differentiated:

    D_q = D + s·G,    G = argmin E[ w·|y - G(x)|² ],    y = (x0 - D)/s

As E[y|x] = 0 without weights, E[ w·|G|² - 2(w - 1)·y·G ] has the same minimiser. Its gradient has far less noise where
w depends little on x.
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
    """The settings of a training. Two trainings with the same plan and the same labels give the same network."""

    objective: str = "weighted"
    form: str = "correction"
    steps: int = 4000
    batch: int = 128
    learning_rate: float = 1e-3
    ema: float = 0.998
    """Decay per step of the exponential moving average of the weights."""
    check_every: int = 200
    """Steps between two held-out evaluations. The best network so far is kept."""
    temperature: float = 1.0
    """β in standard deviations of the reward within a prompt. Labels contain it in their weights."""
    denoised_weight: float = 1.0
    """Weight of the auxiliary loss of a potential: its latent head predicts D, which needs no labels."""
    fresh: bool = False
    """Whether a potential trains on fresh noise in every batch, with clean latents as targets of D, instead of the
    collected states."""
    seed: int = 0

    def __post_init__(self):
        if self.objective not in OBJECTIVES or self.form not in FORMS:
            raise GuidanceError(f"Known objectives are {', '.join(OBJECTIVES)}; known forms {', '.join(FORMS)}.")
        if self.objective.startswith("potential") != (self.form == "potential"):
            raise GuidanceError(f"The objective {self.objective} does not train the form {self.form}.")
        if self.fresh and self.objective != "potential":
            raise GuidanceError(
                f"The objective {self.objective} needs the model's predictions at the collected states: "
                "it cannot use fresh noise."
            )
        if min(self.steps, self.batch, self.check_every) < 1 or not 0 < self.learning_rate < math.inf:
            raise GuidanceError(
                "A training needs at least 1 step, a batch of at least 1 and a learning rate above 0, "
                f"not {self.steps}, {self.batch} and {self.learning_rate:g}."
            )


@dataclass(frozen=True)
class Task:
    """What an objective needs in addition to a network and a batch."""

    process: Process
    plan: Plan
    reward: Callable[[Tensor, Batch], Tensor] | None = None
    """Denoised latents (B,...) -> rewards (B,) in units of the temperature, differentiable. For `reward_gradient`."""

    def correction(self, network: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """D_q and (D_q - D)/s, both (B,...)."""
        form = FORMS[self.plan.form]
        denoise = batch.denoise if form.moves and batch.denoise is not None else lambda _: batch.denoised
        tilted = form(network, self.process, denoise, batch.x, batch.sigma, batch.text)
        return tilted, (tilted - batch.denoised) / self.std(batch)

    def std(self, batch: Batch) -> Tensor:
        """The posterior's standard deviation s (B,1,...), for data of unit variance."""
        return self.process.posterior_variance(column(batch.sigma, batch.x)) ** 0.5


Objective = Callable[[nn.Module, Task, Batch], Tensor]
"""Network, task, batch -> loss ()."""


def weighted(network: nn.Module, task: Task, batch: Batch) -> Tensor:
    """E[ w·|G|² - 2(w - 1)·y·G ] per element."""
    _, correction = task.correction(network, batch)
    target = (batch.clean - batch.denoised) / task.std(batch)
    weights = column(batch.weights, batch.x)
    return (weights * correction.square() - 2 * (weights - 1) * target * correction).mean()


def reward_gradient(network: nn.Module, task: Task, batch: Batch) -> Tensor:
    """E[ |G|²/2 - r(D_q)/β ], the amortised KL-regularised step (arXiv 2508.09968).

    For differentiable rewards with few labels. Raises GuidanceError if the task has no reward, or one without a
    gradient.
    """
    if task.reward is None:
        raise GuidanceError(
            "The objective reward_gradient needs the reward itself, with a gradient; labels are not enough."
        )
    tilted, correction = task.correction(network, batch)
    scores = task.reward(tilted, batch)
    if torch.is_grad_enabled() and not scores.requires_grad:
        raise GuidanceError("This reward has no gradient to train by: choose the objective weighted.")
    return (correction.square().flatten(1).sum(1) / 2 - scores / task.plan.temperature).mean()


def potential(network: nn.Module, task: Task, batch: Batch) -> Tensor:
    """E[ exp(f) - w·f ], the Poisson loss of a scalar network, minimal at f = log E[w|x].

    With gradients enabled, the error of the predicted D is added as an auxiliary loss.
    """
    unit = task.process.unit(batch.x, column(batch.sigma, batch.x))
    value, denoised = network((unit,), task.process.angle(batch.sigma), batch.text, with_denoised=True)
    loss = (value.exp() - batch.weights * value).mean()
    if not torch.is_grad_enabled():
        return loss
    return loss + task.plan.denoised_weight * (denoised - batch.denoised).square().mean()


OBJECTIVES: dict[str, Objective] = {
    "weighted": weighted,
    "reward_gradient": reward_gradient,
    "potential": potential,
}


def in_chunks(reward: Callable[[Tensor, slice], Tensor], points: Tensor, size: int) -> Tensor:
    """Rewards (B,) of points (B,...), evaluated as reward(points[chunk], chunk), `size` batch rows at a time.

    Backpropagates each chunk immediately, so only one graph is in memory. The result can be backpropagated once.
    """
    chunks = [slice(start, start + size) for start in range(0, len(points), size)]
    if not torch.is_grad_enabled():
        return torch.cat([reward(points[chunk], chunk) for chunk in chunks])
    rewards = []
    for chunk in chunks:
        point = points[chunk].detach().requires_grad_()
        scores = reward(point, chunk)
        if scores.requires_grad:
            (gradient,) = torch.autograd.grad(scores.sum(), point)
            scores = scores.detach() + (gradient * (points[chunk] - point.detach())).flatten(1).sum(1)
        rewards.append(scores)
    return torch.cat(rewards)
