"""Decodes latents by tiny autoencoders from models/vae_approx, and large pictures at a reduced size."""

import copy
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
from comfy.latent_formats import LatentFormat
from torch import Tensor, nn

from ...guidance.errors import GuidanceError, pass_out_of_memory
from .vae_decoder import Decoder, FullVAE, for_vae

SHORTEST = 512
"""Pixels: the shorter side is decoded at least at this size. The rewards' image towers read 224."""
HALVINGS = 2
"""How often the size of a picture is halved at most."""
OTHER_SCALE = {"taesdxl_decoder": comfy.latent_formats.SDXL}
"""Tiny autoencoders that serve a second latent format -> the format in whose scale they take latents."""


class TAESD(Decoder):
    """The tiny autoencoder of an image model: close to the VAE at a fraction of the cost.

    A picture is decoded at half its size if the shorter side then still has SHORTEST pixels, or at a quarter likewise.
    """

    name = "taesd"
    module: Any
    bytes_per_pixel = 3000

    def __init__(self, latent_format: LatentFormat, path: str):
        made_for = OTHER_SCALE.get(latent_format.taesd_decoder_name)
        self.latent_format = latent_format
        self.made_for = None if made_for is None or isinstance(latent_format, made_for) else made_for()
        self.module, self.upscale = _picture_taesd(path, latent_format.latent_channels)
        self.modules = (self.module.eval().requires_grad_(False),)

    def pixels(self, latents: Tensor) -> Tensor:
        if self.made_for is not None:
            latents = self.made_for.process_in(for_vae(self.latent_format, latents))
        latents = latents.to(next(self.module.parameters()).dtype)
        return (self.module[self.halvings(*latents.shape[-2:])].decode(latents)[:, :3].float() + 1) / 2

    def halvings(self, height: int, width: int) -> int:
        sizes = [self.upscale * min(height, width) >> n for n in range(1, len(self.module))]
        return sum(size >= SHORTEST for size in sizes)

    def activation_bytes(self, height: int, width: int) -> int:
        """Less for a reduced size, in proportion to the arithmetic."""
        return int(super().activation_bytes(height, width) * (1, 0.6, 0.25)[self.halvings(height, width)])


def _picture_taesd(path: str, channels: int) -> tuple[nn.ModuleList, int]:
    """A decoder for each size, the full size first, and the upscaling of the full size.

    Precision: ComfyUI's for VAEs.
    """
    dtype = comfy.model_management.vae_dtype(comfy.model_management.get_torch_device(), [torch.bfloat16, torch.float32])
    tiny = comfy.taesd.taesd.TAESD(None, path, channels)
    del tiny.taesd_encoder
    with torch.no_grad():
        pixel = tiny.decode(torch.zeros(1, channels, 1, 1))
    last = list(tiny.taesd_decoder.modules())[-1]
    # Before a pixel shuffle, the output channels are neighbouring pixels, for which `halved` does not hold.
    most = HALVINGS if isinstance(last, nn.Conv2d) and last.out_channels == pixel.shape[1] else 0
    return nn.ModuleList(coarser(tiny, halvings) for halvings in range(most + 1)).to(dtype), pixel.shape[-1]


def coarser(tiny: comfy.taesd.taesd.TAESD, halvings: int) -> nn.Module:
    """A copy without the last upsamplings, which decodes the same latent at a fraction of the size."""
    copied, removed = copy.deepcopy(tiny), 0
    layers = copied.taesd_decoder
    upsamplings = [i for i, layer in enumerate(layers) if isinstance(layer, nn.Upsample)]
    for i in range(upsamplings[-halvings] if halvings else len(layers), len(layers)):
        if i in upsamplings:
            layers[i] = nn.Identity()
            removed += 1
        for conv in layers[i].modules():
            if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3):
                conv.weight.data = halved(conv.weight.data, removed)
    return copied


def halved(kernel: Tensor, times: int) -> Tensor:
    """3x3 kernels (O,I,3,3) for a picture whose size is halved `times` times.

    An upsampling repeats each value of a row, so a kernel (a, b, c) after it gives two outputs for each value. Their
    mean is the output of (a/2, a/2 + b + c/2, c/2) without the upsampling. Exact up to the next ReLU.
    """
    fold = torch.tensor([[0.5, 0, 0], [0.5, 1, 0.5], [0, 0, 0.5]]).to(kernel).matrix_power(times)
    return fold @ kernel @ fold.T


class TinyVideo(FullVAE):
    """The tiny autoencoder of a video model, which ComfyUI loads as a VAE."""

    name = "taesd"

    def __init__(self, latent_format: LatentFormat, path: str):
        super().__init__(latent_format, comfy.sd.VAE(sd=comfy.utils.load_torch_file(path, safe_load=True)))
        if not isinstance(self.module, comfy.taesd.taehv.TAEHV):
            raise ValueError("not a tiny autoencoder of videos")
        hunyuan = comfy.latent_formats.HunyuanVideo
        if latent_format.latent_channels == hunyuan.latent_channels:
            # HunyuanVideo's file takes latents in the model's scale. It has the layout of Wan's file, and ComfyUI tells
            # the two apart by the precision float16 alone. The model's latent format is the safer sign.
            self.module.process_in = hunyuan().process_in if isinstance(latent_format, hunyuan) else _unchanged


def _unchanged(latents: Tensor) -> Tensor:
    return latents


def tiny_decoder(latent_format: LatentFormat, path: str) -> Decoder:
    """Load a tiny autoencoder. Raises GuidanceError if the file is none for this model."""
    try:
        return (TinyVideo if latent_format.latent_dimensions == 3 else TAESD)(latent_format, path)
    except Exception as error:
        pass_out_of_memory(error, f"loading {os.path.basename(path)}")
        raise GuidanceError(
            f"{os.path.basename(path)} is not a tiny autoencoder for this model's {latent_format.latent_channels} "
            "latent channels. Replace the file in models/vae_approx, or choose another decoder."
        ) from error


def taesd_path(latent_format: LatentFormat) -> str | None:
    """The file of the model's tiny autoencoder in models/vae_approx, or None."""
    name = latent_format.taesd_decoder_name
    if name is None:
        return None
    files = [file for file in folder_paths.get_filename_list("vae_approx") if file.startswith(name)]
    return folder_paths.get_full_path("vae_approx", files[0]) if files else None
