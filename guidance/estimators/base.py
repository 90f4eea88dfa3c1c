"""The interface of the estimators of D_q, the reward-weighted posterior mean, from the model's D."""

import torch
from torch import Tensor

from ..process import Denoiser, Process
from .tilt import RewardFunction, Settings, Tilt


class Estimator:
    """Estimates D_q during one sampling run, whose state it holds. Make a new one for each run.

    A new estimator is a subclass with `guide`, and an entry in ESTIMATORS. `self.tilt` provides the reward's gradient.
    """

    min_scale = 0.01
    """Smallest scale a(σ) at which it guides: σ²/a diverges as a goes to 0. Below, it only takes a gradient."""
    model_calls = 1
    """Model calls per step."""
    model_gradient = False
    """Whether it backpropagates through the model."""

    def __init__(self, process: Process, reward: RewardFunction, settings: Settings, generator: torch.Generator):
        self.process, self.settings = process, settings
        self.tilt = Tilt(process, reward, settings, generator)

    def __call__(self, denoise: Denoiser, x: Tensor, sigma: float) -> Tensor:
        """D_q(x, σ) (B,...) for x (B,...). Raises NotFiniteError if the reward's gradient is not finite."""
        self.tilt.begin_call(x, sigma)
        step = self.unguided if self.process.scale(sigma) < self.min_scale else self.guide
        denoised = step(denoise, x, sigma)
        self.tilt.end_call()
        return denoised

    def unguided(self, denoise: Denoiser, x: Tensor, sigma: float) -> Tensor:
        """D(x, σ) (B,...). The reward's gradient there is kept for the next calls."""
        denoised = denoise(x)
        self.tilt.refresh(denoised, sigma)
        return denoised

    def guide(self, denoise: Denoiser, x: Tensor, sigma: float) -> Tensor:
        """D_q(x, σ) (B,...) for x (B,...)."""
        raise NotImplementedError
