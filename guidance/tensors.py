"""Reads safetensors files without a memory mapping, whole or in parts.

If a mapped file is shortened or rewritten in place, the system ends the process that reads it.
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import GuidanceError, short

Shapes = dict[str, tuple[int, ...]]

FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
DTYPES = FLOATS | {
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
"""Types by their names in safetensors headers."""
OWNER = "samples"
"""The metadata entry that names the collection a file belongs to."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file. An index reads a part of it."""

    path: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Offset of its first byte in the file."""
    owner: str | None
    """The collection that the file belongs to. None in older files, and in those of other kinds."""
    state: tuple[int, int]
    """Size and modification time of the file."""

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, place: tuple[int, ...]) -> Tensor:
        """The part at the first indices; () is the whole tensor. Raises GuidanceError if the file has changed."""
        try:
            with self.path.open("rb") as file:
                if state_of(file) == self.state:
                    return self.read(file, place)
            return self.successor()[place]
        except OSError as error:
            raise self.gone() from error

    @property
    def is_float(self) -> bool:
        """Whether it holds floating point numbers of 16 bits or more."""
        return self.dtype in FLOATS.values()

    def read(self, file: IO[bytes], place: tuple[int, ...]) -> Tensor:
        shape, row = self.shape[len(place) :], 0
        for index, size in zip(place, self.shape, strict=False):
            row = row * size + index
        found = torch.empty(shape, dtype=self.dtype)
        if found.numel():
            file.seek(self.start + row * found.nbytes)
            content = found.reshape(-1).view(torch.uint8).numpy().data
            if file.readinto(content) < found.nbytes:  # type: ignore[attr-defined]
                raise self.gone()
        return found

    def successor(self) -> "Stored":
        """The same tensor in the file that replaced this one, for example when a shard was filled up."""
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
    """Tensors of any shapes in a file. An index reads one."""

    parts: Sequence[Stored]

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, row):
        return self.parts[row][()]


def stored(path: Path) -> dict[str, Stored]:
    """The tensors of a file by name, not read yet. Raises OSError, or SafetensorError if the file is damaged."""
    return _open(path)[0]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, in memory. Raises as `stored` does, and GuidanceError if the file changes."""
    return {name: part[()] for name, part in stored(path).items()}


def read_header(path: Path) -> tuple[Shapes, dict[str, str]]:
    """The shapes of the tensors of a file by name, and its metadata. Raises as `stored` does."""
    parts, metadata = _open(path)
    return {name: part.shape for name, part in parts.items()}, metadata


def _open(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    with path.open("rb") as file:  # first, because safetensors reports every file that it cannot open as missing
        with safe_open(path, "pt"):
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        start, state = file.tell(), state_of(file)
    metadata = header.pop("__metadata__", None) or {}

    def tensor(name: str, part: dict) -> Stored:
        if part["dtype"] not in DTYPES:
            raise SafetensorError(f"{short(name)} has the type {part['dtype']}, which is not known")
        dtype, shape, offset = DTYPES[part["dtype"]], tuple(part["shape"]), part["data_offsets"][0]
        return Stored(path, name, dtype, shape, start + offset, metadata.get(OWNER), state)

    return {name: tensor(name, part) for name, part in header.items()}, metadata


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are finite. Checks minimum and maximum, which is faster than checking each."""
    return not tensor.numel() or all(math.isfinite(end) for end in tensor.aminmax())


def not_finite(source: object) -> GuidanceError:
    """The error for numbers that are not finite, which names the file they were read from."""
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
