"""From denoised latents to pixels that a reward can see, differentiably."""

import copy
import functools
import os
from typing import Any

import comfy.latent_formats
import comfy.model_management
import comfy.sd
import comfy.taesd.taehv
import comfy.taesd.taesd
import comfy.utils
import folder_paths
import torch
from comfy.ldm.modules.diffusionmodules.model import AttnBlock, ResnetBlock
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..guidance.errors import GuidanceError

DECODERS = ("auto", "taesd", "vae", "latent_rgb")
SHORTEST = 512
"""Pixels of the shorter side that are decoded at least: more than twice what the rewards' towers look at, 224."""
HALVINGS = 2
"""How often the size of a picture is halved at most."""


class Decoder:
    """Model-space latents (N,C,H,W) -> pixels (N,3,h,w), about [0,1] and never clamped: a clamp has no gradient."""

    name: str
    modules: tuple[nn.Module, ...] = ()
    upscale = 8
    bytes_per_pixel = 0
    """Rough activation memory of decoding with a graph, per pixel."""

    def pixels(self, latents: Tensor) -> Tensor:
        raise NotImplementedError

    def activation_bytes(self, height: int, width: int) -> int:
        """Rough memory of decoding a latent of that size with a graph."""
        return self.bytes_per_pixel * height * width * self.upscale**2


class LatentRGB(Decoder):
    """The latent format's linear preview factors: free, at the latent's resolution."""

    name = "latent_rgb"
    upscale = 1
    bytes_per_pixel = 256

    def __init__(self, latent_format: comfy.latent_formats.LatentFormat):
        self.reshape = latent_format.latent_rgb_factors_reshape
        self.weight = torch.tensor(latent_format.latent_rgb_factors).T
        bias = latent_format.latent_rgb_factors_bias
        self.bias = None if bias is None else torch.tensor(bias)

    def pixels(self, latents: Tensor) -> Tensor:
        latents = self.reshape(latents) if self.reshape is not None else latents
        bias = None if self.bias is None else self.bias.to(latents, non_blocking=True)
        return (F.linear(latents.movedim(1, -1), self.weight.to(latents, non_blocking=True), bias).movedim(-1, 1) + 1) / 2


class TAESD(Decoder):
    """The tiny autoencoder of the latent format from models/vae_approx: close to the VAE at a fraction of the cost.

    A picture whose half has a shorter side of at least SHORTEST is decoded at half its size; one of twice that size, at a quarter.
    """

    name = "taesd"
    module: Any
    bytes_per_pixel = 3000

    def __init__(self, latent_format: comfy.latent_formats.LatentFormat, path: str):
        self.video = latent_format.latent_dimensions == 3
        try:
            self.module = (_video_taesd if self.video else _picture_taesd)(path, latent_format.latent_channels)
        except Exception as error:
            raise GuidanceError(
                f"{os.path.basename(path)} is not a tiny autoencoder for this model's {latent_format.latent_channels} latent channels. "
                "Replace the file in models/vae_approx, or choose another decoder."
            ) from error
        self.modules = (self.module.eval().requires_grad_(False),)

    def pixels(self, latents: Tensor) -> Tensor:
        latents = latents.to(next(self.module.parameters()).dtype)
        if self.video:
            return self.module.decode(latents.unsqueeze(2)).to(latents.device).float()[:, :, -1]
        return (self.module[self.halvings(*latents.shape[-2:])].decode(latents).float() + 1) / 2

    def halvings(self, height: int, width: int) -> int:
        """How often a picture is halved, of a latent of that size."""
        sizes = [self.upscale * min(height, width) >> n for n in range(1, HALVINGS + 1)]
        return 0 if self.video else sum(size >= SHORTEST for size in sizes)

    def activation_bytes(self, height: int, width: int) -> int:
        """In proportion to the arithmetic that is left."""
        return int(super().activation_bytes(height, width) * (1, 0.6, 0.25)[self.halvings(height, width)])


def _picture_taesd(path: str, channels: int) -> nn.Module:
    """For every size to decode to, in the precision that ComfyUI decodes in on this device."""
    dtype = comfy.model_management.vae_dtype(comfy.model_management.get_torch_device(), [torch.bfloat16, torch.float32])
    tiny = comfy.taesd.taesd.TAESD(None, path, channels)
    del tiny.taesd_encoder
    return nn.ModuleList(coarser(tiny, halvings) for halvings in range(HALVINGS + 1)).to(dtype)


def coarser(tiny: comfy.taesd.taesd.TAESD, halvings: int) -> nn.Module:
    """A copy without the last upsamplings: of a fraction of the size, from the whole latent."""
    made, left_out = copy.deepcopy(tiny), 0
    layers = made.taesd_decoder
    upsamplings = [i for i, layer in enumerate(layers) if isinstance(layer, nn.Upsample)]
    for i in range(upsamplings[-halvings] if halvings else len(layers), len(layers)):
        if i in upsamplings:
            layers[i] = nn.Identity()
            left_out += 1
        for conv in layers[i].modules():
            if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3):
                conv.weight.data = halved(conv.weight.data, left_out)
    return made


