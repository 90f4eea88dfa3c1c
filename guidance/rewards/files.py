"""Reads weights files without running code in them, and finds files by the shapes of their tensors."""

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor

from ..errors import pass_out_of_memory, short
from ..tensors import read_header, read_tensors
from .base import RewardError
from .published import advice

StateDict = dict[str, Tensor]
Hints = Mapping[str, str]
Shapes = Mapping[str, tuple[int, ...]]

_WEIGHT_NAMES = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin")
_CONFIGURATIONS = ("config.json", "open_clip_config.json")
"""Configurations of transformers and of open_clip."""
_SUFFIXES = (".safetensors", ".sft", ".pt", ".pth", ".bin", ".ckpt")
_SHARD = re.compile(r"-\d{5}-of-(\d{5})(?=\.)")
"""Marks the shards of a large file in Hugging Face's file names."""


@dataclass(frozen=True)
class Weights:
    """The content of a weights file, or of all its shards."""

    path: Path
    state: StateDict
    hints: Hints = field(default_factory=dict)
    """The safetensors metadata, and settings of a config.json beside the weights."""
    wrapper: tuple[str, ...] = ()
    """The keys of a checkpoint that has its weights under `state_dict`. Empty if it has no such key."""
    files: tuple[Path, ...] = ()
    """All files that were read, and configurations that would be read if they existed."""

    @property
    def name(self) -> str:
        """The name for people: the file's stem, or its folder's name if the file has a standard name."""
        return self.path.parent.name if _named_alike(self.path) else self.path.stem

    @property
    def shapes(self) -> Shapes:
        return {key: tuple(tensor.shape) for key, tensor in self.state.items()}


@dataclass(frozen=True)
class LoadOptions:
    """Options for building a reward from a file."""

    image_folders: tuple[Path, ...] = ()
    """Folders to search for an image tower, after the file's own."""
    text_folders: tuple[Path, ...] = ()
    """Folders to search for a text tower, after the file's own."""
    image_tower: Path | None = None
    """The image tower's file, instead of a search."""
    text_tower: Path | None = None
    """The text tower's file, instead of a search."""
    kind: str | None = None
    """The kind of a dual encoder, one of clip.CLIP_KINDS. None recognises it."""
    precision: Callable[[torch.dtype], torch.dtype] = lambda stored: stored
    """The precision of the towers, from that of the file. What follows them is float32."""


def _named_alike(file: Path) -> bool:
    return file.name in _WEIGHT_NAMES or _SHARD.sub("", file.name) in _WEIGHT_NAMES


def read(path: str | Path) -> Weights:
    """Read a weights file, with all its shards, or a Hugging Face folder.

    A weights file is a safetensors file, or a PyTorch checkpoint without code. Raises RewardError if it is missing,
    damaged, or contains code.
    """
    file = _weights_file(Path(path))
    state: StateDict = {}
    configurations = [file.with_name(name) for name in _CONFIGURATIONS] if _named_alike(file) else []
    hints = _read_config(configurations)
    wrapper: tuple[str, ...] = ()
    for shard in (shards := _shards(file)):
        part, metadata, wrapper = _read_one(shard)
        state |= part
        hints |= metadata
    return Weights(file, state, hints, wrapper, (*shards, *configurations))


def find(folders: Iterable[Path], fits: Callable[[Path, Shapes], bool]) -> Path | None:
    """The first file in the folders, at any depth, for which fits(file, shapes) is true."""
    files = (file for folder in dict.fromkeys(folders) for file in _below(folder))
    return next(
        (file for file in files if file.suffix.lower() in _SUFFIXES and file.is_file() and fits(file, shapes(file))),
        None,
    )


def _below(folder: Path) -> list[Path]:
    """All files in a folder at any depth, also through links, which may be circular."""
    files, seen = list[Path](), set[str]()
    for place, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in seen:
            folders.clear()
            continue
        seen.add(real)
        files += [Path(place, name) for name in names]
    return sorted(files)


def shapes(file: Path) -> Shapes:
    """The shapes of all tensors of a file, from its header. Empty if it cannot be read."""
    try:
        with file.open("rb") as stream:
            start = stream.read(9)
        if start[8:9] == b"{":
            return read_header(file)[0]
        if start.startswith(b"PK"):
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            return {key: tuple(tensor.shape) for key, tensor in _unwrap(content)[0].items()}
    except Exception as error:  # another file may fit
        pass_out_of_memory(error, f"{file.name} was read")
        return {}
    return {}


