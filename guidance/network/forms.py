"""The forms of guidance: how the output of a guidance network becomes D_q."""

import torch
from torch import Tensor, nn

from ..process import Denoiser, Process, column
from .unet import Text


class Form:
    """How a network's output becomes D_q. `sigma` is (B,), all other tensors are (B,...)."""

    inputs = 2
    """Number of input latents of the network."""
    moves = False
    """Whether the model is called at another point than x."""

    def __call__(
        self,
        network: nn.Module,
        process: Process,
        denoise: Denoiser,
        x: Tensor,
        sigma: Tensor,
        text: Text,
        strength: float | Tensor = 1.0,
    ) -> Tensor:
        """D_q (B,...)."""
        raise NotImplementedError


class CorrectionForm(Form):
    """D_q = D + s·G(x, D), with s the posterior's standard deviation for data of unit variance."""

    def __call__(self, network, process, denoise, x, sigma, text, strength=1.0):
        level = column(sigma, x)
        denoised = denoise(x)
        std = process.posterior_variance(level) ** 0.5
        return denoised + strength * std * network((process.unit(x, level), denoised), process.angle(sigma), text)


class NoiseCorrectionForm(Form):
    """D_q = D + s·G(x), for data that is Gaussian noise. D is then proportional to x and is no separate input."""

    inputs = 1

    def __call__(self, network, process, denoise, x, sigma, text, strength=1.0):
        level = column(sigma, x)
        std = process.posterior_variance(level) ** 0.5
        return denoise(x) + strength * std * network((process.unit(x, level),), process.angle(sigma), text)


class ShiftForm(Form):
    """D_q = D(x + noise·G(x)): the network chooses a point, and the model predicts there.

    D_q therefore stays on the model's manifold.
    """

    inputs = 1
    moves = True

    def __call__(self, network, process, denoise, x, sigma, text, strength=1.0):
        level = column(sigma, x)
        return denoise(
            x + strength * process.noise_std(level) * network((process.unit(x, level),), process.angle(sigma), text)
        )


class PotentialForm(Form):
    """D_q = D + (noise²/a)·∇f, with a scalar network f ≈ log E[w|x] (arXiv 2405.16876).

    The model is not differentiated.
    """

    inputs = 1

    def __call__(self, network, process, denoise, x, sigma, text, strength=1.0):
        level = column(sigma, x)
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            value = network((process.unit(point, level),), process.angle(sigma), text)
            (gradient,) = torch.autograd.grad(value.sum(), point)
        return denoise(x) + strength * process.shift_gain(level) * gradient


class OneStepForm(Form):
    """D_q = D + G(x) at pure noise, where `denoise` is the identity (arXiv 2508.09968).

    The network moves noise in a single step.
    """

    inputs = 1

    def __call__(self, network, process, denoise, x, sigma, text, strength=1.0):
        return denoise(x) + strength * network((x,), process.angle(sigma), text)


FORMS: dict[str, Form] = {
    "correction": CorrectionForm(),
    "shift": ShiftForm(),
    "potential": PotentialForm(),
    "noise": NoiseCorrectionForm(),
    "leap": OneStepForm(),
}
