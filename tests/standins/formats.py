"""Small random checkpoints in the real file formats, accepted by ComfyUI's own loaders.

    python tests/standins/formats.py COMFYUI_DIR MODELS_DIR [name ...]

Shapes are read off ComfyUI's classes, built on the meta device. Where a format fixes the size (a text encoder, a VAE's encoder), every
large tensor of a .ckpt or .pt is a strided view into a small pool of random numbers, and torch.save stores the pool once: 400 million
parameters in 4 MB. A safetensors file cannot share storage; there the networks themselves are small.

Random networks draw noise. They show that a path runs, not that it draws well; the trained stand-in is shapesworld/.
"""

import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

Shapes = dict[str, torch.Size]

SD15, SD2, SD3 = (
    "checkpoints/v1-5-pruned-emaonly.ckpt",
    "checkpoints/v2-1_512-ema-pruned.ckpt",
    "checkpoints/tiny_sd3.ckpt",
)
SDXL = "checkpoints/tiny_sdxl.ckpt"
FLUX, LARGE_FLUX = "diffusion_models/flux1-dev.safetensors", "diffusion_models/tiny_flux_512.safetensors"
WAN, WAN_VAE = "diffusion_models/wan2.1_t2v_1.3B_fp16.safetensors", "vae/wan_2.1_vae.safetensors"
CLIP_L, KL4, KL16 = "text_encoders/tiny_clip_l.pt", "vae/vae-ft-mse-840000-ema-pruned.ckpt", "vae/ae.safetensors"
TAESDS = {"taesd": 4, "taesdxl": 4, "taesd3": 16, "taef1": 16}
"""Tiny autoencoders and their latent channels; each is a file vae_approx/<name>_encoder and one _decoder."""
CONTROLNET, FLUX_CONTROLNET = (
    "controlnet/control_v11p_sd15_canny.pth",
    "controlnet/flux-canny-controlnet-v3.safetensors",
)
FLUX_LORA = "loras/FLUX-dev-lora-add_details.safetensors"
HPS = "reward_models/HPS_v2.1_compressed.pt"
TAEW = "vae_approx/lighttaew2_1.safetensors"

POOL = 1 << 18
FEW = 4096
"""A tensor of at most so many numbers is stored as it is."""


class Random:
    """Deterministic random tensors; the strided ones share one pool for each power-of-two scale."""

    def __init__(self, seed: int, dtype: torch.dtype, strided: bool):
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype, self.strided = dtype, strided
        self.pools: dict[float, Tensor] = {}

    def normal(self, shape: torch.Size, scale: float) -> Tensor:
        if not self.strided or shape.numel() <= FEW:
            return (torch.randn(shape, generator=self.generator) * scale).to(self.dtype)
        return self.view(self.pool(2.0 ** round(math.log2(scale))), shape)

    def pool(self, scale: float) -> Tensor:
        if scale not in self.pools:
            self.pools[scale] = (torch.randn(POOL, generator=self.generator) * scale).to(self.dtype)
        return self.pools[scale]

    def view(self, pool: Tensor, shape: torch.Size) -> Tensor:
        """Rows that overlap but are not alike: each starts a stride after the one before it, somewhere in the pool."""
        row = shape[1:].numel()
        stride = (POOL - row) // shape[0]
        start = int(torch.randint(POOL - row - stride * (shape[0] - 1), (1,), generator=self.generator))
        inner = torch.empty(shape[1:], device="meta").stride()
        return torch.as_strided(pool, shape, (stride, *inner), start)

    def initial(self, name: str, shape: torch.Size) -> Tensor:
        """Values of a sensible size for a parameter of this name."""
        if name.endswith("position_ids"):
            return torch.arange(shape[-1]).reshape(shape)
        if name.endswith(("gamma", "scale")) or (len(shape) == 1 and name.endswith("weight")) or not shape:
            return torch.ones(shape, dtype=self.dtype)
        if len(shape) == 1:
            return torch.zeros(shape, dtype=self.dtype)
        if "embedding" in name:
            return self.normal(shape, 0.5 if "token" in name else 0.06)
        return self.normal(shape, shape[1:].numel() ** -0.5)


