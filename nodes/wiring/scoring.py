"""Scores IMAGE batches, and decodes latents to score them."""

import logging
from collections.abc import Sequence
from textwrap import shorten
from typing import cast

import comfy.model_management
import torch
from torch import Tensor

from ...guidance.errors import GuidanceError
from ...guidance.rewards import CombinedReward, Reward, breakdown, parts_of
from .autograd import normal_weights
from .loaded import LoadedReward
from .prompts import has_choices, plain
from .vae_decoder import decodable_parts, fixed_random_state

MOST_PICTURES, MOST_PIXELS = 8, 2**24
"""Limits of a chunk of pictures that is scored at once."""


def to_pixels(images: Tensor) -> Tensor:
    """IMAGE (B,H,W,C) -> (B,3,H,W). Grey (C below 3) is repeated; transparency is ignored."""
    colours = images[..., :3] if images.shape[-1] >= 3 else images[..., :1].expand(*images.shape[:-1], 3)
    return colours.movedim(-1, 1)


def prompt_remarks(prompt: str, *loaded: LoadedReward | None) -> list[str]:
    """Sentences about how the rewards read the prompt: without ComfyUI's syntax, or cut because it is too long."""
    rewards = [part for each in loaded if each for part in parts_of(each.reward)]
    truncated_text = {reward.name: reward.truncated_text(plain(prompt)) for reward in rewards}
    ends = {name: shorten(end, 100, placeholder=" ...") for name, end in truncated_text.items() if end}
    cut = [f"{name} reads only the beginning of the prompt; it does not see: {end}" for name, end in ends.items()]
    return syntax_remarks(prompt, rewards) + cut


def syntax_remarks(prompt: str, rewards: Sequence[Reward]) -> list[str]:
    """Sentences about the text that rewards read, if it differs from the prompt and a reward needs the prompt."""
    read = plain(prompt)
    if read == prompt or not any(reward.needs_prompt for reward in rewards):
        return []
    remarks = [f"The reward reads {shorten(read, 200, placeholder=' ...')!r}."]
    if has_choices(prompt):
        remarks.append(
            "Of a choice {a|b} in the prompt it reads the first: it cannot know which one the picture was made from."
        )
    return remarks


def score_images(images: Tensor, loaded: LoadedReward, prompt: str) -> Tensor:
    """Raw scores (B,) on the CPU."""
    return score_parts(images, loaded, prompt)[0][1]


def score_parts(images: Tensor, loaded: LoadedReward, prompt: str) -> list[tuple[Reward, Tensor]]:
    """The reward with its raw scores (B,) on the CPU, then each part of a combination with its scores.

    The scores of an image tensor are cached while it exists: ComfyUI keeps images for its next run.
    """
    cache, text = loaded.scored.setdefault(images, {}), plain(prompt)
    if text not in cache:
        cache[text] = _score_parts(images, loaded, text)
    return cache[text]


def _score_parts(images: Tensor, loaded: LoadedReward, prompt: str) -> list[tuple[Reward, Tensor]]:
    """The same without the cache, chunk by chunk. Raises GuidanceError if there are no images."""
    if len(images) == 0:
        raise GuidanceError("There is no picture to score: the batch is empty.")
    chunk = max(1, min(MOST_PICTURES, MOST_PIXELS // max(1, images[0, ..., 0].numel())))
    comfy.model_management.load_models_gpu(
        list(loaded.patchers), memory_required=chunk * loaded.reward.activation_bytes
    )
    device = comfy.model_management.get_torch_device()
    with torch.inference_mode(False), torch.no_grad(), normal_weights(loaded.reward):
        chunks = [
            breakdown(loaded.reward, pixels.clone().to(device), [prompt]) for pixels in to_pixels(images).split(chunk)
        ]
    return [(parts[0][0], torch.cat([scores.cpu() for _, scores in parts])) for parts in zip(*chunks, strict=True)]


log = logging.getLogger(__name__)


def decode(vae, latents: Tensor) -> Tensor:
    """Latents (N,...) -> images (N,T,H,W,C) as VAE Decode gives them; T is 1 except for videos.

    The result is always the same, also for a VAE that adds noise, such as LTXV's. Raises GuidanceError if the VAE
    decodes neither images nor videos.
    """
    parts = decodable_parts(getattr(vae, "first_stage_model", None), latents)
    images = torch.cat([_decode_part(vae, part) for part in parts])
    if images.ndim not in (4, 5):
        raise GuidanceError(
            "Rewards score pictures and videos, and the connected VAE makes neither. Connect the VAE of a model that "
            "does."
        )
    return images if images.ndim == 5 else images.unsqueeze(1)


def _decode_part(vae, latents: Tensor) -> Tensor:
    with fixed_random_state(getattr(vae, "device", latents.device)):
        return vae.decode(latents)


def standardized_scores(clips: Tensor, reward: LoadedReward, prompt: str) -> Tensor:
    """Standardized scores (N,) of images (N,H,W,C), or of videos (N,T,H,W,C): the mean over their frames."""
    raw = score_images(frames_of(clips), reward, prompt)
    return reward.reward.standardize(raw).view(len(clips), -1).mean(1)


def frames_of(clips: Tensor) -> Tensor:
    """Videos (N,T,H,W,C) -> their frames (N*T,H,W,C). Images (N,H,W,C) stay unchanged."""
    return clips.flatten(0, 1) if clips.ndim == 5 else clips


def weighted_parts(reward: Reward) -> list[tuple[Reward, float]]:
    """The rewards of a combination with their weights. A single reward has weight 1."""
    if isinstance(reward, CombinedReward):
        return list(zip(cast(Sequence[Reward], reward.rewards), reward.weights, strict=True))
    return [(reward, 1.0)]
