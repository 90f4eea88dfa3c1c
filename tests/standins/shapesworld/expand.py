"""Writes the compact weights as files in real formats, where ComfyUI and the pack look for them.

usage: python -m tests.standins.shapesworld.expand MODELS_DIR
"""

import functools
import hashlib
import os
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from . import autoencoder, clip, compact, text

CHECKPOINT = "sd3.5_medium_incl_clips_t5xxlfp8scaled.safetensors"
CONTEXT_CHANNELS, POOLED_CHANNELS = 4096, 2048
LATENT_SCALE, LATENT_SHIFT = 1.5305, 0.0609


def expand(models_dir: str | Path, checkpoint: str = CHECKPOINT) -> list[Path]:
    """Write what is missing or out of date under models_dir; returns all files, each marked with what it was made from."""
    models, mark = Path(models_dir), digest()
    written = []
    for name, make in files(checkpoint).items():
        path = models / name
        if _mark(path) != mark:
            weights, metadata = make()
            _write(path, weights, metadata, mark)
        written.append(path)
    return written


def checkpoints(flow: str = CHECKPOINT) -> dict[str, str]:
    """The file of each transformer. All but the flow model need the node ModelSamplingDiscrete behind the loader: `eps` and `x0`."""
    return {"flow": flow, "diffusion": "shapes_diffusion.safetensors", "one_step": "shapes_one_step.safetensors"}


def files(checkpoint: str = CHECKPOINT) -> dict:
    return {
        **{
            f"checkpoints/{file}": lambda name=name: (full_checkpoint(name), {})
            for name, file in checkpoints(checkpoint).items()
        },
        "vae_approx/taesd3_encoder.safetensors": lambda: (tiny_vae("encoder"), {}),
        "vae_approx/taesd3_decoder.safetensors": lambda: (tiny_vae("decoder"), {}),
        "text_encoders/shapes_clip_l.safetensors": lambda: (text.clip_l(), {}),
        "reward_models/shapes_clip.safetensors": lambda: (guide(), notes("guide")),
        "reward_models/shapes_heldout.safetensors": lambda: (heldout(), notes("heldout")),
    }


@functools.cache
def digest() -> str:
    """Changes with the stored weights and with the code that expands them."""
    sources = sorted([*compact.FOLDER.glob("*.safetensors"), *Path(__file__).parent.glob("*.py")])
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources if path.name != "train.py")).hexdigest()


def full_checkpoint(name: str) -> dict[str, Tensor]:
    """SD3 with an SD3 transformer, a TAESD in the place of the VAE, and one text encoder."""
    weights = {f"model.diffusion_model.{key}": value for key, value in transformer(name).items()}
    for part in ("encoder", "decoder"):
        weights |= {f"first_stage_model.taesd_{part}.{key}": value for key, value in tiny_vae(part).items()}
    weights["first_stage_model.vae_scale"] = torch.tensor(LATENT_SCALE)
    weights["first_stage_model.vae_shift"] = torch.tensor(LATENT_SHIFT)
    return weights | {f"text_encoders.clip_l.transformer.{key}": value for key, value in text.clip_l().items()}


def transformer(name: str) -> dict[str, Tensor]:
    weights = compact.load(name)
    for key, channels in (("context_embedder.weight", CONTEXT_CHANNELS), ("y_embedder.mlp.0.weight", POOLED_CHANNELS)):
        weights[key] = torch.nn.functional.pad(weights[key], (0, channels - text.WIDTH))
    return weights


def tiny_vae(part: str) -> dict[str, Tensor]:
    return autoencoder.widen(_part(part))


def narrow_decoder() -> autoencoder.Decoder:
    """The VAE's decoder at its trained width: model-space latents (B,16,H,W) -> pictures (B,3,8H,8W), about a quarter of the work."""
    decoder = autoencoder.Decoder()
    decoder.load_state_dict(_part("decoder"))
    return decoder.requires_grad_(False)


def _part(part: str) -> dict[str, Tensor]:
    weights = compact.load("autoencoder")
    return {key.removeprefix(f"{part}."): value for key, value in weights.items() if key.startswith(part)}


def guide() -> dict[str, Tensor]:
    return clip.full_vocabulary(compact.load("guide"))


def heldout() -> dict[str, Tensor]:
    return clip.to_transformers(clip.full_vocabulary(compact.load("heldout")))


def notes(kind: str) -> dict[str, str]:
    """What a reward's weights do not say: its typical scores, and the activation."""
    return compact.notes(kind) | {"quick_gelu": "false"}


def _mark(path: Path) -> str | None:
    if not path.exists():
        return None
    with safe_open(path, "pt") as file:
        return (file.metadata() or {}).get("shapesworld")


def _write(path: Path, weights: dict[str, Tensor], metadata: dict[str, str], mark: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file({key: value.contiguous() for key, value in weights.items()}, partial, metadata | {"shapesworld": mark})
    os.replace(partial, path)


if __name__ == "__main__":
    for path in expand(sys.argv[1]):
        print(path)
