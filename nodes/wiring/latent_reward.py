"""Rewards of denoised latents: decodes them and evaluates the reward, with gradients."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import comfy.model_management
import comfy.model_patcher
import torch
from torch import Tensor

from ...guidance.errors import GuidanceError
from ...guidance.rewards import Reward, RewardError, evaluate, evaluate_unchecked, require_prompt
from .autograd import GradientPatcher, differentiable_model, manage, normal_weights
from .loaded import LoadedReward
from .prompts import plain
from .vae_decoder import Decoder


class LatentReward:
    """Model-space latents (B,C,H,W) or (B,C,T,H,W) -> standardized rewards (B,), differentiable.

    The reward of a video is the mean over `frames` evenly spaced latent frames, which are decoded one by one.
    Raises GuidanceError if the reward needs a prompt and there is none.
    """

    def __init__(self, loaded: LoadedReward, decoder: Decoder, prompt: str, frames: int = 3):
        require_prompt(loaded.reward, [plain(prompt)])
        if frames < 1:
            raise GuidanceError(f"At least 1 frame of a video must be scored, not {frames}.")
        self.loaded = loaded
        self.decoder = decoder
        self.prompt = prompt
        self.frames = frames
        self.modules = [loaded.reward, *decoder.modules]
        self.patchers = [*loaded.patchers, *map(manage, decoder.modules)]

    def __call__(self, latents: Tensor) -> Tensor:
        reward = self.loaded.reward
        if latents.requires_grad and not reward.differentiable:
            raise GuidanceError(
                f"{reward.name} has no gradient to guide by. "
                "Use it to choose among pictures, or guide by another reward."
            )
        # An estimator that takes the gradient checks at the end of its step that all values are finite.
        return self.for_prompts(latents, [self.prompt], evaluate_unchecked if latents.requires_grad else evaluate)

    def for_prompts(
        self, latents: Tensor, prompts: Sequence[str], by: Callable[[Reward, Tensor, Sequence[str]], Tensor] = evaluate
    ) -> Tensor:
        """Standardized rewards (B,) with one prompt for all samples, or with one for each."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        frames = self.frames_of(latents)
        pixels = self.decoder.pixels(frames)
        repeats = 1 if len(prompts) == 1 else len(frames) // len(latents)
        texts = [plain(prompt) for prompt in prompts for _ in range(repeats)]
        try:
            scores = by(self.loaded.reward, pixels, texts)
        except RewardError:
            self.require_finite(frames, pixels)
            raise
        except RuntimeError as error:
            if "Inference tensors" not in str(error):
                raise
            name = self.loaded.reward.name
            raise GuidanceError(
                f"{name} uses a tensor that was made while ComfyUI ran a node: it has no gradient. "
                "Register it with register_buffer in the reward's code."
            ) from error
        return self.loaded.reward.standardize(scores).view(len(latents), -1).mean(1)

    def require_finite(self, latents: Tensor, pixels: Tensor) -> None:
        """Raise GuidanceError if the latents or the pixels are not finite, and name the cause.

        It synchronizes with the GPU, so it is called only after an error.
        """
        if not latents.isfinite().all():
            raise GuidanceError(
                "The model's estimate is not a finite number, so no reward can score it: the model's file is damaged, "
                "or its precision is too low. Load the model in another precision."
            )
        if not pixels.isfinite().all():
            raise GuidanceError(
                f"The decoder {self.decoder.name} made pixels that are not finite numbers: its file is damaged, or its "
                "precision is too low. Replace the file, choose another decoder, or start ComfyUI with --fp32-vae."
            )

    def frames_of(self, latents: Tensor) -> Tensor:
        """The latent frames to score (N,C,H,W), sample by sample."""
        if latents.ndim == 4:
            return latents
        if latents.ndim != 5:
            raise GuidanceError(
                f"Reward guidance works on pictures and videos, not on latents of shape {tuple(latents.shape)}."
            )
        chosen = torch.linspace(0, latents.shape[2] - 1, min(self.frames, latents.shape[2])).round().long().tolist()
        return torch.stack([latents[:, :, frame] for frame in chosen], 1).flatten(0, 1)

    def activation_bytes(self, shape: torch.Size) -> int:
        """Rough memory of the forward and backward pass for a batch of latents of this shape."""
        count = shape[0] * (min(self.frames, shape[2]) if len(shape) == 5 else 1)
        return count * (self.decoder.activation_bytes(*shape[-2:]) + self.loaded.reward.activation_bytes)


def patchers_of(reward: LatentReward, held_out: LatentReward | None) -> list[GradientPatcher]:
    """The patchers of both rewards. They share one decoder, which is listed once."""
    return [*reward.patchers, *(held_out.loaded.patchers if held_out else ())]


def reward_series(
    denoised: Tensor, rewards: Tensor, held_out: Callable[[Tensor], Tensor] | None
) -> dict[str, list[float]]:
    """The series of a step: the rewards of denoised latents (B,...), and their held-out rewards."""
    with torch.no_grad():
        return {"reward": rewards.tolist()} | ({"reward/held-out": held_out(denoised).tolist()} if held_out else {})


def shape_with_room_for(
    rewards: Sequence[LatentReward | None], patcher: comfy.model_patcher.ModelPatcher, noise_shape: Sequence[int]
) -> list[int]:
    """`noise_shape` with additional samples, whose memory is that of evaluating the rewards one after the other.

    ComfyUI frees memory for a batch of this shape.
    """
    per_sample = patcher.model.memory_required([1, *noise_shape[1:]])
    extra = math.ceil(
        max(reward.activation_bytes(torch.Size(noise_shape)) for reward in rewards if reward) / per_sample
    )
    return [noise_shape[0] + extra, *noise_shape[1:]]


@contextmanager
def differentiable_context(
    model: comfy.model_patcher.ModelPatcher | None = None, reward: LatentReward | None = None, instead: str = ""
) -> Iterator[None]:
    """Load a model and a reward outside of sampling, and let gradients pass through them. Their weights stay frozen.

    model: a static clone. instead: what the error advises if the model has no gradient.
    """
    patchers, modules = (reward.patchers, reward.modules) if reward else ([], [])
    comfy.model_management.load_models_gpu([*([model] if model else []), *patchers], force_full_load=True)
    with (
        normal_weights(*modules),
        differentiable_model(model.model.requires_grad_(False), instead=instead) if model else nullcontext(),
    ):
        yield