def shapes(build: Callable[[], nn.Module]) -> Shapes:
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in build().state_dict().items()}


def under(prefix: str, part: Shapes) -> Shapes:
    return {prefix + name: shape for name, shape in part.items()}


def unet(context: int, **options) -> Shapes:
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    fixed = {"out_channels": 4, "transformer_depth_output": [0, 0], "transformer_depth_middle": -2}
    return shapes(lambda: UNetModel(**unet_sizes(context) | fixed | options))


def vega() -> Shapes:
    """Of SDXL's kin, Segmind-Vega has the least attention that ComfyUI recognises."""
    depths = {"transformer_depth": [0, 0, 1, 1, 2, 2], "transformer_depth_output": [0] * 9}
    levels = {
        "num_res_blocks": [2, 2, 2],
        "channel_mult": [1, 1, 1],
        "num_classes": "sequential",
        "adm_in_channels": 2816,
    }
    return unet(2048, num_head_channels=64, use_linear_in_transformer=True, **depths, **levels)


def unet_sizes(context: int) -> dict:
    """One resolution, one block: 320 channels are the least that ComfyUI recognises."""
    return {
        "image_size": 32,
        "in_channels": 4,
        "model_channels": 320,
        "num_res_blocks": [1],
        "channel_mult": [1],
        "transformer_depth": [1],
        "context_dim": context,
        "use_spatial_transformer": True,
        "legacy": False,
        "operations": operations(),
    }


def controlnet() -> Shapes:
    """For SD1.5, in the layout of lllyasviel's files; without attention in the middle."""
    from comfy.cldm.cldm import ControlNet

    network = shapes(lambda: ControlNet(**unet_sizes(768), hint_channels=3, num_heads=8, transformer_depth_middle=-1))
    return under("control_model.", network)


def mmdit(depth: int = 2) -> Shapes:
    from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper

    return shapes(
        lambda: OpenAISignatureMMDITWrapper(
            input_size=None,
            in_channels=16,
            out_channels=16,
            depth=depth,
            adm_in_channels=2048,
            context_embedder_config={
                "target": "torch.nn.Linear",
                "params": {"in_features": 4096, "out_features": 64 * depth},
            },
            num_patches=1024,
            pos_embed_max_size=32,
            pos_embed_scaling_factor=None,
            qk_norm="rms",
            x_block_self_attn_layers=[0],
            operations=operations(),
        )
    )


def flux(hidden: int = 128, double: int = 1, single: int = 1) -> Shapes:
    from comfy.ldm.flux.model import Flux

    return shapes(lambda: Flux(**flux_sizes(hidden, double, single)))


def flux_sizes(hidden: int = 128, double: int = 1, single: int = 1) -> dict:
    """CLIP-L's 768 channels stand in for T5's 4096."""
    return {
        "image_model": "flux",
        "in_channels": 16,
        "out_channels": 16,
        "vec_in_dim": 768,
        "context_in_dim": 768,
        "hidden_size": hidden,
        "mlp_ratio": 4.0,
        "num_heads": hidden // 128,
        "depth": double,
        "depth_single_blocks": single,
        "axes_dim": [16, 56, 56],
        "theta": 10000,
        "patch_size": 2,
        "qkv_bias": True,
        "guidance_embed": True,
        "txt_ids_dims": [],
        "operations": operations(),
    }


def flux_controlnet() -> Shapes:
    """In XLabs' layout, which calls the scales of norms so."""
    from comfy.ldm.flux.controlnet import ControlNetFlux

    network = shapes(lambda: ControlNetFlux(**flux_sizes(single=0)))
    return {name.replace("_norm.weight", "_norm.scale"): shape for name, shape in network.items()}


def flux_lora(rank: int = 4, hidden: int = 128) -> Shapes:
    """In kohya's layout, on one layer."""
    name = "lora_unet_double_blocks_0_img_attn_proj.lora"
    return {f"{name}_down.weight": torch.Size([rank, hidden]), f"{name}_up.weight": torch.Size([hidden, rank])}


