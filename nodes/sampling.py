"""What the samplers of several candidates share: noise from a seed of each one's own, and latents that carry these seeds."""

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
from comfy.conds import is_equal
from torch import Tensor

from ..guidance.errors import GuidanceError
from .conditioning import Row
from .runtime import as_many_as_fit

SEEDS = "seeds"
"""Key in a LATENT: for each sample, the seed by which a stock KSampler makes it alone."""
RATIOS = ("downscale_ratio_spacial", "downscale_ratio_temporal")
"""Keys in an empty LATENT: of the model that its size was chosen for."""

Callback = Callable[[int, Tensor, Tensor, int], None]


def samples_of(latent: dict) -> Tensor:
    """The samples of a LATENT (N,...), N at least 1. Raises GuidanceError where there is nothing that a reward could score."""
    samples = latent["samples"]
    if samples.is_nested:
        raise GuidanceError("Rewards cannot score latents that hold several streams, such as video with audio.")
    if len(samples) == 0:
        raise GuidanceError("There is no latent: the batch is empty.")
    return samples


def joined(latents: list[dict]) -> dict:
    """One LATENT of several, with the mask, batch index and seed of each sample, and the entries that all share."""
    samples = [samples_of(latent) for latent in latents]
    if len(shapes := {tuple(each.shape[1:]) for each in samples}) > 1:
        raise GuidanceError(f"Latents of different shapes cannot be chosen among: {sorted(shapes)}. Sample them in one size.")
    if len(latents) == 1:
        return latents[0]
    masks = {"noise_mask": joined_masks(latents)} if any("noise_mask" in latent for latent in latents) else {}
    return shared(latents) | {"samples": torch.cat(samples)} | masks | joined_numbers(latents)


def shared(latents: list[dict]) -> dict:
    """The entries that do not belong to single samples and are the same in all LATENTs: the type, for example."""
    own = ("samples", "noise_mask", "batch_index", SEEDS)
    first = {key: value for key, value in latents[0].items() if key not in own}
    return {key: value for key, value in first.items() if all(is_equal(each.get(key), value) for each in latents)}


def joined_numbers(latents: list[dict]) -> dict:
    """Batch indices, where any LATENT has them: in one without, ComfyUI counts from 0. Seeds, where all have them."""
    numbers: dict[str, list[int]] = {}
    if any("batch_index" in latent for latent in latents):
        indices = [latent.get("batch_index", range(len(latent["samples"]))) for latent in latents]
        numbers["batch_index"] = [index for own in indices for index in own]
    if all(SEEDS in latent for latent in latents):
        numbers[SEEDS] = [seed for latent in latents for seed in latent[SEEDS]]
    return numbers


def joined_masks(latents: list[dict]) -> Tensor:
    """A mask for every sample; without one, everything is sampled. Masks of different sizes get the latents' size."""
    masks = [mask_rows(latent) for latent in latents if "noise_mask" in latent]
    if len({mask.shape[1:] for mask in masks}) > 1:
        size = max(mask.shape[1] for mask in masks), *latents[0]["samples"].shape[2:]
        masks = [comfy.utils.reshape_mask(mask, (len(mask), *size)) for mask in masks]
    own = iter(masks)
    whole = torch.ones_like(masks[0][:1])
    counts = [len(latent["samples"]) for latent in latents]
    without = [comfy.utils.repeat_to_batch_size(whole, count) for count in counts]
    every = [next(own) if "noise_mask" in each else ones for each, ones in zip(latents, without, strict=True)]
    return torch.cat([mask.to(whole) for mask in every])


def mask_rows(latent: dict) -> Tensor:
    """The noise mask of a LATENT with a row for each sample, in its own resolution, read as comfy.utils.reshape_mask reads it.

    Beside latents with frames, a mask of fewer dimensions holds the frames of one video, which all samples share.
    """
    samples, mask = latent["samples"], latent["noise_mask"]
    if samples.ndim == 4:
        mask = mask.reshape(-1, 1, *mask.shape[-2:])
    if samples.ndim == 5 and mask.ndim < 5:
        mask = mask.reshape(1, 1, -1, *mask.shape[-2:])
    return comfy.utils.repeat_to_batch_size(mask, len(samples))


def rows(latent: dict, indices: list[int]) -> dict:
    """Some samples of a LATENT, with all that belongs to them."""
    count = len(latent["samples"])
    chosen = {**latent, "samples": latent["samples"][indices]}
    if "noise_mask" in latent:
        chosen["noise_mask"] = mask_rows(latent)[indices]
    for key in ("batch_index", SEEDS):
        values = chosen.pop(key, [])
        if len(values) == count:
            chosen[key] = [values[i] for i in indices]
    return chosen


def fitted(model, latent: dict) -> dict:
    """A LATENT in the model's shape, which decides how its mask is read and is found once for the whole batch."""
    rest = {key: value for key, value in latent.items() if key not in RATIOS}
    return rest | {"samples": start_of(model, latent | {"samples": samples_of(latent)})}


