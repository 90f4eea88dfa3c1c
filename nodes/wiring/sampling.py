"""Samples several candidates at once, each with the noise of its own seed."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import comfy.k_diffusion.sampling as k_diffusion
import comfy.model_base
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from torch import Tensor

from ...guidance.errors import GuidanceError
from .conditioning import BatchRow
from .latents import fit_samples, select_samples
from .memory import largest_batch

Callback = Callable[[int, Tensor, Tensor, int], None]


def seeds_from(seed: int, count: int) -> list[int]:
    return [(seed + i) % 2**64 for i in range(count)]


@dataclass(frozen=True)
class Sampling:
    """The settings of a KSampler, without the seed and the latent."""

    model: Any
    steps: int
    cfg: float
    sampler_name: str
    scheduler: str
    positive: list
    negative: list
    denoise: float
    tilt_noise: Callable[[Tensor, Tensor | None], Tensor] = lambda noise, mask: noise
    """Noise (N,...) and the noise mask of the latent -> the initial noise."""

    def each(self, latent: dict) -> list[tuple["Sampling", dict]]:
        """For each sample of a LATENT in the model's shape: its own sampling and its own LATENT.

        Sampling them one by one gives the results of the whole batch. Raises GuidanceError for Stable Video Diffusion.
        """
        count = len(latent["samples"])
        if count > 1 and isinstance(self.model.model, comfy.model_base.SVD_img2vid):
            raise GuidanceError(
                "The batch of this video model holds the frames of one video, which cannot be sampled one by one. "
                "Sample whole videos with KSampler, and score their frames with Score Images."
            )
        rows = [BatchRow(i, count, latent["samples"].ndim) for i in range(count)]
        samplings = [replace(self, positive=row(self.positive), negative=row(self.negative)) for row in rows]
        return [(sampling, select_samples(latent, [i])) for i, sampling in enumerate(samplings)]

    def __call__(self, latent: dict, seeds: Sequence[int], callback: Callback) -> Tensor:
        """Samples (N,...) of one latent, one for each seed.

        A single seed gives the result of a stock KSampler, bit for bit.
        """
        sampler = comfy.samplers.sampler_object(self.sampler_name)
        if len(seeds) > 1:
            sampler.extra_options = sampler.extra_options | self.noise_of_each(
                sampler.sampler_function, self.start(latent), seeds
            )
        return self.run(sampler, latent, seeds, callback)

    def run(self, sampler: comfy.samplers.KSAMPLER, latent: dict, seeds: Sequence[int], callback: Callback) -> Tensor:
        """Samples (N,...) by a given sampler, which draws the noise of its steps itself."""
        start = self.start(latent)
        noise = [comfy.sample.prepare_noise(start, seed, latent.get("batch_index")) for seed in seeds]
        return comfy.sample.sample_custom(
            self.model,
            self.tilt_noise(torch.cat(noise), latent.get("noise_mask")),
            self.cfg,
            sampler,
            self.sigmas(),
            self.positive,
            self.negative,
            torch.cat([start] * len(seeds)),
            noise_mask=latent.get("noise_mask"),
            callback=callback,
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=seeds[0],
        )

    def start(self, latent: dict) -> Tensor:
        """The samples of a LATENT in the model's shape."""
        return fit_samples(self.model, latent)

    def sigmas(self) -> Tensor:
        """The noise levels (S+1,) of S steps."""
        model = self.model
        return comfy.samplers.KSampler(
            model, self.steps, model.load_device, self.sampler_name, self.scheduler, self.denoise, model.model_options
        ).sigmas

    def noise_of_each(self, function: Callable, start: Tensor, seeds: Sequence[int]) -> dict:
        """Options that make a stochastic sampler draw the same noise for a sample in a batch as for it alone."""
        sigmas = self.sigmas()
        if "noise_sampler" not in inspect.signature(function).parameters or len(sigmas) == 0:
            return {}
        like = torch.empty(start.shape, device=self.model.load_device)
        if _draws_brownian_noise(self.sampler_name):
            batch = like.expand(len(seeds), *like.shape[1:])
            on_cpu = not self.sampler_name.endswith("_gpu")
            tree = k_diffusion.BrownianTreeNoiseSampler(
                batch, sigmas[sigmas > 0].min(), sigmas.max(), seed=list(seeds), cpu=on_cpu
            )
            return {"noise_sampler": tree}
        each = [k_diffusion.default_noise_sampler(like, seed=seed) for seed in seeds]
        return {"noise_sampler": lambda sigma, following: torch.cat([draw(sigma, following) for draw in each])}

    def at_once(self, chunk: int, latent: dict, n: int) -> int:
        """How many of n samples to make at once. chunk: the wanted number; 0 for as many as fit in memory."""
        if chunk == 1 or not _can_draw_noise_of_each(self.sampler_name):
            return 1
        return min(n, chunk or largest_batch(self.model, self.start(latent).shape))

    def progress(self, runs: int) -> Callable[[int], Callback]:
        """Run number -> the callback of this run. The runs share one progress bar and preview."""
        show = latent_preview.prepare_callback(self.model, runs * self.steps)
        return lambda run: lambda step, x0, x, steps: show(run * steps + step, x0, x, runs * steps)


def _draws_brownian_noise(sampler_name: str) -> bool:
    return sampler_name.startswith("dpmpp") and "sde" in sampler_name


def _can_draw_noise_of_each(sampler_name: str) -> bool:
    """False for an adaptive step size, which depends on the whole batch, and for samplers of other packs."""
    function = comfy.samplers.sampler_object(sampler_name).sampler_function
    return sampler_name != "dpm_adaptive" and function.__module__.startswith("comfy.")
