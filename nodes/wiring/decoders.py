"""From denoised latents to pixels that a reward can see, differentiably."""

import copy
import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
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
from comfy.ldm.modules.diffusionmodules.model import AttnBlock, ResnetBlock
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ...guidance.errors import GuidanceError, pass_out_of_memory
from .autograd import static_clone

DECODERS = ("auto", "taesd", "vae", "latent_rgb")
SHORTEST = 512
"""Pixels of the shorter side that are decoded at least: more than twice what the rewards' towers look at, 224."""
HALVINGS = 2
"""How often the size of a picture is halved at most."""
TINY_VIDEO_NUMBERS = 375
"""Rough count of numbers that the graph of a video model's tiny autoencoder keeps, per frame that it makes and pixel before its pixel shuffle."""
OTHER_SCALE = {"taesdxl_decoder": comfy.latent_formats.SDXL}
"""Tiny autoencoders that serve a second latent format -> the format in whose scale they take latents."""


class Decoder:
    """Model-space latents (N,C,H,W) -> pixels (N,3,h,w), about [0,1] and never clamped: a clamp has no gradient.

    They are on the latents' device, and the same each time: nothing is drawn from a global generator.
    """

    name: str
    modules: tuple[nn.Module, ...] = ()
    video = False
    """Whether latents are frames of videos."""
    upscale: int
    """How many times wider the pixels are than the latents."""
    bytes_per_pixel = 0
    """Rough activation memory of decoding with a graph, per pixel."""

    def pixels(self, latents: Tensor) -> Tensor:
        raise NotImplementedError

    def halvings(self, height: int, width: int) -> int:
        """How often a picture is halved, of a latent of that size."""
        return 0

    def activation_bytes(self, height: int, width: int) -> int:
        """Rough memory of decoding a latent of that size with a graph."""
        return self.bytes_per_pixel * height * width * self.upscale**2


def for_vae(latent_format: LatentFormat, latents: Tensor) -> Tensor:
    """Model-space latents (N,C,H,W) -> what VAE Decode takes: (N,C,H,W), or (N,C,1,H,W) of a video model."""
    return latent_format.process_out(latents.unsqueeze(2) if latent_format.latent_dimensions == 3 else latents)


class LatentRGB(Decoder):
    """The latent format's linear preview factors: free, at about the latent's resolution."""

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


