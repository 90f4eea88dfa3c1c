"""Reads safetensors files without a memory mapping: where a mapped file shrinks, the system ends the process that reads it."""

import json
import math
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from io import BufferedReader, FileIO
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import GuidanceError, short

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


DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
OWNER = "samples"
"""The entry of the metadata that says what a file belongs to."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file; an index reads a part of it."""

    path: Path
    name: str
    dtype: torch.dtype | None
    """None of what is no floating point numbers."""
    shape: tuple[int, ...]
    start: int
    """Where in the file its bytes begin."""
    owner: str | None
    """What the file says it belongs to; None of older ones."""
    state: tuple[int, int]
    """Size and time of the file."""

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, place: tuple[int, ...]) -> Tensor:
        """What stands at the first indices. Raises GuidanceError where the file is not what it was when it was found."""
        try:
            with self.path.open("rb", buffering=0) as file:
                if state_of(file) == self.state:
                    return self.bytes_of(file, place)
            return self.successor()[place]
        except OSError as error:
            raise self.gone() from error

    def bytes_of(self, file: FileIO, place: tuple[int, ...]) -> Tensor:
        assert self.dtype is not None
        shape, row = self.shape[len(place) :], 0
        for index, size in zip(place, self.shape, strict=False):
            row = row * size + index
        content = bytearray(math.prod(shape) * self.dtype.itemsize)
        file.seek(self.start + row * len(content))
        if file.readinto(content) != len(content):
            raise self.gone()
        found = torch.frombuffer(content, dtype=self.dtype) if content else torch.empty(0, dtype=self.dtype)
        return found.view(shape)

    def successor(self) -> "Stored":
        """The same rows in the file that has taken the place of this one, as when a shard was filled up."""
        try:
            other = stored(self.path)[self.name]
        except (KeyError, SafetensorError) as error:
            raise self.gone() from error
        same = (self.owner, self.dtype, self.shape[1:]) == (other.owner, other.dtype, other.shape[1:])
        if self.owner is None or not same or len(other) < len(self):
            raise self.gone()
        return other

    def gone(self) -> GuidanceError:
        return GuidanceError(f"{shown(self.path)} was changed, moved or deleted while it was read: run again.")


@dataclass(frozen=True)
class StoredRows(Sequence[Tensor]):
    """Tensors of any shapes; one is read whenever it is asked for."""

    parts: Sequence[Stored]

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, row):
        return self.parts[row][()]


def stored(path: Path) -> dict[str, Stored]:
    """The tensors of a file by their names. Raises OSError where it cannot be read, SafetensorError where it is damaged."""
    with path.open("rb") as file:  # first, as safetensors calls all that it cannot open missing
        with safe_open(path, "pt"):
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        start, state = file.tell(), state_of(file)
    owner = (header.pop("__metadata__", None) or {}).get(OWNER)

    def tensor(name: str, part: dict) -> Stored:
        return Stored(
            path, name, DTYPES.get(part["dtype"]), tuple(part["shape"]), start + part["data_offsets"][0], owner, state
        )

    return {name: tensor(name, part) for name, part in header.items()}


def is_finite(found: Tensor) -> bool:
    """Whether all are finite numbers: the least and the greatest are, which is quicker to find out."""
    return not found.numel() or all(math.isfinite(end) for end in found.aminmax())


def not_finite(source: object) -> GuidanceError:
    """What to say of where they were read."""
    source = source.parts[0] if isinstance(source, StoredRows) else source
    file = shown(source.path) if isinstance(source, Stored) else "A collection"
    return GuidanceError(f"{file} has values that are not finite numbers: delete that file and collect again.")


def state_of(file: IO[bytes]) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def shown(path: Path) -> str:
    """A file as messages name it."""
    return f"{path.name} in {path.parent.name}"


def reason(error: OSError) -> str:
    """Why a file cannot be read, without its path."""
    return error.strerror or short(error)
