"""Decodes latents by a VAE, with gradients, and checks that a VAE belongs to a model."""

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfy.sd
import comfy.taesd.taehv
import torch
from comfy.latent_formats import LatentFormat
from comfy.ldm.modules.diffusionmodules.model import AttnBlock, ResnetBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...guidance.errors import GuidanceError
from .autograd import static_clone

TINY_VIDEO_NUMBERS = 375
"""Rough count of the numbers that the graph of a video model's tiny autoencoder holds, per output frame and per pixel
before its pixel shuffle."""


class Decoder:
    """Model-space latents (N,C,H,W) -> pixels (N,3,h,w) in about [0,1], on the same device.

    Pixels are never clamped, because a clamp has no gradient. The same latents always give the same pixels.
    """

    name: str
    modules: tuple[nn.Module, ...] = ()
    video = False
    """Whether latents are frames of videos."""
    upscale: int
    """Width of the pixels divided by the width of the latents."""
    bytes_per_pixel = 0
    """Rough activation memory of decoding with gradients, per pixel."""

    def pixels(self, latents: Tensor) -> Tensor:
        raise NotImplementedError

    def halvings(self, height: int, width: int) -> int:
        """How often the size of the picture is halved for a latent of this size."""
        return 0

    def activation_bytes(self, height: int, width: int) -> int:
        """Rough memory of decoding one latent of this size with gradients."""
        return self.bytes_per_pixel * height * width * self.upscale**2


def for_vae(latent_format: LatentFormat, latents: Tensor) -> Tensor:
    """Model-space latents (N,C,H,W) -> the VAE's latents: (N,C,H,W), or (N,C,1,H,W) for a video model."""
    return latent_format.process_out(latents.unsqueeze(2) if latent_format.latent_dimensions == 3 else latents)


class FullVAE(Decoder):
    """The connected VAE: exact and slow, and gradients through it need much memory."""

    name = "vae"
    module: Any

    def __init__(self, latent_format: LatentFormat, vae: comfy.sd.VAE):
        require_matching_vae(vae, latent_format)
        self.latent_format = latent_format
        self.dtype = vae.vae_dtype
        self.scale, self.offset = _affine(vae.process_output)
        self.upscale = vae.spacial_compression_decode()
        self.video = vae.latent_dim == 3
        self.bytes_per_pixel = (
            100_000 if self.video else 2 * vae.memory_used_decode((1, 1, 1, 1), self.dtype) // self.upscale**2
        )
        self.module = checkpointed(_private_copy(vae))
        self.modules = (self.module,)
        if isinstance(self.module, comfy.taesd.taehv.TAEHV):
            self.prepare_tiny_video()

    def prepare_tiny_video(self) -> None:
        """Set up the tiny autoencoder of a video model, which can also be connected as a VAE."""
        module, weight = self.module, next(self.module.parameters())
        module.show_progress_bar = False
        module.parallel = True  # otherwise it works frame by frame and detaches earlier frames from the graph
        self.bytes_per_pixel = TINY_VIDEO_NUMBERS * module.t_upscale * weight.element_size() // module.patch_size**2
        with torch.no_grad():
            self.upscale = module.decode(weight.new_zeros(1, module.latent_channels, 1, 1, 1)).shape[-1]

    def pixels(self, latents: Tensor) -> Tensor:
        vae_latents = for_vae(self.latent_format, latents).to(self.dtype)
        pixels = torch.cat([self.decode(part) for part in decodable_parts(self.module, vae_latents)])
        return pixels.to(latents.device).float() * self.scale + self.offset

    def decode(self, latents: Tensor) -> Tensor:
        """The VAE's latents -> pixels (N,3,h,w) before the affine map to [0,1]."""
        module, options = self.module, {}
        if getattr(module, "comfy_has_chunked_io", False):
            options["output_buffer"] = latents.new_empty(module.decode_output_shape(latents.shape))
        with fixed_random_state(latents.device):
            pixels = module.decode(latents, **options)
        return (pixels[:, :, -1] if pixels.ndim == 5 else pixels)[:, :3]


