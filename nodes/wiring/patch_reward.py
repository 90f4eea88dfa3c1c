"""Patches a MODEL with reward guidance, or with the evaluation of rewards beside it."""

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
from .latent_reward import LatentReward, patchers_of, reward_series, shape_with_room_for
from .model_info import GRADIENT_KEY, process_of, require_noise_to_picture
from .reporting import NodeStep


@dataclass(frozen=True, kw_only=True)
class GuidedStep(NodeStep):
    """One guided model call."""

    sigma: float
    model_calls: int


@dataclass(kw_only=True)
class GuidedRun(SamplingRun):
    """The state of one sampling run that a reward guides."""

    estimator: Estimator
    samples: int
    """In the batch."""
    sigmas: list[float]
    serial: int = field(default_factory=lambda: next(serial_numbers))
    model_calls: int = 0
    scored_estimate: Tensor | None = None
    """The estimate of the last reported step."""
    rows: Tensor | None = None
    """The rows of the last resampling that was applied to the estimator."""

    def resample(self, rows: Tensor | None) -> None:
        """Resample the estimator's state (B,...) with its samples, once for each resampling."""
        if rows is not None and rows is not self.rows:
            self.rows = rows
            self.estimator.tilt.take(rows)


@dataclass(frozen=True, eq=False)
class RewardGuidance(SamplerHooks):
    """Reward guidance of one model.

    start, end: the guided part of the sampling, 0 to 1 from noise to picture. Raises GuidanceError if end < start.
    """

    reward: LatentReward
    estimator: str
    settings: Settings
    start: float = 0.0
    end: float = 1.0
    on_step: Callable[[GuidedStep], object] = lambda step: None
    held_out: LatentReward | None = None
    """Reported, not used for guidance."""

    def __post_init__(self):
        require_order(self.start, self.end)

    def attach(self, model: comfy.model_patcher.ModelPatcher) -> comfy.model_patcher.ModelPatcher:
        """A guided clone of the model; the model itself if the strength or the interval is 0."""
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
        """Load the diffusion model, and leave memory for the reward."""
        kwargs["force_full_load"] = kwargs.get("force_full_load", False) or self.kind.model_gradient
        shape = shape_with_room_for([self.reward, self.held_out], patcher, noise_shape)
        return executor(patcher, shape, conds, *args, **kwargs)

    def warn(self, run: GuidedRun | None) -> None:
        super().warn(run)
        if not trains_elsewhere() and (run is None or not run.estimator.tilt.used):
            logging.warning(
                f"Reward guidance changed nothing: this sampling has too few steps from {self.start:g} to {self.end:g} "
                "of the way from noise. The first of them only finds the direction, and with a denoise below 1 the "
                "sampling begins later on the way."
            )

    def begin(self, guider, shape, model_options, seed):
        sampling = guider.inner_model.model_sampling
        process = process_of(sampling, shape)
        sigmas = model_options.get("transformer_options", {}).get("sample_sigmas", torch.zeros(1)).tolist()
        run = GuidedRun(
            process=process,
            first_sigma=sampling.percent_to_sigma(self.start),
            last_sigma=sampling.percent_to_sigma(self.end),
            samples=shape[0],
            sigmas=sigmas,
            estimator=self.kind(
                process, lambda denoised: self.reward(run.blended(denoised)), self.settings, generator(seed or 0)
            ),
        )
        return run

    def predict(self, run, guider, executor, x, timestep, model_options, seed):
        options = model_options.get("transformer_options", {})
        run.resample(options.get(ROWS_KEY))
        sigma = common_sigma(timestep)
        if not run.active(sigma):
            return executor(x, timestep, model_options, seed)
        require_whole_batch(x, run.samples)
        require_one_call(self.estimator, options)

        def denoise(point: Tensor) -> Tensor:
            run.model_calls += 1
            return executor(run.moved(x, point), timestep, model_options, seed)

        plain_denoise = in_current_modes(denoise)
        with gradients(*self.reward.modules):
            if not self.kind.model_gradient:
                denoised = self.guide(run, plain_denoise, x, sigma)
            else:
                model_options = {**model_options, "transformer_options": normal(options)}
                x, timestep = x.clone(), normal(timestep)
                with differentiable_model(guider.inner_model, *models_of(guider), instead=f"the estimator {ONE_CALL}"):
                    denoised = self.guide(run, denoise, x, sigma)
        self.record(run, sigma)
        return denoised

    def guide(self, run: GuidedRun, denoise: Callable[[Tensor], Tensor], x: Tensor, sigma: float) -> Tensor:
        try:
            return run.estimator(denoise, x, sigma)
        except NotFiniteError:
            self.reward(run.blended(run.estimator.tilt.scored_estimate))  # raises an error that names the cause
            raise

    def record(self, run: GuidedRun, sigma: float) -> None:
        """Report a step that evaluated the reward. The held-out reward scores the same estimate."""
        tilt = run.estimator.tilt
        if tilt.scored_estimate is run.scored_estimate:
            return
        run.scored_estimate = tilt.scored_estimate
        steps = max(len(run.sigmas) - 1, 1)
        # Some samplers begin a little below the first sigma.
        step = min(sum(level > sigma * (1 + 1e-3) for level in run.sigmas) + 1, steps)
        series = reward_series(run.blended(tilt.scored_estimate), tilt.rewards, self.held_out)
        self.on_step(
            GuidedStep(step=step, steps=steps, series=series, run=run.serial, sigma=sigma, model_calls=run.model_calls)
        )


