"""Models, rewards and decoders of the published sizes with random weights, made by the classes that load the real ones.

Reduced ones are of the same classes, with few and narrow layers, for machines without a GPU.
"""

import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import torch
from reward_guidance.guidance.rewards import CombinedReward, LoadOptions, Reward, loading
from reward_guidance.guidance.rewards.files import Weights
from reward_guidance.nodes.wiring.decoders import LatentRGB
from reward_guidance.nodes.wiring.tiny_decoders import TAESD
from reward_guidance.nodes.wiring.vae_decoder import Decoder, FullVAE
from reward_guidance.tests.standins import formats
from reward_guidance.tests.standins.published import PUBLISHED
from torch import Tensor, nn

DEVICE = comfy.model_management.get_torch_device()
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
PROMPT = "a large red circle on a blue ground"


@dataclass(frozen=True)
class Family:
    """A diffusion model that ComfyUI knows."""

    config: str
    """Its class in comfy.supported_models."""
    unet: dict[str, Any]
    reduced: dict[str, Any]
    """What is otherwise in the reduced one."""
    tokens: tuple[int, int]
    """Number and width of the text tokens that ComfyUI's encoders give."""
    pooled: int
    """Width of the pooled text; 0 where there is none."""
    cfg: float
    vae: Callable[[bool], formats.Shapes]
    """Of its weights, reduced or not; an encoder cannot be reduced."""
    parameters: int
    """Of the published one."""
    frames: int = 0
    """Of the latent of a video; 0 for pictures."""
    one_step: bool = False

    def shape(self, side: int, batch: int) -> tuple[int, ...]:
        """Of latents for pictures `side` pixels a side, or for videos of a shorter side of that, 16:9."""
        latent = side // 8
        return (
            (batch, 16, self.frames, latent, latent * 16 // 9 // 2 * 2)
            if self.frames
            else (batch, self.channels, latent, latent)
        )

    @property
    def channels(self) -> int:
        return self.unet.get("in_dim") or self.unet["in_channels"]


_UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "use_spatial_transformer": True,
    "legacy": False,
    "model_channels": 320,
}
_FLUX = formats.flux_sizes(3072, 19, 38) | {"context_in_dim": 4096}
KL4 = lambda reduced: formats.kl(4, width=32 if reduced else 128)  # noqa: E731
KL16 = lambda reduced: formats.kl(16, quantised=False, width=32 if reduced else 128)  # noqa: E731
WAN_VAE = lambda reduced: formats.wan_vae(16 if reduced else 96)  # noqa: E731
_FIRST_UNET = _UNET | {
    "num_res_blocks": [2, 2, 2, 2], "channel_mult": [1, 2, 4, 4], "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], "transformer_depth_middle": 1, "adm_in_channels": None,
    "use_temporal_attention": False,
}  # fmt: skip
"""Of SD1.5 and SD2, which differ in their text."""
_FIRST_UNET_REDUCED = {
    "num_res_blocks": [1, 1, 1, 1], "transformer_depth": [1, 1, 1, 0], "transformer_depth_output": [1, 1, 1, 1, 1, 1, 0, 0],
}  # fmt: skip
FAMILIES = {
    "SD1.5": Family(
        "SD15",
        _FIRST_UNET | {"context_dim": 768, "use_linear_in_transformer": False},
        _FIRST_UNET_REDUCED | {"model_channels": 32},
        (77, 768), 0, 7.0, KL4, 859_520_964,
    ),
    "SD-Turbo": Family(
        "SD20",
        _FIRST_UNET | {"context_dim": 1024, "use_linear_in_transformer": True},
        _FIRST_UNET_REDUCED | {"model_channels": 64},
        (77, 1024), 0, 1.0, KL4, 865_910_724, one_step=True,
    ),
    "SDXL": Family(
        "SDXL",
        _UNET | {
            "num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 4], "transformer_depth": [0, 0, 2, 2, 10, 10],
            "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "transformer_depth_middle": 10, "context_dim": 2048,
            "use_linear_in_transformer": True, "num_classes": "sequential", "adm_in_channels": 2816, "use_temporal_attention": False,
        },
        {
            "model_channels": 64, "num_res_blocks": [1, 1, 1], "transformer_depth": [0, 1, 2], "transformer_depth_output": [0, 0, 1, 1, 2, 2],
            "transformer_depth_middle": 2,
        },
        (77, 2048), 1280, 7.0, KL4, 2_567_463_684,
    ),
    "SD3.5-medium": Family(
        "SD3",
        {
            "in_channels": 16, "out_channels": 16, "patch_size": 2, "input_size": None, "depth": 24, "adm_in_channels": 2048, "qk_norm": "rms",
            "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 1536}},
            "num_patches": 384**2, "pos_embed_max_size": 384, "pos_embed_scaling_factor": None, "x_block_self_attn_layers": list(range(13)),
        },
        {
            "depth": 2, "num_patches": 64**2, "pos_embed_max_size": 64, "x_block_self_attn_layers": [0],
            "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 128}},
        },
        (154, 4096), 2048, 4.5, KL16, 2_243_171_520,
    ),
    "Flux-dev": Family(
        "Flux",
        {key: value for key, value in _FLUX.items() if key != "operations"},
        {"hidden_size": 256, "num_heads": 2, "depth": 1, "depth_single_blocks": 2},
        (256, 4096), 768, 1.0, KL16, 11_901_408_320,
    ),
    "Wan 1.3B": Family(
        "WAN21_T2V",
        {
            "image_model": "wan2.1", "model_type": "t2v", "in_dim": 16, "out_dim": 16, "dim": 1536, "ffn_dim": 8960, "num_heads": 12,
            "num_layers": 30, "text_dim": 4096,
        },
        {"dim": 128, "ffn_dim": 512, "num_heads": 1, "num_layers": 2},
        (512, 4096), 0, 6.0, WAN_VAE, 1_418_996_800, frames=21,
    ),
}  # fmt: skip