def wan() -> Shapes:
    from comfy.ldm.wan.model import WanModel

    return shapes(
        lambda: WanModel(
            model_type="t2v",
            in_dim=16,
            out_dim=16,
            dim=128,
            ffn_dim=256,
            text_dim=4096,
            num_heads=1,
            num_layers=1,
            operations=operations(),
        )
    )


def kl(channels: int, quantised: bool = True, width: int = 32) -> Shapes:
    """A decoder of 32 instead of the published 128 channels; the encoder's 128 are fixed."""
    from comfy.ldm.models.autoencoder import AutoencoderKL, AutoencodingEngine

    blocks = "comfy.ldm.modules.diffusionmodules.model."
    encoder = {"double_z": True, "z_channels": channels, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128}
    encoder |= {"ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0}
    decoder = encoder | {"ch": width}
    if quantised:
        return shapes(lambda: AutoencoderKL(ddconfig=encoder, embed_dim=channels, decoder_ddconfig=decoder))
    regularizer = {"target": "comfy.ldm.models.autoencoder.DiagonalGaussianRegularizer"}
    parts = [
        {"target": blocks + name, "params": config} for name, config in (("Encoder", encoder), ("Decoder", decoder))
    ]
    return shapes(
        lambda: AutoencodingEngine(regularizer_config=regularizer, encoder_config=parts[0], decoder_config=parts[1])
    )


def wan_vae(dim: int = 16) -> Shapes:
    from comfy.ldm.wan.vae import WanVAE

    resampling = {
        "dim_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "attn_scales": [],
        "temperal_downsample": [False, True, True],
    }
    return shapes(lambda: WanVAE(dim=dim, z_dim=16, image_channels=3, conv_out_channels=3, dropout=0.0, **resampling))


def taesd(part: str, channels: int) -> Shapes:
    import comfy.taesd.taesd

    return shapes(lambda: getattr(comfy.taesd.taesd, part.capitalize())(channels))


def taew() -> Shapes:
    from comfy.taesd.taehv import TAEHV

    return shapes(lambda: TAEHV(latent_channels=16))


def clip_text(config: str) -> Shapes:
    import comfy.clip_model

    values = json.loads((Path(comfy.clip_model.__file__).parent / config).read_text())
    return shapes(lambda: comfy.clip_model.CLIPTextModel(values, torch.float16, None, operations()))


def clip_l() -> Shapes:
    return clip_text("sd1_clip_config.json")


def open_clip_names(text: Shapes) -> Shapes:
    """transformers' names -> open_clip's, as in SD2 checkpoints: the three projections of an attention are one there."""
    outer = {
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.final_layer_norm.weight": "ln_final.weight",
        "text_model.final_layer_norm.bias": "ln_final.bias",
        "text_projection.weight": "text_projection",
    }
    inner = {"self_attn.out_proj": "attn.out_proj", "layer_norm1": "ln_1", "layer_norm2": "ln_2"}
    inner |= {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    renamed = {}
    for name, shape in text.items():
        if name in outer:
            renamed[outer[name]] = shape
            continue
        layer, rest = name.removeprefix("text_model.encoder.layers.").split(".", 1)
        module, kind = rest.rsplit(".", 1)
        block = f"transformer.resblocks.{layer}."
        if module in inner:
            renamed[f"{block}{inner[module]}.{kind}"] = shape
        elif module == "self_attn.q_proj":
            renamed[f"{block}attn.in_proj_{kind}"] = torch.Size([3 * shape[0], *shape[1:]])
    return renamed


def sd15() -> Shapes:
    text = clip_l()
    del text["text_projection.weight"]
    parts = under("model.diffusion_model.", unet(768, num_heads=8)) | under("first_stage_model.", kl(4))
    return parts | under("cond_stage_model.transformer.", text)


def sd2() -> Shapes:
    """Also the format of SD-Turbo."""
    text = open_clip_names(clip_text("text_encoders/sd2_clip_config.json"))
    network = unet(1024, num_head_channels=64, use_linear_in_transformer=True)
    parts = under("model.diffusion_model.", network) | under("first_stage_model.", kl(4))
    return parts | under("cond_stage_model.model.", text)


def sdxl() -> Shapes:
    """Its two text encoders cannot be smaller: 2 GB of memory."""
    text = clip_l()
    del text["text_projection.weight"]
    parts = under("model.diffusion_model.", vega()) | under("first_stage_model.", kl(4))
    parts |= under("conditioner.embedders.0.transformer.", text)
    return parts | under("conditioner.embedders.1.model.", open_clip_names(clip_text("clip_config_bigg.json")))


def sd3() -> Shapes:
    """With CLIP-L as the only text encoder; ComfyUI fills the others' channels with zeros."""
    parts = under("model.diffusion_model.", mmdit()) | under("first_stage_model.", kl(16, quantised=False))
    return parts | under("text_encoders.clip_l.transformer.", clip_l())


def hps() -> Shapes:
    """A CLIP of one narrow layer for each tower, whose only head needs no hint."""
    import open_clip

    vision = open_clip.model.CLIPVisionCfg(layers=1, width=64, head_width=64, patch_size=32, image_size=224)
    text = open_clip.model.CLIPTextCfg(layers=1, width=64, heads=1)
    return shapes(lambda: open_clip.model.CLIP(64, vision, text))


STANDINS: dict[str, Callable[[], Shapes]] = {
    SD15: sd15,
    SD2: sd2,
    SDXL: sdxl,
    SD3: sd3,
    FLUX: flux,
    LARGE_FLUX: lambda: flux(512, 2, 2),
    WAN: wan,
    CONTROLNET: controlnet,
    FLUX_CONTROLNET: flux_controlnet,
    FLUX_LORA: flux_lora,
    HPS: hps,
    CLIP_L: clip_l,
    KL4: lambda: kl(4),
    KL16: lambda: kl(16, quantised=False),
    WAN_VAE: wan_vae,
    TAEW: taew,
}
for _name, _channels in TAESDS.items():
    for _part in ("encoder", "decoder"):
        STANDINS[f"vae_approx/{_name}_{_part}.safetensors"] = lambda part=_part, channels=_channels: taesd(
            part, channels
        )
"""File under the models folder -> the shapes of its tensors."""


def operations():
    import comfy.ops

    return comfy.ops.disable_weight_init


def make_standins(models_dir: Path, names: Iterable[str] = STANDINS) -> list[tuple[str, int, int, float]]:
    """Write the named files; rows of (name, parameters, bytes on disk, seconds). ComfyUI must be importable."""
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    rows = []
    for name in names:
        before = time.monotonic()
        weights = make(name)
        write(weights, models_dir / name)
        parameters = sum(tensor.numel() for tensor in weights.values())
        rows.append((name, parameters, (models_dir / name).stat().st_size, time.monotonic() - before))
    return rows


def make(name: str) -> dict[str, Tensor]:
    """ComfyUI tells lighttaew2_1 from taehv by its float32."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    dtype = torch.float32 if name.startswith("vae_approx/") else torch.float16
    random = Random(seed, dtype, strided=not name.endswith(".safetensors"))
    return {key: random.initial(key, shape) for key, shape in STANDINS[name]().items()}


def write(weights: dict[str, Tensor], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(weights, partial)
    else:
        torch.save({"state_dict": weights}, partial)
    os.replace(partial, path)


def main() -> None:
    comfyui, models, *names = sys.argv[1:]
    sys.argv = sys.argv[:1]
    sys.path.insert(0, str(Path(comfyui).resolve()))
    print(f"{'file':48}{'parameters':>12}{'MB':>7}{'s':>6}")
    for name, parameters, size, seconds in make_standins(Path(models), names or STANDINS):
        print(f"{name:48}{parameters:12,}{size / 1e6:7.1f}{seconds:6.1f}")


if __name__ == "__main__":
    main()
