"""The one object guidance is about: D -> D_q, the posterior mean replaced by the reward-weighted posterior mean."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import GuidanceError
from ..process import Process, column
from .smoothing import Smoothing

Denoiser = Callable[[Tensor], Tensor]
"""x (B,...) -> D(x, σ) (B,...) at the step's noise level."""

FADING, FIRST = 3.0, 0.3
"""Of a shift that reached its target: how fast it fades, per radian of the noise level's angle; and the share of the very first that it gets."""
LatentReward = Callable[[Tensor], Tensor]
"""Denoised latents (B,...) -> standardized rewards (B,), differentiable."""


@dataclass(frozen=True)
class Settings:
    """How strongly and when to guide. Temperature is in units of the reward's spread; strength multiplies the tilt."""

    strength: float = 1.0
    temperature: float = 1.0
    smoothing: Smoothing = Smoothing()
    momentum: float = 0.5
    cap: float = 0.5
    """Largest RMS of the shift of x, in units of the noise; per sample."""
    target: float = math.inf
    """Standardized reward that is good enough: from 1 below it on, the shift that led there is kept, ever more, and fades."""
    every: int = 1
    """Questions of the sampler from one reward gradient to the next; the last one is reused in between."""
    variance: float = 0.2
    """Per-element variance of the data as far as it is open: latents are scaled to about 1, but most of a picture follows from little of it."""

    def __post_init__(self):
        if not self.temperature > 0:
            raise GuidanceError(f"The temperature must be above 0, not {self.temperature}; smaller values follow the reward more closely.")
        for name in ("strength", "cap", "variance"):
            if not 0 <= getattr(self, name) < math.inf:
                raise GuidanceError(f"The {name} must be a number of at least 0, not {getattr(self, name)}.")
        if math.isnan(self.target):
            raise GuidanceError("The target must be a number, not nan; above every reward, it changes nothing.")
        if not 0 <= self.momentum < 1:
            raise GuidanceError(f"The momentum must be at least 0 and below 1, not {self.momentum}.")
        if self.every < 1:
            raise GuidanceError(f"A new gradient can be taken every 1, 2, ... times the model is asked, not every {self.every}.")


class NotFiniteError(GuidanceError):
    """The reward has no usable gradient here."""