def one_line(error: Exception) -> str:
    """An error on one line, with only the first entry of PyTorch's lists of keys."""
    words = " ".join(f"{type(error).__name__}: {error}".split())
    listed = re.search(r"(?:Missing|Unexpected) key\(s\) in state_dict: \"[^\"]+\"|size mismatch for [^.]+[^:]*", words)
    return shorten(listed[0] if listed else words, 200, placeholder=" ...")


def _weights_file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise RewardError(f"There is no reward file {path.name}; {advice(path.name, str(path.parent))}.")
    for name in _WEIGHT_NAMES:
        for file in (path / name, *sorted(path.glob(f"{Path(name).stem}-00001-of-*{Path(name).suffix}"))):
            if file.is_file():
                return file
    raise RewardError(f"The folder {path.name} holds no weights; it needs one of {', '.join(_WEIGHT_NAMES)}.")


def _shards(file: Path) -> list[Path]:
    if not (found := _SHARD.search(file.name)):
        return [file]
    files = [file.with_name(_SHARD.sub(f"-{i:05}-of-{found[1]}", file.name)) for i in range(1, int(found[1]) + 1)]
    if missing := [shard.name for shard in files if not shard.is_file()]:
        raise RewardError(
            f"{missing[0]} is missing: {file.name} is one of {len(files)} parts; "
            "download the others into the same folder."
        )
    return files


def _read_one(file: Path) -> tuple[StateDict, dict[str, str], tuple[str, ...]]:
    try:
        with file.open("rb") as stream:
            start = stream.read(512)
    except OSError as error:
        raise RewardError(f"{file.name} cannot be read: {error.strerror}.") from error
    if not start:
        raise RewardError(f"{file.name} is empty; download it again.")
    if start.startswith(b"version https://git-lfs"):
        raise RewardError(
            f"{file.name} is a git-lfs pointer, not the weights; run git lfs pull, or download the file itself."
        )
    if start.lstrip().startswith(b"<"):
        raise RewardError(f"{file.name} is a web page saved under the name of the weights; download the file itself.")
    if start[8:9] == b"{":
        return *_read_safetensors(file), ()
    if start.startswith((b"PK", b"\x80")):
        state, wrapper = _unwrap(_read_checkpoint(file, bare_pickle=start.startswith(b"\x80")))
        return state, {}, wrapper
    raise RewardError(f"{file.name} is neither a safetensors file nor a PyTorch checkpoint; download it again.")


def _read_safetensors(file: Path) -> tuple[StateDict, dict[str, str]]:
    try:
        return read_tensors(file), read_header(file)[1]
    except Exception as error:
        pass_out_of_memory(error, f"{file.name} was read")
        raise RewardError(f"{file.name} is damaged or only half downloaded; download it again.") from error


def _read_checkpoint(file: Path, bare_pickle: bool) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        pass_out_of_memory(error, f"{file.name} was read")
        if type(error).__name__ == "UnpicklingError" and (code := re.search(r"GLOBAL (\S+)", str(error))):
            raise RewardError(
                f"{file.name} contains code ({short(code[1])}), which is not run; use a safetensors version of it."
            ) from error
        if "TorchScript" in str(error):
            raise RewardError(
                f"{file.name} is a TorchScript program, which is not run; use a safetensors version of it."
            ) from error
        if bare_pickle:
            raise RewardError(
                f"{file.name} is damaged or contains code, which is not run; use a safetensors version of it."
            ) from error
        raise RewardError(f"{file.name} is damaged or only half downloaded; download it again.") from error


def _unwrap(content: Any) -> tuple[StateDict, tuple[str, ...]]:
    """The state dict of a checkpoint, and the checkpoint's keys if it is under `state_dict`.

    Removes the prefix `module.` of data-parallel training.
    """
    wrapper: tuple[str, ...] = ()
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content, wrapper = content["state_dict"], tuple(map(str, content))
    items = content.items() if isinstance(content, dict) else ()
    return {str(key).removeprefix("module."): value for key, value in items if isinstance(value, Tensor)}, wrapper


def _read_config(files: Iterable[Path]) -> dict[str, str]:
    """Hints from the first configuration that exists. Missing entries have the defaults of its library."""
    for file in files:
        if file.is_file():
            try:
                return _config_hints(json.loads(file.read_text(encoding="utf-8")))
            except (ValueError, TypeError, AttributeError, ArithmeticError, RecursionError, OSError) as error:
                pass_out_of_memory(error, f"{file.name} was read")
                raise RewardError(
                    f"{file.name} in {file.parent.name} is damaged; download it again ({one_line(error)})."
                ) from error
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
