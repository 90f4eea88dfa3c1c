"""Scores of IMAGE batches, and decoding of latents for them."""

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
from .decoders import decodable, same_draws
from .loaded import LoadedReward
from .prompts import leaves_open, plain

MOST_PICTURES, MOST_PIXELS = 8, 2**24
"""Of pictures scored at once."""


def to_pixels(images: Tensor) -> Tensor:
    """ComfyUI's IMAGE (B,H,W,C), grey, with colours or with transparency, which is ignored -> (B,3,H,W)."""
    colours = images[..., :3] if images.shape[-1] >= 3 else images[..., :1].expand(*images.shape[:-1], 3)
    return colours.movedim(-1, 1)


def remarks(prompt: str, *judges: LoadedReward | None) -> list[str]:
    """What rewards and the parts of combinations read in place of the prompt, and do not see of one that is too long."""
    rewards = [part for judge in judges if judge for part in parts_of(judge.reward)]
    truncated_text = {reward.name: reward.truncated_text(plain(prompt)) for reward in rewards}
    ends = {name: shorten(end, 100, placeholder=" ...") for name, end in truncated_text.items() if end}
    cut = [f"{name} reads only the beginning of the prompt; it does not see: {end}" for name, end in ends.items()]
    return left_out(prompt, rewards) + cut


def left_out(prompt: str, rewards: Sequence[Reward]) -> list[str]:
    """What is read of a prompt with ComfyUI's syntax, where any of these rewards needs a prompt."""
    read = plain(prompt)
    if read == prompt or not any(reward.needs_prompt for reward in rewards):
        return []
    said = [f"The reward reads {shorten(read, 200, placeholder=' ...')!r}."]
    if leaves_open(prompt):
        said.append(
            "Of a choice {a|b} in the prompt it reads the first: it cannot know which was drawn for the picture."
        )
    return said


def score_images(images: Tensor, loaded: LoadedReward, prompt: str) -> Tensor:
    """Raw scores (B,) on the CPU."""
    return score_parts(images, loaded, prompt)[0][1]


def score_parts(images: Tensor, loaded: LoadedReward, prompt: str) -> list[tuple[Reward, Tensor]]:
    """The reward with its raw scores (B,) on the CPU, and after it the parts of a combination with theirs. The same pictures, which ComfyUI
    keeps for its next run, are not scored again."""
    known, read = loaded.scored.setdefault(images, {}), plain(prompt)
    if read not in known:
        known[read] = _score_parts(images, loaded, read)
    return known[read]


def _score_parts(images: Tensor, loaded: LoadedReward, prompt: str) -> list[tuple[Reward, Tensor]]:
    """The same, a few pictures at a time."""
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
    """Latents (N,...) -> pictures (N,T,H,W,C) as VAE Decode shows them; T is 1 but for videos.

    The same each time: a VAE that adds noise, as LTXV's does, adds the same to each video.
    """
    images = torch.cat([_decoded(vae, some) for some in decodable(getattr(vae, "first_stage_model", None), latents)])
    if images.ndim not in (4, 5):
        raise GuidanceError(
            "The connected VAE makes neither pictures nor videos, which is what rewards score. Connect the VAE of a model that does."
        )
    return images if images.ndim == 5 else images.unsqueeze(1)


def _decoded(vae, latents: Tensor) -> Tensor:
    with same_draws(getattr(vae, "device", latents.device)):
        return vae.decode(latents)


def score(clips: Tensor, reward: LoadedReward, prompt: str) -> Tensor:
    """Standardized rewards (N,) of pictures (N,T,H,W,C), the mean over a video's frames, or (N,H,W,C)."""
    raw = score_images(frames_of(clips), reward, prompt)
    return reward.reward.standardize(raw).view(len(clips), -1).mean(1)


def frames_of(clips: Tensor) -> Tensor:
    """Of several videos, one after the other; pictures as they are."""
    return clips.flatten(0, 1) if clips.ndim == 5 else clips


def weighted_parts(reward: Reward) -> list[tuple[Reward, float]]:
    """The rewards of a combination with their weights, or one reward alone."""
    if isinstance(reward, CombinedReward):
        return list(zip(cast(Sequence[Reward], reward.rewards), reward.weights, strict=True))
    return [(reward, 1.0)]
