import torch

from .base import Estimator


class Jacobian(Estimator):
    """D_q = D + (σ²/a)·(∂D/∂x)ᵀ g: the chain rule through the model (DPS, arXiv 2209.14687). Costs a backward pass and its memory."""

    def guide(self, denoise, x, sigma):
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            output = denoise(point)
        denoised = output.detach()
        self.refresh(denoised, sigma)
        (pulled_back,) = torch.autograd.grad(output, point, self.capped_gradient(sigma))
        return denoised + self.process.shift_gain(sigma) * pulled_back
