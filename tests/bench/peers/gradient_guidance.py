import torch
from bench.peers.problem import Problem
from torch import Tensor

STRENGTH = 0.05


def dps(problem: Problem) -> Tensor:
    """DPS (arXiv 2209.14687), FreeDoM (2303.09833): each step follows the gradient of r(D(x)) by x, through the model and the full VAE."""

    def guided(denoise, x: Tensor, sigma: float) -> Tensor:
        with torch.enable_grad(), problem.through_model():
            point = x.detach().clone().requires_grad_()
            denoised, reward = problem.with_gradient(denoise, point)
            (gradient,) = torch.autograd.grad(reward.sum(), point)
        return denoised.detach() + STRENGTH * gradient / (gradient.norm() + 1e-8) * x.norm()

    return problem.sample(change=guided)


def flowchef(problem: Problem) -> Tensor:
    """FlowChef (arXiv 2412.00100): the gradient at the estimate D itself, full VAE, as if D moved with x; nothing goes back through the model."""

    def guided(denoise, x: Tensor, sigma: float) -> Tensor:
        denoised = denoise(x).detach().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(problem.reward(denoised).sum(), denoised)
        return denoised.detach() + STRENGTH * gradient / (gradient.norm() + 1e-8) * x.norm()

    return problem.sample(change=guided)
