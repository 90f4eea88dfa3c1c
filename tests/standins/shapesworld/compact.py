"""The committed weights, one file per network: eight bits per number with a half-precision scale per output row.

Of a network made from another, only the difference is kept, in four bits.
"""

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

FOLDER = Path(__file__).with_name("weights")


def path(name: str) -> Path:
    return FOLDER / f"{name}.safetensors"


def save(name: str, weights: dict[str, Tensor], base: str | None = None) -> None:
    FOLDER.mkdir(exist_ok=True)
    origin = load(base) if base else {}
    packed: dict[str, Tensor] = {}
    for key, weight in weights.items():
        packed |= pack(key, weight.detach().float(), origin.get(key))
    save_file(packed, path(name), {"base": base} if base else None)


def load(name: str) -> dict[str, Tensor]:
    """Half-precision weights."""
    stored, base = load_file(path(name)), notes(name).get("base")
    origin = load(base) if base else {}
    return {
        key: unpack(value, stored.get(f"{key}/scale"), origin.get(key))
        for key, value in stored.items()
        if not key.endswith("/scale")
    }


def notes(name: str) -> dict[str, str]:
    with safe_open(path(name), "pt") as file:
        return file.metadata() or {}


def note(name: str, notes: dict[str, str]) -> None:
    """Replace the notes beside the weights."""
    save_file(load_file(path(name)), path(name), notes)


def pack(key: str, weight: Tensor, origin: Tensor | None = None) -> dict[str, Tensor]:
    """A matrix as whole multiples of a scale per row; of the difference to `origin`, if there is one, as pairs of four bits."""
    if weight.ndim < 2:
        return {key: weight.half()}
    if origin is None:
        scale = (weight.flatten(1).abs().amax(1) / 127).clamp(min=2.0**-20).half()
        return {key: _steps(weight, scale, 127), f"{key}/scale": scale}
    difference = weight - origin.float()
    scale = _best_scale(difference, 7)
    return {key: _paired(_steps(difference, scale, 7)), f"{key}/scale": scale}


def _steps(weight: Tensor, scale: Tensor, most: int) -> Tensor:
    return (weight / _column(scale.float(), weight)).round().clamp(-most, most).to(torch.int8).contiguous()


def _best_scale(weight: Tensor, most: int) -> Tensor:
    """Of each row the one with the least error: with so few steps it pays to cut off the furthest numbers."""
    rows = weight.flatten(1)
    scales = (rows.abs().amax(1) / most * torch.linspace(0.4, 1, 13)[:, None]).clamp(min=2.0**-20).half()
    errors = torch.stack(
        [(_steps(rows, scale, most) * scale.float()[:, None] - rows).square().sum(1) for scale in scales]
    )
    return scales.gather(0, errors.argmin(0)[None])[0]


def unpack(value: Tensor, scale: Tensor | None, origin: Tensor | None = None) -> Tensor:
    if scale is None:
        return value.half()
    steps = value if origin is None else _unpaired(value).view(origin.shape)
    kept = steps.float() * _column(scale.float(), steps)
    return (kept if origin is None else kept + origin.float()).half()


def _paired(steps: Tensor) -> Tensor:
    """Whole numbers from -8 to 7, an even count of them -> bytes (N/2,)."""
    low, high = (steps.flatten() + 8).to(torch.uint8).view(-1, 2).unbind(1)
    return low | high << 4


def _unpaired(pairs: Tensor) -> Tensor:
    """The inverse of `_paired` (N,)."""
    return torch.stack([pairs & 15, pairs >> 4], 1).flatten().to(torch.int8) - 8


def _column(scale: Tensor, like: Tensor) -> Tensor:
    return scale.view(-1, *[1] * (like.ndim - 1))
