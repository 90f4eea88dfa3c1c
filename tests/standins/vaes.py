"""Every VAE of pictures and videos that ComfyUI loads, in its published layout, in small and with random weights.

The classes are ComfyUI's own; where they fix their width, they are made narrower while a VAE is built.
"""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import comfy.ldm.cascade.stage_a
import comfy.ldm.cascade.stage_c_coder
import comfy.ldm.cogvideo.vae
import comfy.ldm.cosmos.vae
import comfy.ldm.genmo.vae.model
import comfy.ldm.lightricks.vae.causal_video_autoencoder
import comfy.ldm.mage_flow.vae
import comfy.ldm.minimax.vae
import comfy.ldm.seedvr.vae
import comfy.ldm.wan.vae
import comfy.ldm.wan.vae2_2
import comfy.sd
import comfy.taesd.taehv
import comfy.taesd.taesd
import torch
from torch import Tensor, nn

KL = {
    "double_z": True,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [],
    "dropout": 0.0,
}
HUNYUAN = {
    "in_channels": 3,
    "out_channels": 3,
    "num_res_blocks": 1,
    "downsample_match_channel": True,
    "upsample_match_channel": True,
}
WAN = {
    "dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
    "dropout": 0.0,
}
COSMOS = {
    "z_channels": 16,
    "latent_channels": 16,
    "z_factor": 1,
    "resolution": 1024,
    "in_channels": 3,
    "out_channels": 3,
    "channels": 16,
    "channels_mult": [2, 4, 4],
    "num_res_blocks": 1,
    "attn_resolutions": [32],
    "dropout": 0.0,
    "patch_size": 4,
    "num_groups": 1,
    "temporal_compression": 8,
    "spacial_compression": 8,
}
UP = ["compress_all", {"multiplier": 1, "residual": True}]
LTXV = {
    "dims": 3,
    "latent_channels": 128,
    "norm_layer": "pixel_norm",
    "patch_size": 4,
    "latent_log_var": "uniform",
    "timestep_conditioning": True,
    "encoder_base_channels": 8,
    "encoder_blocks": [["res_x", 1], ["compress_all", 1], ["compress_all", 1], ["compress_all", 1]],
    "decoder_base_channels": 8,
    "decoder_blocks": [["res_x", {"num_layers": 1, "inject_noise": True}], UP, UP, UP, ["res_x", 1]],
}
MODELS = "comfy.ldm.modules."


def narrow(change: Callable[[dict], dict]) -> Callable:
    """A constructor -> one that changes the configuration it is given."""
    return lambda constructor: lambda *args, **config: constructor(*args, **change(config))


def parts(change: dict) -> Callable[[dict], dict]:
    """The configuration of an AutoencodingEngine with a change to the parameters of its encoder and decoder."""
    return lambda config: (
        config
        | {
            key: config[key] | {"params": config[key]["params"] | change}
            for key in ("encoder_config", "decoder_config")
        }
    )


def hunyuan_width(config: dict) -> dict:
    params = config["decoder_config"]["params"]
    if "block_out_channels" not in params:
        return parts({"ch": 32})(config)
    return parts(
        {"block_out_channels": [32, 32, *[64] * (len(params["block_out_channels"]) - 2)], "num_res_blocks": 1}
    )(config)


NARROWER: list[tuple[object, str, Callable]] = [
    (comfy.sd, "AutoencoderKL", narrow(lambda config: config | {"ddconfig": config["ddconfig"] | {"ch": 32}})),
    (comfy.sd, "AutoencodingEngine", narrow(hunyuan_width)),
    (comfy.sd, "StageA", narrow(lambda config: config | {"c_hidden": 16, "bottleneck_blocks": 1, "codebook_size": 8})),
    (comfy.ldm.cascade.stage_c_coder, "Previewer", narrow(lambda config: config | {"c_hidden": 32})),
    (comfy.ldm.cascade.stage_c_coder, "EfficientNetEncoder", lambda _: nn.Identity),
    (
        comfy.ldm.cogvideo.vae,
        "AutoencoderKLCogVideoX",
        narrow(lambda config: config | {"block_out_channels": (32,) * 4, "layers_per_block": 1}),
    ),
    (comfy.ldm.cosmos.vae, "CausalContinuousVideoTokenizer", narrow(lambda config: config | COSMOS)),
    (comfy.ldm.genmo.vae.model, "Encoder", lambda _: lambda **config: nn.Identity()),
    (comfy.ldm.genmo.vae.model, "Decoder", narrow(lambda config: config | {"base_channels": 32})),
    (comfy.ldm.mage_flow.vae, "DConvEncoder", lambda _: lambda: nn.Identity()),
    (comfy.ldm.mage_flow.vae, "DConvDenoiser", narrow(lambda config: {"num_blocks": 3, "num_cond_blocks": 2})),
    (comfy.ldm.minimax.vae, "EncoderFCN3D", lambda _: lambda **config: nn.Identity()),
    (comfy.ldm.minimax.vae, "ViT3DDecoder", narrow(lambda config: config | {"num_layers": 1, "heads": 2})),
    (comfy.ldm.seedvr.vae, "BYTEDANCE_BLOCK_OUT_CHANNELS", lambda _: (32, 32, 32, 32)),
    (comfy.ldm.wan.vae2_2, "WanVAE", narrow(lambda config: config | {"dim": 16, "dec_dim": 16})),
]


@contextmanager
def narrower() -> Iterator[None]:
    with ExitStack() as stack:
        for owner, name, change in NARROWER:
            stack.enter_context(patch.object(owner, name, change(getattr(owner, name))))
        yield