ONE_CALL = "shift"
"""The estimator that works with all models."""


def common_sigma(timestep: Tensor) -> float:
    """The noise level of all samples of a batch (B,). Raises GuidanceError if they differ."""
    levels = timestep.flatten().tolist()
    if len(set(levels)) > 1:
        raise GuidanceError(
            "Reward guidance needs one noise level for all samples of a batch; this sampler gives each its own."
        )
    return levels[0]


def require_whole_batch(x: Tensor, samples: int) -> None:
    """Raise GuidanceError for a part of a batch, because it is unknown which gradients belong to it."""
    if len(x) != samples:
        raise GuidanceError(
            f"Reward guidance needs all {samples} samples of a batch at once, but this sampler calls the model with "
            f"{len(x)}. Sample one at a time."
        )


def require_one_call(estimator: str, transformer_options: dict) -> None:
    """Raise GuidanceError if the model keeps state between calls and the estimator repeats or differentiates them.

    Causal Wan is such a model: it keeps the frames of earlier calls.
    """
    kind = ESTIMATORS[estimator]
    if "ar_state" in transformer_options and (kind.model_gradient or kind.model_calls > 1):
        why = (
            "backpropagates through the model"
            if kind.model_gradient
            else f"calls the model {kind.model_calls} times at each step"
        )
        raise GuidanceError(
            f"This model remembers the frames of every call, but the estimator {estimator} {why}: "
            f"choose the estimator {ONE_CALL}."
        )


def with_resampled_rows(extra_args: dict, rows: Tensor) -> dict:
    """The arguments of a sampler after a resampling: guidance reads the chosen rows and resamples its state."""
    options = extra_args.get("model_options", {})
    transformer_options = {**options.get("transformer_options", {}), ROWS_KEY: rows}
    return {**extra_args, "model_options": {**options, "transformer_options": transformer_options}}


@dataclass(frozen=True, eq=False)
class ScoringHooks:
    """Loads a reward together with a model, for samplers that evaluate rewards, and splits model calls into chunks.

    chunk: samples of one model call; 0 for all.
    """

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
        called = [min(self.chunk or noise_shape[0], noise_shape[0]), *noise_shape[1:]]
        shape = shape_with_room_for([self.reward, self.held_out], patcher, called)
        return executor(patcher, shape, conds, *args, **kwargs)

    def predict_noise(self, executor, x, timestep, model_options=None, seed=None):
        parts = zip(x.split(self.chunk), timestep.split(self.chunk), strict=True)
        return torch.cat([executor(part, level, model_options or {}, seed) for part, level in parts])
