"""Checkpoint files, from which interrupted trainings continue."""

from contextlib import suppress
from pathlib import Path
from shutil import rmtree
from typing import Any

import torch
from torch import Tensor

from ..disk import held

CHECKPOINTS = "training-*.checkpoint"
KEPT = 3
"""Checkpoints kept in a folder: those of the most recently interrupted trainings."""


def same_structure(found: Any, expected: Any) -> bool:
    """Whether nested dictionaries of tensors have the same names, shapes and types, and `found` is finite."""
    if not isinstance(expected, Tensor):
        same = isinstance(found, dict) and found.keys() == expected.keys()
        return same and all(same_structure(found[name], value) for name, value in expected.items())
    if not isinstance(found, Tensor) or found.layout != torch.strided or found.device.type != "cpu":
        return False
    return (found.shape, found.dtype) == (expected.shape, expected.dtype) and bool(found.isfinite().all())


def drop_oldest(path: Path) -> None:
    """Delete old checkpoints beside this one: all but the KEPT newest, and those in use by other trainings."""
    others = sorted((other for other in path.parent.glob(CHECKPOINTS) if other != path), key=modified, reverse=True)
    for other in [*others[KEPT - 1 :], *path.parent.glob(f"{CHECKPOINTS}.partial")]:
        with suppress(OSError), held(other) as unused:
            if unused:
                rmtree(other) if other.is_dir() else other.unlink()


def modified(path: Path) -> float:
    """Modification time in seconds, 0 if the file does not exist any more."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
