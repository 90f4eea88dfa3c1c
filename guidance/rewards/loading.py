"""Reward files: what kind they are is read from their content, never from their name, and no code in them is run."""

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from .base import Reward, RewardError
from .clip import load_clip
from .clip_checkpoint import Hints, StateDict, has_open_clip_layout, has_transformers_layout

_WEIGHT_NAMES = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin")
_SUPPORTED = "CLIP dual encoders (also PickScore v1) with ViT towers, in open_clip's or transformers' key layout"

# A new kind of reward adds its line here: how its keys look, and what makes a Reward of them.
_KINDS = (
    (has_open_clip_layout, load_clip),
    (has_transformers_layout, load_clip),
)


@torch.inference_mode(False)
def load_reward(path: str | Path) -> Reward:
    """A weights file (safetensors, or a PyTorch checkpoint without code), or a Hugging Face folder -> Reward on the CPU.

    The safetensors metadata may state reference_mean, reference_std, vision_heads, text_heads and quick_gelu. Weights that are not
    finite are not searched for (it would read every page of the file); `evaluate` refuses the first score they spoil.
    """
    path = Path(path)
    file = _weights_file(path)
    in_folder = file.name in _WEIGHT_NAMES
    state, metadata = _read(file)
    hints = (_read_config(file.parent) if in_folder else {}) | metadata
    reward = _build(file.name, state, hints)
    reward.name = file.parent.name if in_folder else file.stem
    reward.reference_mean = _number(hints, "reference_mean", reward.reference_mean)
    reward.reference_std = _number(hints, "reference_std", reward.reference_std)
    if reward.reference_std <= 0:
        raise RewardError(f"The metadata of {file.name} gives reference_std as {reward.reference_std}; it must be positive.")
    return reward


def _weights_file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise RewardError(f"There is no reward file {path.name}; put it into the reward models folder and refresh.")
    for name in _WEIGHT_NAMES:
        if (path / name).is_file():
            return path / name
    raise RewardError(f"The folder {path.name} holds no weights; it needs one of {', '.join(_WEIGHT_NAMES)}.")


def _read(file: Path) -> tuple[StateDict, dict[str, str]]:
    try:
        with file.open("rb") as stream:
            start = stream.read(512)
    except OSError as error:
        raise RewardError(f"{file.name} cannot be read: {error.strerror}.") from error
    if not start:
        raise RewardError(f"{file.name} is empty; download it again.")
    if start.startswith(b"version https://git-lfs"):
        raise RewardError(f"{file.name} is a git-lfs pointer, not the weights; run git lfs pull, or download the file itself.")
    if start.lstrip().startswith(b"<"):
        raise RewardError(f"{file.name} is a web page saved under the name of the weights; download the file itself.")
    if start[8:9] == b"{":
        return _read_safetensors(file)
    if start.startswith((b"PK", b"\x80")):
        return _read_checkpoint(file), {}
    raise RewardError(f"{file.name} is neither a safetensors file nor a PyTorch checkpoint; download it again.")


def _read_safetensors(file: Path) -> tuple[StateDict, dict[str, str]]:
    try:
        with safe_open(file, framework="pt") as weights:
            return {key: weights.get_tensor(key) for key in weights.keys()}, weights.metadata() or {}  # noqa: SIM118
    except Exception as error:
        raise RewardError(f"{file.name} is damaged or only half downloaded; download it again.") from error


def _read_checkpoint(file: Path) -> StateDict:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        if type(error).__name__ == "UnpicklingError" and (code := re.search(r"GLOBAL (\S+)", str(error))):
            raise RewardError(f"{file.name} contains code ({code[1]}), which is not run; use a safetensors version of it.") from error
        if "TorchScript" in str(error):
            raise RewardError(f"{file.name} is a TorchScript program, which is not run; use a safetensors version of it.") from error
        raise RewardError(f"{file.name} is damaged or only half downloaded; download it again.") from error
    return _state_dict(content)


def _state_dict(content: Any) -> StateDict:
    """A state dict, bare or as training checkpoints wrap it: under `state_dict`, with the `module.` of data-parallel training."""
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    items = content.items() if isinstance(content, dict) else ()
    return {str(key).removeprefix("module."): value for key, value in items if isinstance(value, Tensor)}


def _build(name: str, state: StateDict, hints: Hints) -> Reward:
    for recognises, build in _KINDS:
        if recognises(state):
            try:
                return build(state, hints)
            except RewardError as error:
                raise RewardError(f"{name}: {error}") from error
            except (LookupError, ValueError, ArithmeticError, RuntimeError) as error:
                raise RewardError(f"{name} is of a known kind, but its weights do not fit together ({_summary(error)}).") from error
    found = ", ".join(sorted(state)[:3]) or "no tensors"
    raise RewardError(f"{name} is not a reward that can be read (it holds {found}); supported are {_SUPPORTED}.")


def _read_config(folder: Path) -> dict[str, str]:
    """What the weights cannot tell, from transformers' or open_clip's configuration with the defaults those give to entries left out."""
    for name in ("config.json", "open_clip_config.json"):
        if (folder / name).is_file():
            try:
                return _config_hints(json.loads((folder / name).read_text(encoding="utf-8")))
            except (ValueError, TypeError, AttributeError, ZeroDivisionError, OSError) as error:
                raise RewardError(f"{name} in {folder.name} is damaged; download it again ({_summary(error)}).") from error
    return {}


def _config_hints(config: Any) -> dict[str, str]:
    if "model_cfg" in config:
        model = config["model_cfg"]
        vision, text = model.get("vision_cfg", {}), model.get("text_cfg", {})
        heads = vision.get("width", 768) // vision.get("head_width", 64), text.get("heads", 8)
        quick_gelu = model.get("quick_gelu", False)
    else:
        vision, text = config.get("vision_config", {}), config.get("text_config", {})
        heads = vision.get("num_attention_heads", 12), text.get("num_attention_heads", 8)
        quick_gelu = vision.get("hidden_act", "quick_gelu") == "quick_gelu"
    return {"vision_heads": str(heads[0]), "text_heads": str(heads[1]), "quick_gelu": str(quick_gelu)}


def _number(hints: Hints, key: str, default: float) -> float:
    try:
        number = float(hints.get(key, default))
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise RewardError(f"The metadata entry {key} must be a number, not {hints[key]!r}; correct it or remove it.")
    return number


def _summary(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