class TAESD(Decoder):
    """The tiny autoencoder of a picture model from models/vae_approx: close to the VAE at a fraction of the cost.

    A picture whose half has a shorter side of at least SHORTEST is decoded at half its size; one of twice that size, at a quarter.
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
        """In proportion to the arithmetic that is left."""
        return int(super().activation_bytes(height, width) * (1, 0.6, 0.25)[self.halvings(height, width)])


def _picture_taesd(path: str, channels: int) -> tuple[nn.ModuleList, int]:
    """For every size to decode to, in the precision that ComfyUI decodes in on this device; and the upscaling of the first, the whole size."""
    dtype = comfy.model_management.vae_dtype(comfy.model_management.get_torch_device(), [torch.bfloat16, torch.float32])
    tiny = comfy.taesd.taesd.TAESD(None, path, channels)
    del tiny.taesd_encoder
    with torch.no_grad():
        pixel = tiny.decode(torch.zeros(1, channels, 1, 1))
    last = list(tiny.taesd_decoder.modules())[-1]
    # Behind a pixel shuffle, the last kernel's channels are pixels beside each other: what halves kernels does not hold for it.
    most = HALVINGS if isinstance(last, nn.Conv2d) and last.out_channels == pixel.shape[1] else 0
    return nn.ModuleList(coarser(tiny, halvings) for halvings in range(most + 1)).to(dtype), pixel.shape[-1]


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


class FullVAE(Decoder):
    """The connected VAE itself: exact, slow, and with the memory of a graph through it."""

    name = "vae"
    module: Any

    def __init__(self, latent_format: LatentFormat, vae: comfy.sd.VAE):
        check_belongs(vae, latent_format)
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
            self.prepare_tiny()

    def prepare_tiny(self) -> None:
        """For the tiny autoencoder of a video model, which may also be connected as a VAE."""
        module, weight = self.module, next(self.module.parameters())
        module.show_progress_bar = False
        module.parallel = True  # frame by frame, it detaches its memory of past frames from the graph
        self.bytes_per_pixel = TINY_VIDEO_NUMBERS * module.t_upscale * weight.element_size() // module.patch_size**2
        with torch.no_grad():
            self.upscale = module.decode(weight.new_zeros(1, module.latent_channels, 1, 1, 1)).shape[-1]

    def pixels(self, latents: Tensor) -> Tensor:
        shown = for_vae(self.latent_format, latents).to(self.dtype)
        pixels = torch.cat([self.decode(some) for some in decodable(self.module, shown)])
        return pixels.to(latents.device).float() * self.scale + self.offset

    def decode(self, latents: Tensor) -> Tensor:
        """What the module makes of latents as VAE Decode takes them, (N,3,h,w)."""
        module, options = self.module, {}
        if getattr(module, "comfy_has_chunked_io", False):
            options["output_buffer"] = latents.new_empty(module.decode_output_shape(latents.shape))
        with same_draws(latents.device):
            pixels = module.decode(latents, **options)
        return (pixels[:, :, -1] if pixels.ndim == 5 else pixels)[:, :3]


def decodable(module: nn.Module | None, latents: Tensor) -> tuple[Tensor, ...]:
    """Latents (N,...) in parts that a VAE's module decodes at once: LTXV's with timestep conditioning takes one video at a time."""
    return latents.split(1 if getattr(module, "timestep_conditioning", False) else max(1, len(latents)))


class TinyVideo(FullVAE):
    """The tiny autoencoder of a video model from models/vae_approx, which ComfyUI loads as a VAE."""

    name = "taesd"

    def __init__(self, latent_format: LatentFormat, path: str):
        super().__init__(latent_format, comfy.sd.VAE(sd=comfy.utils.load_torch_file(path, safe_load=True)))
        if not isinstance(self.module, comfy.taesd.taehv.TAEHV):
            raise ValueError("not a tiny autoencoder of videos")
        hunyuan = comfy.latent_formats.HunyuanVideo
        if latent_format.latent_channels == hunyuan.latent_channels:
            # HunyuanVideo's file takes latents of the model's scale. It has the same layout as Wan's, and ComfyUI takes every file in
            # float16 for it and no other; the model knows better which of them its file is.
            self.module.process_in = hunyuan().process_in if isinstance(latent_format, hunyuan) else _unchanged


def _unchanged(latents: Tensor) -> Tensor:
    return latents


@contextmanager
def same_draws(device: torch.device) -> Iterator[None]:
    """Inside, the device's global generator draws the same each time, as for the noise of LTXV's VAE; outside, it goes on undisturbed."""
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


def check_belongs(vae: comfy.sd.VAE, latent_format: LatentFormat) -> None:
    """Raise GuidanceError if the VAE decodes other latents than the model makes, or the model makes neither pictures nor videos."""
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
            f"The connected VAE belongs to a {_kind(vae.latent_dim)} model, but this is a {_kind(latent_format.latent_dimensions)} model. "
            "Connect the VAE that belongs to the model."
        )


def require_pictures(latent_format: LatentFormat) -> None:
    """Raise GuidanceError for a model of sound or of 3-D shapes.

    Two of them have latents as if of pictures: ACE-Step, whose format is named for sound as all of its kind, and TripoSplat.
    """
    name = type(latent_format).__name__
    if latent_format.latent_dimensions not in (2, 3) or "audio" in name.lower() or name == "TripoSplat":
        raise GuidanceError(
            f"Rewards score pictures and videos, and this model makes neither (its latents are of the format {name})."
        )


def latent_channels(latent_format: LatentFormat) -> int:
    """Those of the model's pictures or videos. A format of video with sound states those of its widest stream; its preview is of the video."""
    factors = latent_format.latent_rgb_factors
    return (
        len(factors) if factors and latent_format.latent_rgb_factors_reshape is None else latent_format.latent_channels
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
        module = static_clone(vae.patcher, "The decoder vae", "another decoder").model
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
def make_decoder(choice: str, latent_format: LatentFormat, vae: comfy.sd.VAE | None) -> Decoder:
    """The chosen decoder for a latent format. `auto` takes the tiny autoencoder if its file is there, else the VAE, else latent_rgb."""
    require_pictures(latent_format)
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
            advice = (
                f"Put {name}.safetensors into models/vae_approx"
                if name
                else "There is no tiny autoencoder for this model"
            )
            raise GuidanceError(f"{advice}, or choose another decoder.")
        return _tiny_decoder(latent_format, path)
    if latent_format.latent_rgb_factors is None:
        raise GuidanceError(
            "This model has no linear preview to decode by. Connect a VAE and choose the decoder 'vae'."
        )
    return LatentRGB(latent_format)


def _tiny_decoder(latent_format: LatentFormat, path: str) -> Decoder:
    try:
        return (TinyVideo if latent_format.latent_dimensions == 3 else TAESD)(latent_format, path)
    except Exception as error:
        pass_out_of_memory(error, f"loading {os.path.basename(path)}")
        raise GuidanceError(
            f"{os.path.basename(path)} is not a tiny autoencoder for this model's {latent_format.latent_channels} latent channels. "
            "Replace the file in models/vae_approx, or choose another decoder."
        ) from error


def _taesd_path(latent_format: LatentFormat) -> str | None:
    name = latent_format.taesd_decoder_name
    if name is None:
        return None
    files = [file for file in folder_paths.get_filename_list("vae_approx") if file.startswith(name)]
    return folder_paths.get_full_path("vae_approx", files[0]) if files else None