def _affine(process_output) -> tuple[float, float]:
    """Scale and offset of a VAE's output map, which is affine up to a clamp, from two points inside the clamp."""
    low, high = process_output(torch.tensor([0.25, 0.5])).tolist()
    scale = (high - low) / 0.25
    return scale, high - 0.5 * scale


def _private_copy(vae: comfy.sd.VAE) -> nn.Module:
    """A copy of the VAE with its own weights: ComfyUI may offload the original's while gradients are computed."""
    if vae.patcher.is_dynamic():
        module = static_clone(vae.patcher, "The decoder vae", "another decoder").model
    else:
        module = copy.deepcopy(vae.first_stage_model)
    return module.eval().requires_grad_(False)


def checkpointed(module: nn.Module) -> nn.Module:
    """Store only the inputs of the blocks for the backward pass, and recompute the rest."""
    for block in module.modules():
        if isinstance(block, (ResnetBlock, AttnBlock)):
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    return module


def decodable_parts(module: nn.Module | None, latents: Tensor) -> tuple[Tensor, ...]:
    """Split latents (N,...) into parts that a VAE decodes at once.

    LTXV's VAE with timestep conditioning decodes one video at a time.
    """
    return latents.split(1 if getattr(module, "timestep_conditioning", False) else max(1, len(latents)))


@contextmanager
def fixed_random_state(device: torch.device) -> Iterator[None]:
    """Seed the device's global generator with 0 and restore its state at the end.

    So the noise that LTXV's VAE adds is always the same, and the user's random numbers do not change.
    """
    module = None if device.type == "cpu" else getattr(torch, device.type, None)
    if module is None:
        generator = torch.default_generator
        state, seed, restore = generator.get_state(), generator.manual_seed, generator.set_state
    else:
        state, seed, restore = module.get_rng_state(), module.manual_seed, module.set_rng_state
    seed(0)
    try:
        yield
    finally:
        restore(state)


def require_matching_vae(vae: comfy.sd.VAE, latent_format: LatentFormat) -> None:
    """Raise GuidanceError if the VAE does not fit the model, or if the model makes no pictures or videos."""
    require_pictures(latent_format)
    vae.throw_exception_if_invalid()
    channels = for_vae(latent_format, torch.zeros(1, latent_channels(latent_format), 2, 2)).shape[1]
    if vae.latent_channels != channels:
        raise GuidanceError(
            f"The connected VAE decodes {vae.latent_channels} latent channels, but this model has {channels}. "
            "Connect the VAE that belongs to the model."
        )
    if vae.latent_dim != latent_format.latent_dimensions:
        raise GuidanceError(
            f"The connected VAE belongs to a {_kind(vae.latent_dim)} model, "
            f"but this is a {_kind(latent_format.latent_dimensions)} model. Connect the VAE that belongs to the model."
        )


SHAPES = ("TripoSplat", "Trellis")
"""First letters of latent formats of 3-D shapes. ComfyUI has Trellis 2 since version 0.33."""


def require_pictures(latent_format: LatentFormat) -> None:
    """Raise GuidanceError for a model of sound or of 3-D shapes.

    Some such models have latents with the dimensions of pictures: ACE-Step (its format has "audio" in its name) and
    those of SHAPES.
    """
    name = type(latent_format).__name__
    if latent_format.latent_dimensions not in (2, 3) or "audio" in name.lower() or name.startswith(SHAPES):
        raise GuidanceError(
            f"Rewards score pictures and videos, and this model makes neither (its latents are of the format {name})."
        )


def latent_channels(latent_format: LatentFormat) -> int:
    """The number of latent channels of the model's pictures or videos.

    A format of video with sound states the channels of its widest stream; its preview factors belong to the video.
    """
    factors = latent_format.latent_rgb_factors
    return (
        len(factors) if factors and latent_format.latent_rgb_factors_reshape is None else latent_format.latent_channels
    )


def _kind(latent_dimensions: int) -> str:
    return {2: "picture", 3: "video"}.get(latent_dimensions, f"{latent_dimensions}-dimensional")
