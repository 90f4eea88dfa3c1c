"""Files of tensors: safetensors, read so that nothing done to the file afterwards can hurt."""

import json
import struct
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name, in memory. Raises what safetensors and the operating system raise.

    Those of safetensors itself are a mapping of the file: if it is shortened, or written anew in place, the system ends the process.
    """
    with safe_open(path, "pt") as checked:
        tensors = {name: checked.get_tensor(name) for name in checked.keys()}  # noqa: SIM118
    with path.open("rb") as file:
        start, header = _header(file)
        return {name: _read(file, start + header[name]["data_offsets"][0], tensor) for name, tensor in tensors.items()}


def _header(file: BufferedReader) -> tuple[int, dict[str, Any]]:
    """Where the data starts, and the header."""
    (length,) = struct.unpack("<Q", file.read(8))
    return 8 + length, json.loads(file.read(length))


def _read(file: BufferedReader, start: int, like: Tensor) -> Tensor:
    """A tensor of that shape and type; the values of `like` are not touched."""
    tensor = torch.empty(like.shape, dtype=like.dtype)
    if tensor.numel():
        file.seek(start)
        if file.readinto(tensor.reshape(-1).view(torch.uint8).numpy().data) < tensor.nbytes:
            raise EOFError("the file is shorter than its header says")
    return tensor


def read_header(path: Path) -> tuple[Shapes, dict[str, str]]:
    """The shape of every tensor of a safetensors file, and its metadata."""
    with safe_open(path, "pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
