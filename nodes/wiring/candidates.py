"""The candidates of Select Best: checks that its inputs agree, and scores them."""

from textwrap import shorten

import torch
from comfy_execution.graph_utils import ExecutionBlocker
from torch import Tensor

from ...guidance.errors import GuidanceError
from .loaded import LoadedReward
from .scoring import log, prompt_remarks, standardized_scores


def scores_tensor(scores: list) -> Tensor:
    """The connected scores as a tensor (N,). Raises GuidanceError if they are not numbers."""
    try:
        return torch.tensor(scores, dtype=torch.float32).flatten()
    except (TypeError, ValueError, RuntimeError) as error:
        raise GuidanceError(
            f"Select Best got scores that are not numbers: {shorten(str(scores), 100, placeholder=' ...')}."
        ) from error


def score_batches(batches: list[Tensor] | None, reward: list[LoadedReward] | None, prompts: list[str]) -> Tensor:
    """Standardized scores (N,) of all images or videos. The i-th batch has the i-th prompt, or the last one.

    Raises GuidanceError if there are no images or no reward.
    """
    if batches is None:
        raise GuidanceError("Select Best has nothing to score: connect images, or latents and their vae, or scores.")
    if reward is None:
        raise GuidanceError("Select Best has nothing to choose by: connect a reward or scores.")
    for remark in dict.fromkeys(remark for prompt in prompts for remark in prompt_remarks(prompt, reward[0])):
        log.info(remark)
    paired = [(clips, prompts[min(i, len(prompts) - 1)]) for i, clips in enumerate(batches)]
    return torch.cat([standardized_scores(clips, reward[0], prompt) for clips, prompt in paired])


def require_one_size(batches: list[Tensor]) -> None:
    """Raise GuidanceError if there are no images, or if their sizes or channels differ."""
    if not batches:
        raise GuidanceError("There is nothing to choose from: the list of pictures is empty.")
    sizes = {tuple(clips.shape[-3:]) for clips in batches}
    if len(sizes) > 1:
        found = ", ".join(f"{width} x {height} with {channels} channels" for height, width, channels in sorted(sizes))
        raise GuidanceError(
            f"Pictures of different sizes or channels cannot be compared: {found}. Give them one size first."
        )


def require_vae_channels(vae, latents: Tensor) -> None:
    """Raise GuidanceError if the VAE decodes another number of channels than the latents (N,C,...) have."""
    if vae.latent_channels != latents.shape[1]:
        raise GuidanceError(
            f"The connected VAE decodes {vae.latent_channels} latent channels, but the latents have "
            f"{latents.shape[1]}. Connect the VAE of the model that made them."
        )


def require_same_counts(counts: dict[str, int], videos: bool) -> None:
    """Raise GuidanceError if the numbers of scores, pictures and latents differ. videos: whether latents are videos."""
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{count} {name}" for name, count in counts.items())
        advice = " For videos, connect the vae in place of the images." if videos and "pictures" in counts else ""
        raise GuidanceError(f"Select Best got {found}; it needs one of each for every candidate.{advice}")


def missing_output(name: str) -> ExecutionBlocker:
    """Stops the nodes that are connected to an output whose input is not connected."""
    return ExecutionBlocker(f"Select Best has no output {name}: its input {name} is not connected.")
