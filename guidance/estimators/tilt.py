"""The reward's gradient during one sampling run, with smoothing, momentum, cap and target."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import GuidanceError
from ..process import Process, column
from .smoothing import Smoothing

RewardFunction = Callable[[Tensor], Tensor]
"""Denoised latents (B,...) -> standardized rewards (B,), differentiable."""

DECAY = 3.0
"""Decay rate of a kept shift, per radian of the noise angle."""
FIRST = 0.3
"""Share of the first shift that is kept if the first reward has reached the target already."""


@dataclass(frozen=True)
class Settings:
    """How strongly and how often to guide."""

    strength: float = 1.0
    """Factor of the gradient."""
    temperature: float = 1.0
    """β, in units of the standardized reward."""
    smoothing: Smoothing = Smoothing()
    momentum: float = 0.5
    """Share of the previous gradient that is kept, at least 0 and below 1."""
    cap: float = 0.5
    """Largest RMS of the shift of x per sample, in units of the noise."""
    target: float = math.inf
    """Standardized reward that is good enough. From one unit below it, the previous shift gradually replaces the new
    one and decays with the noise."""
    every: int = 1
    """Model calls from one reward gradient to the next. In between, the last gradient is used again."""
    variance: float = 0.2
    """Per-element variance of the data, for the variance of the posterior. Latents have a variance of about 1, but
    their elements depend on each other."""

    def __post_init__(self):
        if not self.temperature > 0:
            raise GuidanceError(
                f"The temperature must be above 0, not {self.temperature}; "
                "smaller values follow the reward more closely."
            )
        for name in ("strength", "cap", "variance"):
            if not 0 <= getattr(self, name) < math.inf:
                raise GuidanceError(f"The {name} must be a number of at least 0, not {getattr(self, name)}.")
        if math.isnan(self.target):
            raise GuidanceError("The target must be a number, not nan; a target above every reward changes nothing.")
        if not 0 <= self.momentum < 1:
            raise GuidanceError(f"The momentum must be at least 0 and below 1, not {self.momentum}.")
        if self.every < 1:
            raise GuidanceError(f"A new gradient can be taken every 1, 2, ... model calls, not every {self.every}.")


class NotFiniteError(GuidanceError):
    """The reward's gradient is not finite."""