def base_model(family: Family, reduced: bool, device: torch.device = DEVICE):
    """comfy.model_base.BaseModel, its weights not yet set."""
    unet = family.unet | (family.reduced if reduced else {})
    config = getattr(comfy.supported_models, family.config)
    if not reduced and not config.matches(unet):
        raise ValueError(f"ComfyUI does not recognise {family.config}")
    made = config(unet)
    made.set_inference_dtype(DTYPE, None)
    return made.get_model({}, device=device)


def model(family: Family, reduced: bool) -> comfy.model_patcher.ModelPatcher:
    """A MODEL that stays on its device."""
    network = base_model(family, reduced).to(DEVICE)
    randomise(network.diffusion_model)
    return comfy.model_patcher.ModelPatcher(network, DEVICE, DEVICE)


@torch.no_grad()
def randomise(module: nn.Module) -> None:
    """Numbers that keep activations from growing through many layers; what is one-dimensional is a scale or a bias."""
    for name, tensor in (
        *module.named_parameters(),
        *((name, buffer) for name, buffer in module.named_buffers() if name.endswith("pos_embed")),
    ):
        fill(name, tensor)


def fill(name: str, tensor: Tensor) -> Tensor:
    if tensor.ndim > 1:
        return tensor.normal_(0, 0.5 * tensor[0].numel() ** -0.5)
    return tensor.fill_(1 if name.endswith(("weight", "scale", "gamma", "g")) or tensor.ndim == 0 else 0)


def conditioning(family: Family) -> list:
    """As a text encoder would give it."""
    pooled = {"pooled_output": torch.randn(1, family.pooled)} if family.pooled else {}
    return [[torch.randn(1, *family.tokens), pooled]]


# --- rewards


def reward(name: str, reduced: bool) -> Reward:
    """One of REWARDS: a published layout, loaded as its file would be."""
    return REWARDS[name](reduced)


def published(layout: str, kind: str | None, reduced: bool) -> Reward:
    shapes = {key: shape for key, shape in PUBLISHED[layout].shapes.items() if not (reduced and is_deep(key))}
    state = {key: number(key, [narrow(side) for side in shape] if reduced else shape) for key, shape in shapes.items()}
    with tempfile.TemporaryDirectory() as folder:
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{i}" for i in range(30522 - 5))]
        Path(folder, "vocab.txt").write_text("\n".join(words))
        return loading.build_reward(Weights(Path(folder, f"{layout}.safetensors"), state), LoadOptions(kind=kind))


def number(key: str, shape: list[int]) -> Tensor:
    """Logits are scaled by e^4.6 = 100, positions are whole numbers."""
    if key == "logit_scale":
        return torch.tensor(4.6052)
    if key.endswith("position_ids"):
        return torch.arange(shape[-1])[None]
    return fill(key, torch.empty(shape, dtype=DTYPE, device=DEVICE))


def is_deep(key: str) -> bool:
    """Whether it belongs to a layer after the second of a tower."""
    layer = re.search(r"(?:resblocks|layers|blocks|layer)\.(\d+)\.(?!weight|bias)", key)
    return layer is not None and int(layer[1]) >= 2


def narrow(side: int) -> int:
    return side // 16 if side in (768, 1024, 1280, 3072, 3840, 4096, 5120) else side


def ensemble(reduced: bool) -> Reward:
    parts = [
        published("HPS", "HPS v2.1", reduced),
        published("PickScore", "PickScore", reduced),
        published("ImageReward", None, reduced),
    ]
    return CombinedReward([*parts, published("HPS", "CLIP score", reduced)], [5.0, 1.0, 0.05, 0.01])


REWARDS: dict[str, Callable[[bool], Reward]] = {
    "PickScore": partial(published, "PickScore", "PickScore"),
    "ensemble": ensemble,
}
"""The ensemble is HPS v2.1, PickScore, ImageReward and CLIP."""


# --- decoders


def decoder(name: str, family: Family, reduced: bool, latent_format) -> Decoder:
    if name == "latent_rgb":
        return LatentRGB(latent_format)
    if name == "vae":
        return FullVAE(latent_format, vae(family, reduced))
    with tempfile.TemporaryDirectory() as folder:
        file = next(file for file in formats.STANDINS if Path(file).name.startswith(latent_format.taesd_decoder_name))
        formats.write(formats.make(file), Path(folder, "taesd.safetensors"))
        return TAESD(latent_format, str(Path(folder, "taesd.safetensors")))


def vae(family: Family, reduced: bool) -> comfy.sd.VAE:
    weights = {key: fill(key, torch.empty(shape)) for key, shape in family.vae(reduced).items()}
    return comfy.sd.VAE(sd=weights)