class Estimator:
    """One estimate of D_q. Holds the state of one sampling run; make a new one for each run.

    A new estimator implements `guide` and adds its name to ESTIMATORS; it finds the smoothed reward gradient in `refresh`.
    """

    min_scale = 0.01
    """Where x holds less of the data than this, σ²/a diverges and the estimator only watches."""
    model_calls = 1
    """At each step."""
    model_gradient = False
    """Whether it backpropagates through the model."""

    def __init__(self, process: Process, reward: LatentReward, settings: Settings, generator: torch.Generator):
        self.process = process
        self.reward = reward
        self.settings = settings
        self.generator = generator
        self.gradient: Tensor | None = None
        self.judged = torch.empty(0)
        """The estimate (B,...) at which the last gradient was taken."""
        self.rewards = self.scores = torch.empty(0)
        """Its rewards (B,), on the CPU; and where the estimate is."""
        self.told: Tensor | None = None
        """What a look at the reward told of the current step (B+1,): the rewards, and 1 if their gradient is finite."""
        self.shift: Tensor | None = None
        """That of x (B,...), in units of the noise; where there is a target."""
        self.angle = math.inf
        """Of the noise level at which it was found."""
        self.calls = 0
        self.first_angle = self.last_angle = -math.inf
        """Noise level's angle at the first call since the state is empty, and at the last one."""
        self.moved = False
        """Whether any answer was tilted yet."""

    def __call__(self, denoise: Denoiser, x: Tensor, sigma: float) -> Tensor:
        """D_q(x, σ), shape of x."""
        self.forget_another(x, self.process.angle(sigma))
        step = self.watch if self.process.scale(sigma) < self.min_scale else self.guide
        tilted = step(denoise, x, sigma)
        self.calls += 1
        self.listen()
        return tilted

    def forget_another(self, x: Tensor, angle: float) -> None:
        """Empty the state where x is another sample than at the last call: of another shape, or again at the noise it began with.

        Samplers of videos that are made block by block call the model so, and those that change the resolution on the way.
        """
        restarts = angle >= self.first_angle and angle > self.last_angle
        if restarts or (self.gradient is not None and self.gradient.shape != x.shape):
            self.gradient = self.shift = None
            self.angle, self.calls, self.first_angle = math.inf, 0, angle
        self.last_angle = angle

    def take(self, rows: Tensor) -> None:
        """Go on with these rows (B,) of the batch, as after resampling it."""
        if self.gradient is not None:
            self.gradient, self.scores = self.gradient[rows.to(self.gradient.device)], self.scores[rows.to(self.scores.device)]
        if self.shift is not None:
            self.shift = self.shift[rows.to(self.shift.device)]

    def listen(self) -> None:
        """Read what was told, the only wait of a step for a GPU. Raises NotFiniteError where it is of no use."""
        if self.told is None:
            return
        told, self.told = self.told.cpu(), None
        self.rewards = told[:-1]
        if not (told.isfinite().all() and told[-1]):
            raise NotFiniteError("The reward's gradient is not a finite number. Try another decoder, or load the reward in float32.")

    @property
    def due(self) -> bool:
        """Whether it is time for a new gradient."""
        return self.gradient is None or self.calls % self.settings.every == 0

    def watch(self, denoise: Denoiser, x: Tensor, sigma: float) -> Tensor:
        """D(x, σ), whose reward gradient is taken for the calls to come."""
        denoised = denoise(x)
        self.refresh(denoised, sigma)
        return denoised

    def guide(self, denoise: Denoiser, x: Tensor, sigma: float) -> Tensor:
        """D_q(x, σ), shape of x."""
        raise NotImplementedError

    def refresh(self, denoised: Tensor, sigma: float) -> None:
        """Update `gradient`, g = ∇_D log mean_k exp(r(D + radius·s·ξ_k)/β), `judged` and `told`, at the untilted D."""
        if self.due:
            std = self.process.posterior_variance(sigma, self.settings.variance) ** 0.5
            offsets = self.settings.smoothing.offsets(denoised, std, self.generator)
            fresh, rewards = tilt_gradient(self.reward, denoised, offsets, self.settings.temperature)
            self.scores = rewards
            self.told = torch.cat([rewards, fresh.isfinite().all().to(rewards).view(1)])
            self.judged = denoised
            self.gradient = fresh if self.gradient is None else torch.lerp(fresh, self.gradient, self.settings.momentum)

    def capped_gradient(self, sigma: float) -> Tensor:
        """strength·g, limited so that the shift of x has at most `cap` times the noise's RMS; near the target, that of before."""
        assert self.gradient is not None
        self.moved = True
        unit = self.process.noise_std(sigma) / self.process.shift_gain(sigma)
        gradient = self.settings.strength * self.gradient
        rms = gradient.flatten(1).pow(2).mean(1).sqrt().clamp_min(torch.finfo(gradient.dtype).tiny)
        capped = gradient * column((self.settings.cap * unit / rms).clamp_max(1), gradient)
        return capped if self.settings.target == math.inf else unit * self.settled(capped / unit, self.process.angle(sigma))

    def settled(self, shift: Tensor, angle: float) -> Tensor:
        """The shift of before, so far as the last score comes near the target, and a new one (B,...) for the rest; in units of the noise.

        A reward's gradient at a picture that it likes has nothing more to say, but is as long as the cap lets it be. What is kept fades with
        the noise, however many calls that takes.
        """
        missing = column((self.settings.target - self.scores).clamp(0, 1).to(shift), shift)
        gone = max(0.0, self.angle - angle)
        kept = FIRST * shift if self.shift is None else (-FADING * gone * (1 - missing)).exp() * self.shift
        self.shift, self.angle = torch.lerp(kept, shift, missing), angle
        return self.shift


def tilt_gradient(reward: LatentReward, denoised: Tensor, offsets: list[Tensor], temperature: float) -> tuple[Tensor, Tensor]:
    """∇_D log mean_k exp(r(D + offset_k)/β) and its value times β, (B,...) and (B,). As in LGD-MC (Song et al., ICML 2023)."""
    scores, gradients = zip(*[reward_gradient(reward, denoised + offset) for offset in offsets], strict=True)
    logits = torch.stack(scores) / temperature
    weights = logits.softmax(0)
    gradient = sum(column(w, g) * g for w, g in zip(weights, gradients, strict=True)) / temperature
    value = temperature * (logits.logsumexp(0) - math.log(len(offsets)))
    return gradient, value


def reward_gradient(reward: LatentReward, point: Tensor) -> tuple[Tensor, Tensor]:
    """r (B,) and ∇r, shape of point. Raises GuidanceError where there is no gradient."""
    point = point.detach().requires_grad_()
    with torch.enable_grad():
        scores = reward(point)
        if not scores.requires_grad:
            raise GuidanceError("This reward has no gradient to guide by. Use it to choose among pictures, or guide by another reward.")
        (gradient,) = torch.autograd.grad(scores.sum(), point)
    return scores.detach(), gradient