class Tilt:
    """The gradient g = ∇_D log h during one sampling run, whose state it holds. Make a new one for each run."""

    def __init__(self, process: Process, reward: RewardFunction, settings: Settings, generator: torch.Generator):
        self.process, self.reward, self.settings, self.generator = process, reward, settings, generator
        self.gradient: Tensor | None = None
        self.scored_estimate = torch.empty(0)
        """The estimate (B,...) at which the last gradient was taken."""
        self.rewards = self.scores = torch.empty(0)
        """The rewards (B,) of that estimate: on the CPU, and on the estimate's device."""
        self.pending: Tensor | None = None
        """The rewards of this step, and 1 if their gradient is finite (B+1,). Not transferred to the CPU yet."""
        self.shift: Tensor | None = None
        """The last shift of x (B,...) in units of the noise, if there is a target."""
        self.shift_angle = math.inf
        """The noise angle of that shift."""
        self.calls = 0
        self.first_angle = self.last_angle = -math.inf
        """The noise angle of the first call since the last reset, and of the last call."""
        self.used = False
        """Whether the gradient has changed any prediction yet."""

    def begin_call(self, x: Tensor, sigma: float) -> None:
        """Reset the state if x (B,...) is a new sample: of another shape, or at full noise again.

        Samplers that generate a video in blocks, or change the resolution, call the model this way.
        """
        angle = self.process.angle(sigma)
        restarts = angle >= self.first_angle and angle > self.last_angle
        if restarts or (self.gradient is not None and self.gradient.shape != x.shape):
            self.gradient = self.shift = None
            self.shift_angle, self.calls, self.first_angle = math.inf, 0, angle
        self.last_angle = angle

    def end_call(self) -> None:
        self.calls += 1
        self.check_pending()

    def check_pending(self) -> None:
        """Transfer the rewards to the CPU, the only synchronisation of a step with a GPU.

        Raises NotFiniteError if the rewards or their gradient are not finite.
        """
        if self.pending is None:
            return
        pending, self.pending = self.pending.cpu(), None
        self.rewards = pending[:-1]
        if not (pending.isfinite().all() and pending[-1]):
            raise NotFiniteError(
                "The reward's gradient is not a finite number. Try another decoder, or load the reward in float32."
            )

    def take(self, rows: Tensor) -> None:
        """Keep the state of these batch rows (B,) after resampling."""
        if self.gradient is not None:
            self.gradient, self.scores = (
                self.gradient[rows.to(self.gradient.device)],
                self.scores[rows.to(self.scores.device)],
            )
        if self.shift is not None:
            self.shift = self.shift[rows.to(self.shift.device)]

    @property
    def due(self) -> bool:
        """Whether the next call needs a new gradient."""
        return self.gradient is None or self.calls % self.settings.every == 0

    def refresh(self, denoised: Tensor, sigma: float) -> None:
        """If due, take a new gradient at the untilted D (B,...): g = ∇_D log mean_k exp(r(D + radius·s·ξ_k)/β)."""
        if self.due:
            std = self.process.posterior_variance(sigma, self.settings.variance) ** 0.5
            offsets = self.settings.smoothing.offsets(denoised, std, self.generator)
            fresh, rewards = tilt_gradient(self.reward, denoised, offsets, self.settings.temperature)
            self.scores = rewards
            self.pending = torch.cat([rewards, fresh.isfinite().all().to(rewards).view(1)])
            self.scored_estimate = denoised
            self.gradient = fresh if self.gradient is None else torch.lerp(fresh, self.gradient, self.settings.momentum)

    def capped(self, sigma: float) -> Tensor:
        """strength·g (B,...), limited so that the RMS of the shift of x is at most `cap` times the noise.

        Near the target, the kept shift replaces it.
        """
        assert self.gradient is not None
        self.used = True
        unit = self.process.noise_std(sigma) / self.process.shift_gain(sigma)
        gradient = self.settings.strength * self.gradient
        rms = gradient.flatten(1).pow(2).mean(1).sqrt().clamp_min(torch.finfo(gradient.dtype).tiny)
        capped = gradient * column((self.settings.cap * unit / rms).clamp_max(1), gradient)
        return (
            capped if self.settings.target == math.inf else unit * self.kept(capped / unit, self.process.angle(sigma))
        )

    def kept(self, shift: Tensor, angle: float) -> Tensor:
        """A mixture (B,...) of the new shift and the previous one, which it equals at the target. In units of the
        noise.

        At a high reward the gradient has no useful direction, but the cap still allows its full length. The decay of
        the previous shift depends on the noise angle, not on the number of model calls.
        """
        missing = column((self.settings.target - self.scores).clamp(0, 1).to(shift), shift)
        passed = max(0.0, self.shift_angle - angle)
        previous = FIRST * shift if self.shift is None else (-DECAY * passed * (1 - missing)).exp() * self.shift
        self.shift, self.shift_angle = torch.lerp(previous, shift, missing), angle
        return self.shift


def tilt_gradient(
    reward: RewardFunction, denoised: Tensor, offsets: list[Tensor], temperature: float
) -> tuple[Tensor, Tensor]:
    """∇_D log mean_k exp(r(D + offset_k)/β) (B,...), and β times the logarithm (B,).

    As in LGD-MC (Song et al., ICML 2023).
    """
    scores, gradients = zip(*[reward_gradient(reward, denoised + offset) for offset in offsets], strict=True)
    logits = torch.stack(scores) / temperature
    weights = logits.softmax(0)
    gradient = sum(column(w, g) * g for w, g in zip(weights, gradients, strict=True)) / temperature
    value = temperature * (logits.logsumexp(0) - math.log(len(offsets)))
    return gradient, value


def reward_gradient(reward: RewardFunction, point: Tensor) -> tuple[Tensor, Tensor]:
    """r (B,) and ∇r (B,...) at a point (B,...). Raises GuidanceError if the reward has no gradient."""
    point = point.detach().requires_grad_()
    with torch.enable_grad():
        scores = reward(point)
        if not scores.requires_grad:
            raise GuidanceError(
                "This reward has no gradient to guide by. Use it to choose among pictures, or guide by another reward."
            )
        (gradient,) = torch.autograd.grad(scores.sum(), point)
    return scores.detach(), gradient
