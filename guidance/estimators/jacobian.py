"""The estimator `jacobian`, which backpropagates through the model."""

import torch

from .base import Estimator


class Jacobian(Estimator):
    """D_q = D + (σ²/a)·(∂D/∂x)ᵀ g, by the chain rule (DPS, arXiv 2209.14687). Needs a backward pass of the model."""

    model_gradient = True

    def guide(self, denoise, x, sigma):
        within_another = x.requires_grad
        with torch.enable_grad():
            point = x if within_another else x.detach().requires_grad_()
            output = denoise(point)
        self.tilt.refresh(output.detach(), sigma)
        (pulled_back,) = torch.autograd.grad(output, point, self.tilt.capped(sigma), retain_graph=within_another)
        return (output if within_another else output.detach()) + self.process.shift_gain(sigma) * pulled_back
