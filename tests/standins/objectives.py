"""Objectives that a potential is measured against."""

from collections.abc import Callable

import torch
from reward_guidance.guidance.data.batches import Batch
from reward_guidance.guidance.process import column
from reward_guidance.guidance.training.objectives import OBJECTIVES, Objective, Task
from torch import Tensor, nn


def regression(error: Callable[[Tensor, Tensor], Tensor]) -> Objective:
    """The mean square of error(f, w), f being the scalar network and w the weights, plus the potential's auxiliary loss."""

    def objective(network: nn.Module, task: Task, batch: Batch) -> Tensor:
        unit = task.process.unit(batch.x, column(batch.sigma, batch.x))
        value, denoised = network((unit,), task.process.angle(batch.sigma), batch.text, with_denoised=True)
        loss = error(value, batch.weights).square().mean()
        if not torch.is_grad_enabled():
            return loss
        return loss + task.plan.denoised_weight * (denoised - batch.denoised).square().mean()

    return objective


COMPARED = {
    "potential_square": regression(lambda f, w: f.exp() - w),
    "potential_log": regression(lambda f, w: f - w.log()),
}
"""f -> log E[w|x] by regression of e^f (arXiv 2405.16876), noisier than the Poisson loss; and f -> E[log w|x], a different
quantity."""


def register() -> None:
    """Make them available to plans."""
    OBJECTIVES.update(COMPARED)
