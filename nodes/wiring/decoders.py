"""Chooses the decoder from denoised latents to the pixels that a reward scores, with gradients."""

import copy

import comfy.sd
import torch
from comfy.latent_formats import LatentFormat
from torch import Tensor
from torch.nn import functional as F

from ...guidance.errors import GuidanceError
from .tiny_decoders import taesd_path, tiny_decoder
from .vae_decoder import Decoder, FullVAE, latent_channels, require_pictures

DECODERS = ("auto", "taesd", "vae", "latent_rgb")


class LatentRGB(Decoder):
    """The linear preview of the latent format: costs nothing, about the resolution of the latent."""

    name = "latent_rgb"
    bytes_per_pixel = 256

    def __init__(self, latent_format: LatentFormat):
        self.reshape = latent_format.latent_rgb_factors_reshape
        self.weight = torch.tensor(latent_format.latent_rgb_factors).T
        bias = latent_format.latent_rgb_factors_bias
        self.bias = None if bias is None else torch.tensor(bias)
        self.upscale = self.pixels(torch.zeros(1, latent_channels(latent_format), 1, 1)).shape[-1]

    def pixels(self, latents: Tensor) -> Tensor:
        latents = self.reshape(latents) if self.reshape is not None else latents
        bias = None if self.bias is None else self.bias.to(latents, non_blocking=True)
        return (
            F.linear(latents.movedim(1, -1), self.weight.to(latents, non_blocking=True), bias).movedim(-1, 1) + 1
        ) / 2


@torch.inference_mode(False)
def make_decoder(choice: str, latent_format: LatentFormat, vae: comfy.sd.VAE | None) -> Decoder:
    """The chosen decoder for a latent format.

    `auto` takes the tiny autoencoder if its file exists, else the VAE, else latent_rgb.
    Raises GuidanceError if the choice lacks its file or its VAE, or does not suit the model.
    """
    require_pictures(latent_format)
    latent_format = copy.deepcopy(latent_format)  # replaces its inference tensors by normal ones
    path = taesd_path(latent_format)
    if choice == "auto":
        choice = "taesd" if path else "vae" if vae is not None else "latent_rgb"
    if choice == "vae":
        if vae is None:
            raise GuidanceError("The decoder 'vae' needs a VAE: connect one to the vae input.")
        return FullVAE(latent_format, vae)
    if choice == "taesd":
        if path is None:
            name = latent_format.taesd_decoder_name
            put = f"Put {name}.safetensors into models/vae_approx"
            advice = put if name else "There is no tiny autoencoder for this model"
            raise GuidanceError(f"{advice}, or choose another decoder.")
        return tiny_decoder(latent_format, path)
    if latent_format.latent_rgb_factors is None:
        raise GuidanceError(
            "This model has no linear preview to decode by. Connect a VAE and choose the decoder 'vae'."
        )
    return LatentRGB(latent_format)
