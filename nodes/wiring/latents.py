"""LATENT dictionaries: joins them, and selects samples with their masks and seeds."""

from collections.abc import Sequence

import comfy.sample
import comfy.utils
import torch
from comfy.conds import is_equal
from torch import Tensor

from ...guidance.errors import GuidanceError

SEEDS = "seeds"
"""Key in a LATENT: for each sample, the seed with which a stock KSampler makes it alone."""
RATIOS = ("downscale_ratio_spacial", "downscale_ratio_temporal")
"""Keys in an empty LATENT: the downscale ratios of the model that its size was chosen for."""


def samples_of(latent: dict) -> Tensor:
    """The samples of a LATENT (N,...). Raises GuidanceError if there are none, or if they hold several streams."""
    samples = latent["samples"]
    if samples.is_nested:
        raise GuidanceError("Rewards cannot score latents that hold several streams, such as video with audio.")
    if len(samples) == 0:
        raise GuidanceError("There is no latent: the batch is empty.")
    return samples


def empty_latent(latent: dict) -> dict:
    """One sample of zeros in the size of a LATENT, with the ratios that say for which model the size was chosen."""
    ratios = {name: latent[name] for name in RATIOS if name in latent}
    return ratios | {"samples": torch.zeros_like(samples_of(latent)[:1])}


def join_latents(latents: list[dict]) -> dict:
    """Join LATENTs: samples, masks, batch indices and seeds, and the entries that are the same in all.

    Raises GuidanceError if the shapes of the samples differ.
    """
    samples = [samples_of(latent) for latent in latents]
    if len(shapes := {tuple(each.shape[1:]) for each in samples}) > 1:
        raise GuidanceError(
            f"Latents of different shapes cannot be compared: {sorted(shapes)}. Sample them in one size."
        )
    if len(latents) == 1:
        return latents[0]
    masks = {"noise_mask": join_masks(latents)} if any("noise_mask" in latent for latent in latents) else {}
    return common_entries(latents) | {"samples": torch.cat(samples)} | masks | join_numbers(latents)


def common_entries(latents: list[dict]) -> dict:
    """The entries that belong to no single sample and are equal in all LATENTs, such as the type."""
    own = ("samples", "noise_mask", "batch_index", SEEDS)
    first = {key: value for key, value in latents[0].items() if key not in own}
    return {key: value for key, value in first.items() if all(is_equal(each.get(key), value) for each in latents)}


def join_numbers(latents: list[dict]) -> dict:
    """Batch indices if any LATENT has them (ComfyUI counts from 0 in the others), and seeds if all have them."""
    numbers: dict[str, list[int]] = {}
    if any("batch_index" in latent for latent in latents):
        indices = [latent.get("batch_index", range(len(latent["samples"]))) for latent in latents]
        numbers["batch_index"] = [index for own in indices for index in own]
    if all(SEEDS in latent for latent in latents):
        numbers[SEEDS] = [seed for latent in latents for seed in latent[SEEDS]]
    return numbers


def join_masks(latents: list[dict]) -> Tensor:
    """A mask for every sample (N,...), of ones where a LATENT has none.

    Masks of different sizes get the latents' size.
    """
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
    """The noise mask of a LATENT with one row for each sample, in its own resolution, as in comfy.utils.reshape_mask.

    For latents with frames, a mask with fewer dimensions holds the frames of one video, which all samples share.
    """
    samples, mask = latent["samples"], latent["noise_mask"]
    if samples.ndim == 4:
        mask = mask.reshape(-1, 1, *mask.shape[-2:])
    if samples.ndim == 5 and mask.ndim < 5:
        mask = mask.reshape(1, 1, -1, *mask.shape[-2:])
    return comfy.utils.repeat_to_batch_size(mask, len(samples))


def select_samples(latent: dict, indices: list[int]) -> dict:
    """The LATENT of these samples, with their masks, batch indices and seeds."""
    count = len(latent["samples"])
    chosen = {**latent, "samples": latent["samples"][indices]}
    if "noise_mask" in latent:
        chosen["noise_mask"] = mask_rows(latent)[indices]
    for key in ("batch_index", SEEDS):
        values = chosen.pop(key, [])
        if len(values) == count:
            chosen[key] = [values[i] for i in indices]
    return chosen


def fit_latent(model, latent: dict) -> dict:
    """The LATENT in the model's shape. The shape of the whole batch decides how its mask is read."""
    rest = {key: value for key, value in latent.items() if key not in RATIOS}
    return rest | {"samples": fit_samples(model, latent | {"samples": samples_of(latent)})}


def sampled_latent(latent: dict, origins: list[int], samples: Tensor, seeds: Sequence[int] | None = None) -> dict:
    """The LATENT that a sampler returns. samples: (N,...); origins: the rows of `latent` they were made from."""
    out = select_samples(latent, origins) | {"samples": samples}
    for key in (*RATIOS, SEEDS):
        out.pop(key, None)
    return out if seeds is None else out | {SEEDS: list(seeds)}


def fit_samples(model, latent: dict) -> Tensor:
    """The samples (N,C,...) in the model's shape."""
    ratios = {name: latent[name] for name in RATIOS if name in latent}
    return comfy.sample.fix_empty_latent_channels(model, latent["samples"], **ratios)
