"""Reward guidance as a patch of a MODEL."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import comfy.model_patcher
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...guidance.errors import GuidanceError
from ...guidance.estimators import ESTIMATORS, Estimator, NotFiniteError, Settings
from ...guidance.randomness import generator
from .autograd import (
    differentiable_model,
    gradients,
    in_current_modes,
    models_of,
    normal,
    static_clone,
    trains_elsewhere,
)
from .hooks import ROWS_KEY, SamplerHooks, SamplingRun, require_order, serial_numbers
from .latent_reward import LatentReward, patchers_of, rewards_of, with_room_for
from .model_info import GRADIENT_KEY, process_of, require_noise_to_picture
from .reporting import NodeStep


@dataclass(frozen=True, kw_only=True)
class GuidedStep(NodeStep):
    """One guided model call."""

    sigma: float
    model_calls: int


@dataclass(kw_only=True)
class Run(SamplingRun):
    """One sampling run that a reward guides."""

    estimator: Estimator
    sigmas: list[float]
    serial: int = field(default_factory=lambda: next(serial_numbers))
    model_calls: int = 0
    scored_estimate: Tensor | None = None
    """The estimate whose rewards were told last."""
    rows: Tensor | None = None
    """Of the last resampling that the estimator heard of."""

    def hear(self, rows: Tensor | None) -> None:
        """Keep the estimator's state with its samples, once for each resampling."""
        if rows is not None and rows is not self.rows:
            self.rows = rows
            self.estimator.tilt.take(rows)


@dataclass(frozen=True, eq=False)
class RewardGuidance(SamplerHooks):
    """Reward guidance of one model: clone, attach, forget."""

    reward: LatentReward
    estimator: str
    settings: Settings
    start: float = 0.0
    end: float = 1.0
    report: Callable[[GuidedStep], object] = lambda step: None
    held_out: LatentReward | None = None
    """Reported, not followed."""

    def __post_init__(self):
        require_order(self.start, self.end)

    def attach(self, model: comfy.model_patcher.ModelPatcher) -> comfy.model_patcher.ModelPatcher:
        """A clone of the model that any sampler guides by the reward; the model itself where there is nothing to do."""
        if self.settings.strength == 0 or self.start == self.end:
            return model
        require_noise_to_picture(model.get_model_object("model_sampling"))
        patched = static_clone(model, "The estimator jacobian", ONE_CALL) if self.kind.model_gradient else model.clone()
        key = f"{GRADIENT_KEY}{next(serial_numbers)}"
        self.hook(patched, key)
        patched.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, key, self.prepare_sampling)
        patched.set_additional_models(key, patchers_of(self.reward, self.held_out))
        return patched

    @property
    def kind(self) -> type[Estimator]:
        return ESTIMATORS[self.estimator]

    def prepare_sampling(self, executor, patcher, noise_shape, conds, *args, **kwargs):
        """Load the diffusion model with room left for what the reward needs."""
        kwargs["force_full_load"] = kwargs.get("force_full_load", False) or self.kind.model_gradient
        return executor(
            patcher, with_room_for([self.reward, self.held_out], patcher, noise_shape), conds, *args, **kwargs
        )

    def warn(self, run: Run | None) -> None:
        super().warn(run)
        if not trains_elsewhere() and (run is None or not run.estimator.tilt.used):
            logging.warning(
                f"Reward guidance changed nothing: of {self.start:g} to {self.end:g} of the way from noise, this sampling has too few steps. "
                "The first of them only finds the direction, and with a denoise below 1 the sampling begins later on the way."
            )

    def begin(self, guider, shape, model_options, seed):
        sampling = guider.inner_model.model_sampling
        process = process_of(sampling, shape)
        sigmas = model_options.get("transformer_options", {}).get("sample_sigmas", torch.zeros(1)).tolist()
        run = Run(
            process=process,
            first_sigma=sampling.percent_to_sigma(self.start),
            last_sigma=sampling.percent_to_sigma(self.end),
            sigmas=sigmas,
            estimator=self.kind(
                process, lambda denoised: self.reward(run.blended(denoised)), self.settings, generator(seed or 0)
            ),
        )
        return run

    def predict(self, run, guider, executor, x, timestep, model_options, seed):
        options = model_options.get("transformer_options", {})
        run.hear(options.get(ROWS_KEY))
        sigma = one_level(timestep)
        if not run.active(sigma):
            return executor(x, timestep, model_options, seed)
        require_one_call(self.estimator, options)

        def denoise(point: Tensor) -> Tensor:
            run.model_calls += 1
            return executor(run.moved(x, point), timestep, model_options, seed)

        plain_denoise = in_current_modes(denoise)
        with gradients(*self.reward.modules):
            if not self.kind.model_gradient:
                denoised = self.guide(run, plain_denoise, x, sigma)
            else:
                x, timestep, model_options = (
                    x.clone(),
                    normal(timestep),
                    {**model_options, "transformer_options": normal(options)},
                )
                with differentiable_model(guider.inner_model, *models_of(guider), instead=f"the estimator {ONE_CALL}"):
                    denoised = self.guide(run, denoise, x, sigma)
        self.record(run, sigma)
        return denoised

    def guide(self, run: Run, denoise: Callable[[Tensor], Tensor], x: Tensor, sigma: float) -> Tensor:
        try:
            return run.estimator(denoise, x, sigma)
        except NotFiniteError:
            self.reward(run.blended(run.estimator.tilt.scored_estimate))  # names what is at fault
            raise

    def record(self, run: Run, sigma: float) -> None:
        """Tell of a step that looked at the rewards; both of them judge the same estimate."""
        tilt = run.estimator.tilt
        if tilt.scored_estimate is run.scored_estimate:
            return
        run.scored_estimate = tilt.scored_estimate
        steps = max(len(run.sigmas) - 1, 1)
        # Some samplers begin a little below the first sigma.
        step = min(sum(level > sigma * (1 + 1e-3) for level in run.sigmas) + 1, steps)
        series = rewards_of(run.blended(tilt.scored_estimate), tilt.rewards, self.held_out)
        self.report(
            GuidedStep(step=step, steps=steps, series=series, run=run.serial, sigma=sigma, model_calls=run.model_calls)
        )


