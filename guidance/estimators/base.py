"""The interface of the estimators: D -> D_q, the posterior mean replaced by the reward-weighted posterior mean."""

import torch
from torch import Tensor

from ..process import Denoiser, Process
from .tilt import RewardFunction, Settings, Tilt


class Estimator:
    """One estimate of D_q. It holds the state of one sampling run; make a new one for each run.

    A new estimator is a class with `guide` and a name in ESTIMATORS. `guide` gets the reward's gradient from `self.tilt`.
    """

    min_scale = 0.01
    """Where x holds less of the data than this, σ²/a diverges. There the estimator takes a gradient, but does not guide."""
    model_calls = 1
    """Per step."""
    model_gradient = False
    """Whether it backpropagates through the model."""

    def __init__(self, process: Process, reward: RewardFunction, settings: Settings, generator: torch.Generator):
        self.process, self.settings = process, settings
        self.tilt = Tilt(process, reward, settings, generator)

    def __call__(self, denoise: Denoiser, x: Tensor, sigma: float) -> Tensor:
        """D_q(x, σ), shape of x. Raises NotFiniteError where the reward's gradient is not finite."""
        self.tilt.begin_call(x, sigma)
        step = self.unguided if self.process.scale(sigma) < self.min_scale else self.guide
        denoised = step(denoise, x, sigma)
        self.tilt.end_call()
        return denoised

    def unguided(self, denoise: Denoiser, x: Tensor, sigma: float) -> Tensor:
        """D(x, σ). Its reward gradient serves the next calls."""
        denoised = denoise(x)
        self.tilt.refresh(denoised, sigma)
        return denoised

    def guide(self, denoise: Denoiser, x: Tensor, sigma: float) -> Tensor:
        """D_q(x, σ), shape of x."""
        raise NotImplementedError
