"""Files that interrupted trainings continue from."""

from contextlib import suppress
from pathlib import Path
from shutil import rmtree
from typing import Any

import torch
from torch import Tensor

from ..disk import held

CHECKPOINTS = "training-*.checkpoint"
KEPT = 3
"""Checkpoints in a folder: of the trainings that were interrupted last."""


def same_structure(found: Any, expected: Any) -> bool:
    """Whether tensors by names have the same names, shapes and types, and are finite numbers."""
    if not isinstance(expected, Tensor):
        same = isinstance(found, dict) and found.keys() == expected.keys()
        return same and all(same_structure(found[name], value) for name, value in expected.items())
    if not isinstance(found, Tensor) or found.layout != torch.strided or found.device.type != "cpu":
        return False
    return (found.shape, found.dtype) == (expected.shape, expected.dtype) and bool(found.isfinite().all())


def drop_oldest(path: Path) -> None:
    """Keep this checkpoint and the newest others beside it, and those that trainings use at this moment."""
    others = sorted((other for other in path.parent.glob(CHECKPOINTS) if other != path), key=written, reverse=True)
    for other in [*others[KEPT - 1 :], *path.parent.glob(f"{CHECKPOINTS}.partial")]:
        with suppress(OSError), held(other) as unused:
            if unused:
                rmtree(other) if other.is_dir() else other.unlink()


def written(path: Path) -> float:
    """When, in seconds; long ago where it is not there any more."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