ONE_CALL = "shift"
"""The estimator that works with every model."""


def one_level(timestep: Tensor) -> float:
    """The noise level that all samples of a batch (B,) have. Raises GuidanceError where they differ."""
    levels = timestep.flatten().tolist()
    if len(set(levels)) > 1:
        raise GuidanceError(
            "Reward guidance needs one noise level for all samples of a batch; this sampler gives each its own."
        )
    return levels[0]


def require_one_call(estimator: str, transformer_options: dict) -> None:
    """Raise GuidanceError for an estimator that a model which remembers its calls cannot serve, as Causal Wan remembers earlier frames."""
    kind = ESTIMATORS[estimator]
    if "ar_state" in transformer_options and (kind.model_gradient or kind.model_calls > 1):
        why = (
            "backpropagates through the model"
            if kind.model_gradient
            else f"calls the model {kind.model_calls} times at each step"
        )
        raise GuidanceError(
            f"This model remembers the frames of every call, but the estimator {estimator} {why}: choose the estimator {ONE_CALL}."
        )


def resampled(extra_args: dict, rows: Tensor) -> dict:
    """A sampler's arguments for the calls that follow a resampling; guidance hears of it."""
    options = extra_args.get("model_options", {})
    told = {**options.get("transformer_options", {}), ROWS_KEY: rows}
    return {**extra_args, "model_options": {**options, "transformer_options": told}}


@dataclass(frozen=True, eq=False)
class RewardBeside:
    """Loads a reward beside a model, for samplers that score on the way, and shows the model `chunk` samples at a time; 0 shows all."""

    reward: LatentReward
    chunk: int = 0
    held_out: LatentReward | None = None

    def attach(self, model: comfy.model_patcher.ModelPatcher) -> comfy.model_patcher.ModelPatcher:
        patched = model.clone()
        key = f"reward_guidance.{next(serial_numbers)}"
        patched.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, key, self.prepare_sampling)
        patched.set_additional_models(key, patchers_of(self.reward, self.held_out))
        if self.chunk:
            patched.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, key, self.predict_noise)
        return patched

    def prepare_sampling(self, executor, patcher, noise_shape, conds, *args, **kwargs):
        shown = min(self.chunk or noise_shape[0], noise_shape[0])
        return executor(
            patcher,
            with_room_for([self.reward, self.held_out], patcher, [shown, *noise_shape[1:]]),
            conds,
            *args,
            **kwargs,
        )

    def predict_noise(self, executor, x, timestep, model_options=None, seed=None):
        parts = zip(x.split(self.chunk), timestep.split(self.chunk), strict=True)
        return torch.cat([executor(part, level, model_options or {}, seed) for part, level in parts])