def halved(kernel: Tensor, times: int) -> Tensor:
    """3x3 kernels (O,I,3,3) for pictures of half the size, so many times over.

    Behind an upsampling, which repeats each value of a row, a kernel (a, b, c) makes two values of each. Their mean is what
    (a/2, a/2 + b + c/2, c/2) makes of the row as it was. Exact up to the next ReLU.
    """
    fold = torch.tensor([[0.5, 0, 0], [0.5, 1, 0.5], [0, 0, 0.5]]).to(kernel).matrix_power(times)
    return fold @ kernel @ fold.T


def _video_taesd(path: str, channels: int) -> nn.Module:
    vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(path, safe_load=True))
    if not isinstance(vae.first_stage_model, comfy.taesd.taehv.TAEHV) or vae.latent_channels != channels:
        raise ValueError("not a tiny autoencoder of videos, or of others")
    vae.first_stage_model.show_progress_bar = False
    vae.first_stage_model.parallel = True  # frame by frame, it detaches its memory of past frames from the graph
    return vae.first_stage_model


class FullVAE(Decoder):
    """The connected VAE itself: exact, slow, and with the memory of a graph through it."""

    name = "vae"
    module: Any

    def __init__(self, latent_format: comfy.latent_formats.LatentFormat, vae: comfy.sd.VAE):
        check_belongs(vae, latent_format)
        self.latent_format = latent_format
        self.video = vae.latent_dim == 3
        self.dtype = vae.vae_dtype
        self.scale, self.offset = _affine(vae.process_output)
        self.upscale = vae.spacial_compression_decode()
        self.bytes_per_pixel = 2 * vae.memory_used_decode((1, 1, 1, 1), self.dtype) // self.upscale**2 if not self.video else 100_000
        self.module = checkpointed(_private_copy(vae))
        self.modules = (self.module,)

    def pixels(self, latents: Tensor) -> Tensor:
        latents = self.latent_format.process_out(latents.unsqueeze(2) if self.video else latents)
        pixels = self.module.decode(latents.to(self.dtype)).float()
        return (pixels[:, :, -1] if pixels.ndim == 5 else pixels) * self.scale + self.offset


def check_belongs(vae: comfy.sd.VAE, latent_format: comfy.latent_formats.LatentFormat) -> None:
    """Raise GuidanceError if the VAE decodes other latents than the model makes."""
    vae.throw_exception_if_invalid()
    if vae.latent_channels != latent_format.latent_channels:
        raise GuidanceError(
            f"The connected VAE decodes {vae.latent_channels} latent channels, but this model has {latent_format.latent_channels}. "
            "Connect the VAE that belongs to the model."
        )
    if vae.latent_dim != latent_format.latent_dimensions:
        raise GuidanceError(
            f"The connected VAE belongs to a {_kind(vae.latent_dim)} model, but this is a {_kind(latent_format.latent_dimensions)} model. "
            "Connect the VAE that belongs to the model."
        )


def _kind(latent_dimensions: int) -> str:
    return {2: "picture", 3: "video"}.get(latent_dimensions, f"{latent_dimensions}-dimensional")


def _affine(process_output) -> tuple[float, float]:
    """VAEs end in an affine map and a clamp; read the map off two points inside the clamp."""
    low, high = process_output(torch.tensor([0.25, 0.5])).tolist()
    scale = (high - low) / 0.25
    return scale, high - 0.5 * scale


def _private_copy(vae: comfy.sd.VAE) -> nn.Module:
    """Weights of our own: the VAE's may be partly offloaded or staged while gradients flow."""
    if vae.patcher.is_dynamic():
        module = vae.patcher.clone(disable_dynamic=True).model
    else:
        module = copy.deepcopy(vae.first_stage_model)
    return module.eval().requires_grad_(False)


def checkpointed(module: nn.Module) -> nn.Module:
    """Keep only the blocks' inputs for the backward pass, and compute the rest again."""
    for block in module.modules():
        if isinstance(block, (ResnetBlock, AttnBlock)):
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    return module


@torch.inference_mode(False)
def make_decoder(choice: str, latent_format: comfy.latent_formats.LatentFormat, vae: comfy.sd.VAE | None) -> Decoder:
    """The chosen decoder for a latent format. `auto` takes the tiny autoencoder if its file is there, else the VAE, else latent_rgb."""
    latent_format = copy.deepcopy(latent_format)  # its tensors were made in inference mode
    path = _taesd_path(latent_format)
    if choice == "auto":
        choice = "taesd" if path else "vae" if vae is not None else "latent_rgb"
    if choice == "vae":
        if vae is None:
            raise GuidanceError("The decoder 'vae' needs a VAE: connect one to the vae input.")
        return FullVAE(latent_format, vae)
    if choice == "taesd":
        if path is None:
            name = latent_format.taesd_decoder_name
            advice = f"Put {name}.safetensors into models/vae_approx" if name else "There is no tiny autoencoder for this model"
            raise GuidanceError(f"{advice}, or choose another decoder.")
        return TAESD(latent_format, path)
    if latent_format.latent_rgb_factors is None:
        raise GuidanceError("This model has no linear preview to decode by. Connect a VAE and choose the decoder 'vae'.")
    return LatentRGB(latent_format)


def _taesd_path(latent_format: comfy.latent_formats.LatentFormat) -> str | None:
    name = latent_format.taesd_decoder_name
    if name is None:
        return None
    files = [file for file in folder_paths.get_filename_list("vae_approx") if file.startswith(name)]
    return folder_paths.get_full_path("vae_approx", files[0]) if files else None
