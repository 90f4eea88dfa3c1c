"""Peers that follow a reward's gradient from step to step.

Gradients are scaled to the noise that the model predicts, as FreeDoM does; raw ones differ by orders of magnitude between rewards and steps.
"""

import torch
from bench.peers.problem import Problem, norm
from torch import Tensor

STRENGTH = 0.2


def dps(problem: Problem, strength: float = STRENGTH) -> Tensor:
    """DPS (arXiv 2209.14687), FreeDoM (2303.09833): each step follows the gradient of r(D(x)) by x, through the model and the reward."""

    def guided(denoise, x: Tensor, sigma: float) -> Tensor:
        with problem.gradient(problem.model.model):
            point = x.detach().clone().requires_grad_()
            denoised, reward = problem.with_gradient(denoise, point)
            (gradient,) = torch.autograd.grad(reward.sum(), point)
        return followed(x, denoised.detach(), gradient, strength)

    return problem.sample(change=guided)


def flowchef(problem: Problem, strength: float = STRENGTH) -> Tensor:
    """FlowChef (arXiv 2412.00100): the gradient at the estimate D itself, as if D moved with x; nothing goes back through the model."""

    def guided(denoise, x: Tensor, sigma: float) -> Tensor:
        denoised = denoise(x)
        with problem.gradient():
            point = denoised.detach().clone().requires_grad_()
            (gradient,) = torch.autograd.grad(problem.reward(point).sum(), point)
        return followed(x, denoised, gradient, strength)

    return problem.sample(change=guided)


def followed(x: Tensor, denoised: Tensor, gradient: Tensor, strength: float) -> Tensor:
    return denoised + strength * norm(x - denoised) * gradient / (norm(gradient) + 1e-8)
