"""Hooks of a sampling run, shared by reward guidance and guidance networks."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any
from weakref import WeakKeyDictionary

import comfy.model_patcher
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...guidance.errors import GuidanceError
from ...guidance.inpainting import Inpainting
from ...guidance.process import Process
from .autograd import normal, trains_elsewhere

serial_numbers = count()
ROWS_KEY = "reward_guidance.rows"
"""Key in transformer_options: the rows of the previous batch that a sampler chose when it resampled."""


@dataclass(kw_only=True)
class SamplingRun:
    """The state of guidance during one sampling run."""

    process: Process
    first_sigma: float
    last_sigma: float
    noise_mask: "NoiseMask | None" = None
    inpainting: Inpainting | None = None
    """The mask of the current model call."""

    def active(self, sigma: Any) -> Any:
        return (self.last_sigma < sigma) & (sigma <= self.first_sigma)

    def moved(self, x: Tensor, point: Tensor) -> Tensor:
        """The model's input: `point` in place of x, except where a noise mask keeps the latent."""
        return point if self.inpainting is None else self.inpainting.moved(x, point)

    def blended(self, denoised: Tensor) -> Tensor:
        """The denoised latent, with the kept latent where a noise mask keeps it."""
        return denoised if self.inpainting is None else self.inpainting.blended(denoised)


@dataclass(frozen=True)
class NoiseMask:
    """A noise mask and the latent that it keeps."""

    mask: Tensor
    """(B,...), 1 where the latent is sampled, 0 where it is kept."""
    latent: Tensor
    """(B,...), in the model's space."""
    sigmas: Tensor

    def at(self, guider, timestep: Tensor, model_options: dict) -> Inpainting:
        """The mask at one model call. Nodes such as Differential Diffusion change it from step to step."""
        mask = self.mask
        if "denoise_mask_function" in model_options:
            mask = model_options["denoise_mask_function"](
                timestep, mask, extra_options={"model": guider, "sigmas": self.sigmas}
            )
        with torch.inference_mode(False):
            return Inpainting(normal(mask), normal(self.latent))


def require_order(start: float, end: float) -> None:
    """Raise GuidanceError if the interval of guidance ends before it starts."""
    if not start <= end:
        raise GuidanceError(f"Guidance starts at {start} and ends at {end}: the start must not lie after the end.")


def require_samples(noise: Tensor, latent_shapes: Sequence | None) -> None:
    """Raise GuidanceError if the latent is empty, or if it holds several streams."""
    if 0 in noise.shape:
        raise GuidanceError(f"The latent is empty, of shape {tuple(noise.shape)}: there is nothing to sample.")
    if latent_shapes is not None and len(latent_shapes) > 1:
        raise GuidanceError("Reward guidance cannot score latents that hold several streams, such as video with audio.")


@dataclass(frozen=True, eq=False)
class SamplerHooks:
    """Hooks that change the predictions of a model's clone while a sampler runs. The state is kept per run."""

    runs: "WeakKeyDictionary[object, Any]" = field(default_factory=WeakKeyDictionary, init=False)

    def hook(self, patched: comfy.model_patcher.ModelPatcher, key: str) -> None:
        patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, key, self.outer_sample)
        patched.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, key, self.sampler_sample)
        patched.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, key, self.predict_noise)

    def outer_sample(self, executor, noise, *args, latent_shapes=None, **kwargs):
        """Delete the state of the run at its end, also after an error."""
        require_samples(noise, latent_shapes)
        guider = executor.class_obj
        try:
            out = executor(noise, *args, latent_shapes=latent_shapes, **kwargs)
            self.warn(self.runs.get(guider))
            return out
        finally:
            self.runs.pop(guider, None)

    def warn(self, run: Any) -> None:
        """Log why a run was not guided as the user may expect."""
        if trains_elsewhere():
            logging.warning("The model is trained by another node: meanwhile its guidance is off.")

    def sampler_sample(
        self,
        executor,
        guider,
        sigmas,
        extra_args,
        callback,
        noise,
        latent_image=None,
        denoise_mask=None,
        *args,
        **kwargs,
    ):
        """Create the state of a run."""
        run = self.begin(guider, noise.shape, extra_args.get("model_options", {}), extra_args.get("seed"))
        if denoise_mask is not None:
            run.noise_mask = NoiseMask(denoise_mask, latent_image, sigmas)
        self.runs[guider] = run
        return executor(guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, *args, **kwargs)

    def predict_noise(self, executor, x, timestep, model_options=None, seed=None):
        """D -> D_q for one model call."""
        guider, model_options = executor.class_obj, {} if model_options is None else model_options
        if trains_elsewhere():
            return executor(x, timestep, model_options, seed)
        if guider not in self.runs:  # a custom guider may call no sampler
            self.runs[guider] = self.begin(guider, x.shape, model_options, seed)
        run = self.runs[guider]
        if run.noise_mask is not None:
            run.inpainting = run.noise_mask.at(guider, timestep, model_options)
        return self.predict(run, guider, executor, x, timestep, model_options, seed)

    def begin(self, guider, shape: torch.Size, model_options: dict, seed: int | None) -> Any:
        """The state of a run for latents of this shape."""
        raise NotImplementedError

    def predict(
        self, run: Any, guider, executor, x: Tensor, timestep: Tensor, model_options: dict, seed: int | None
    ) -> Tensor:
        """D_q (B,...) of x (B,...) at noise levels (B,)."""
        raise NotImplementedError
