"""The committed weights: eight bits per number with a half-precision scale per output row, one file per network."""

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

FOLDER = Path(__file__).with_name("weights")


def path(name: str) -> Path:
    return FOLDER / f"{name}.safetensors"


def save(name: str, weights: dict[str, Tensor], notes: dict[str, str] | None = None) -> None:
    FOLDER.mkdir(exist_ok=True)
    packed: dict[str, Tensor] = {}
    for key, weight in weights.items():
        packed |= _pack(key, weight.detach().float())
    save_file(packed, path(name), notes)


def load(name: str) -> dict[str, Tensor]:
    """Half-precision weights."""
    stored = load_file(path(name))
    return {key: _unpack(value, stored.get(f"{key}/scale")) for key, value in stored.items() if not key.endswith("/scale")}


def notes(name: str) -> dict[str, str]:
    with safe_open(path(name), "pt") as file:
        return file.metadata() or {}


def note(name: str, notes: dict[str, str]) -> None:
    """Replace the notes beside the weights."""
    save_file(load_file(path(name)), path(name), notes)


def _pack(key: str, weight: Tensor) -> dict[str, Tensor]:
    if weight.ndim < 2:
        return {key: weight.half()}
    scale = (weight.flatten(1).abs().amax(1) / 127).clamp(min=2.0**-20).half()
    steps = (weight / _column(scale.float(), weight)).round().clamp(-127, 127)
    return {key: steps.to(torch.int8).contiguous(), f"{key}/scale": scale}


def _unpack(value: Tensor, scale: Tensor | None) -> Tensor:
    return value.half() if scale is None else (value.float() * _column(scale.float(), value)).half()


def _column(scale: Tensor, like: Tensor) -> Tensor:
    return scale.view(-1, *[1] * (like.ndim - 1))