def sampled(latent: dict, origins: list[int], samples: Tensor, seeds: Sequence[int] | None = None) -> dict:
    """The LATENT a sampler returns: new samples (N,...), made from these rows of the old one."""
    out = rows(latent, origins) | {"samples": samples}
    for key in (*RATIOS, SEEDS):
        out.pop(key, None)
    return out if seeds is None else out | {SEEDS: list(seeds)}


def start_of(model, latent: dict) -> Tensor:
    """The latent in the model's shape."""
    ratios = {name: latent[name] for name in RATIOS if name in latent}
    return comfy.sample.fix_empty_latent_channels(model, latent["samples"], **ratios)


def seeds_from(seed: int, count: int) -> list[int]:
    return [(seed + i) % 2**64 for i in range(count)]


@dataclass(frozen=True)
class Sampling:
    """What a KSampler is told, but for the seed and the latent."""

    model: Any
    steps: int
    cfg: float
    sampler_name: str
    scheduler: str
    positive: list
    negative: list
    denoise: float
    tilt: Callable[[Tensor, Tensor | None], Tensor] = lambda noise, mask: noise
    """Noise (N,...) and the noise mask of the latent -> the noise to begin with."""

    def each(self, latent: dict) -> list[tuple["Sampling", dict]]:
        """For each sample of a LATENT that fits the model: how to sample it as in the whole batch, and its own LATENT."""
        count = len(latent["samples"])
        if count > 1 and isinstance(self.model.model, comfy.model_base.SVD_img2vid):
            raise GuidanceError(
                "The batch of this video model holds the frames of one video, which cannot be sampled one by one. Sample whole "
                "videos with KSampler, and score their frames with Score Images."
            )
        chosen = [Row(i, count, latent["samples"].ndim) for i in range(count)]
        alone = [replace(self, positive=row(self.positive), negative=row(self.negative)) for row in chosen]
        return [(sampling, rows(latent, [i])) for i, sampling in enumerate(alone)]

    def __call__(self, latent: dict, seeds: Sequence[int], callback: Callback) -> Tensor:
        """A sample (N,...) of one latent for each seed. A seed alone gives what a stock KSampler gives, bit for bit."""
        sampler = comfy.samplers.sampler_object(self.sampler_name)
        if len(seeds) > 1:
            sampler.extra_options = sampler.extra_options | self.noise_of_each(sampler.sampler_function, self.start(latent), seeds)
        return self.run(sampler, latent, seeds, callback)

    def run(self, sampler: comfy.samplers.KSAMPLER, latent: dict, seeds: Sequence[int], callback: Callback) -> Tensor:
        """The same by any sampler, which draws its own noise as it likes."""
        start = self.start(latent)
        noise = [comfy.sample.prepare_noise(start, seed, latent.get("batch_index")) for seed in seeds]
        return comfy.sample.sample_custom(
            self.model,
            self.tilt(torch.cat(noise), latent.get("noise_mask")),
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
        return start_of(self.model, latent)

    def sigmas(self) -> Tensor:
        model = self.model
        return comfy.samplers.KSampler(
            model, self.steps, model.load_device, self.sampler_name, self.scheduler, self.denoise, model.model_options
        ).sigmas

    def noise_of_each(self, function: Callable, start: Tensor, seeds: Sequence[int]) -> dict:
        """Options that make a stochastic sampler draw, for each sample of a batch, what it draws for that sample alone."""
        sigmas = self.sigmas()
        if "noise_sampler" not in inspect.signature(function).parameters or len(sigmas) == 0:
            return {}
        like = torch.empty(start.shape, device=self.model.load_device)
        if _draws_brownian_noise(self.sampler_name):
            batch = like.expand(len(seeds), *like.shape[1:])
            on_cpu = not self.sampler_name.endswith("_gpu")
            tree = k_diffusion.BrownianTreeNoiseSampler(batch, sigmas[sigmas > 0].min(), sigmas.max(), seed=list(seeds), cpu=on_cpu)
            return {"noise_sampler": tree}
        each = [k_diffusion.default_noise_sampler(like, seed=seed) for seed in seeds]
        return {"noise_sampler": lambda sigma, following: torch.cat([draw(sigma, following) for draw in each])}

    def at_once(self, chunk: int, latent: dict, n: int) -> int:
        """How many of n samples to make together when asked for `chunk`, 0 meaning as many as memory holds."""
        if chunk == 1 or not _can_draw_noise_of_each(self.sampler_name):
            return 1
        return min(n, chunk or as_many_as_fit(self.model, self.start(latent).shape))

    def progress(self, runs: int) -> Callable[[int], Callback]:
        """The callback of each of several runs that share a progress bar and its preview."""
        show = latent_preview.prepare_callback(self.model, runs * self.steps)
        return lambda run: lambda step, x0, x, steps: show(run * steps + step, x0, x, runs * steps)


def _draws_brownian_noise(sampler_name: str) -> bool:
    return sampler_name.startswith("dpmpp") and "sde" in sampler_name


def _can_draw_noise_of_each(sampler_name: str) -> bool:
    """Not so an adaptive step size, which depends on the whole batch, and samplers that other packs add, whose noise we do not know."""
    function = comfy.samplers.sampler_object(sampler_name).sampler_function
    return sampler_name != "dpm_adaptive" and function.__module__.startswith("comfy.")