def kl(channels: int, **change) -> nn.Module:
    return comfy.sd.AutoencoderKL(ddconfig=KL | {"z_channels": channels} | change, embed_dim=channels)


def engine(path: str, **params) -> nn.Module:
    halves = [{"target": f"{path}.{name}", "params": params} for name in ("Encoder", "Decoder")]
    regularizer = {"target": "comfy.ldm.models.autoencoder.DiagonalGaussianRegularizer"}
    return comfy.sd.AutoencodingEngine(
        regularizer_config=regularizer, encoder_config=halves[0], decoder_config=halves[1]
    )


def svd() -> nn.Module:
    params = KL | {"z_channels": 4}
    return comfy.sd.AutoencodingEngine(
        regularizer_config={"target": "comfy.ldm.models.autoencoder.DiagonalGaussianRegularizer"},
        encoder_config={"target": MODELS + "diffusionmodules.model.Encoder", "params": params},
        decoder_config={
            "target": MODELS + "temporal_ae.VideoDecoder",
            "params": params | {"video_kernel_size": [3, 1, 1], "alpha": 0.0},
        },
    )


def hunyuan(path: str, channels: int, spatial: int, **change) -> nn.Module:
    widths = [64] * (int(math.log2(spatial)) + 1)
    return engine(
        f"comfy.ldm.hunyuan_video.{path}",
        z_channels=channels,
        block_out_channels=widths,
        ffactor_spatial=spatial,
        **HUNYUAN,
        **change,
    )


VAES: dict[str, Callable[[], nn.Module]] = {
    "kl4": lambda: kl(4),
    "kl4 x4": lambda: kl(4, ch_mult=[1, 2, 4]),
    "kl16": lambda: kl(16),
    "flux2": lambda: kl(32, batch_norm_latent=True),
    "mage": lambda: comfy.ldm.mage_flow.vae.MageVAE(),
    "svd": svd,
    "stage a": lambda: comfy.sd.StageA(),
    "stage c": lambda: comfy.ldm.cascade.stage_c_coder.StageC_coder(),
    "mochi": lambda: comfy.ldm.genmo.vae.model.VideoVAE(),
    "ltxv": lambda: comfy.ldm.lightricks.vae.causal_video_autoencoder.VideoVAE(config=LTXV),
    "hunyuan video": lambda: kl(16, conv3d=True, time_compress=4),
    "hunyuan image": lambda: hunyuan("vae", 64, 32),
    "hunyuan refiner": lambda: hunyuan("vae_refiner", 32, 16, ffactor_temporal=4, refiner_vae=False),
    "hunyuan video 1.5": lambda: hunyuan("vae_refiner", 32, 16, ffactor_temporal=4),
    "cosmos": lambda: comfy.ldm.cosmos.vae.CausalContinuousVideoTokenizer(**COSMOS),
    "wan": lambda: comfy.ldm.wan.vae.WanVAE(z_dim=16, image_channels=3, conv_out_channels=3, **WAN),
    "wan rgba": lambda: comfy.ldm.wan.vae.WanVAE(z_dim=16, image_channels=4, conv_out_channels=4, **WAN),
    "wan 2.2": lambda: comfy.ldm.wan.vae2_2.WanVAE(z_dim=48, dec_dim=16, **WAN),
    "seedvr2": lambda: comfy.ldm.seedvr.vae.VideoAutoencoderKLWrapper(),
    "cogvideox": lambda: comfy.ldm.cogvideo.vae.AutoencoderKLCogVideoX(latent_channels=16),
    "minimax": lambda: comfy.ldm.minimax.vae.MiniMaxH3VideoVAE(),
    "taehv 16": lambda: comfy.taesd.taehv.TAEHV(latent_channels=16),
    "taehv 32": lambda: comfy.taesd.taehv.TAEHV(latent_channels=32),
    "taehv 48": lambda: comfy.taesd.taehv.TAEHV(latent_channels=48),
    "taehv 128": lambda: comfy.taesd.taehv.TAEHV(latent_channels=128),
}
RENAMED = {"mage": ("decoder_model.", "pipeline."), "stage c": ("previewer.", "")}
"""What a file calls a part that ComfyUI calls otherwise."""
TELLING = {
    "mage": "student.dconv_encoder.proj_out.weight",
    "cosmos": "decoder.unpatcher3d.wavelets",
    "minimax": "encoder.down.5.block.0.conv1.weight",
}
"""The tensor by which ComfyUI tells a file, where the narrow one lacks it."""


def weights(module: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Random weights through which numbers keep about their size."""
    generator = torch.Generator().manual_seed(seed)

    def draw(name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or name.endswith(("latents_mean", "latents_std")):
            return tensor.clone()
        if name.endswith(("_var", "std-of-means", "latent_std")):
            return torch.rand(tensor.shape, generator=generator) + 0.5
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.ndim <= 1 or name.endswith("gamma"):
            scaling = name.endswith(("weight", "gamma", "scale"))
            return torch.ones_like(noise) + 0.1 * noise if scaling else 0.1 * noise
        return noise * tensor[0].numel() ** -0.5

    return {name: draw(name, tensor) for name, tensor in module.state_dict().items()}


def small_vae(name: str) -> comfy.sd.VAE:
    """A VAE as Load VAE makes it of a file."""
    if name == "pixel space":
        return comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)})
    old, new = RENAMED.get(name, ("", ""))
    with narrower():
        sd = {key.replace(old, new, 1): value for key, value in weights(VAES[name]()).items()}
        sd |= {TELLING[name]: torch.zeros(1)} if name in TELLING else {}
        return comfy.sd.VAE(sd=sd, metadata={"config": json.dumps({"vae": LTXV})} if name == "ltxv" else None)
