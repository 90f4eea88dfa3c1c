"""Errors with messages for people, and helpers for such messages."""

import errno
import re

import torch

SHOWN = 80
"""Characters of an input that a message shows."""
_ACCELERATOR = (torch.cuda.OutOfMemoryError, getattr(torch, "AcceleratorError", torch.cuda.OutOfMemoryError))
_NO_MEMORY = re.compile(
    r"out of memory|(can't|cannot|unable to) allocate|not enough memory|paging file is too small|bad_alloc"
    r"|os error 12\b",
    re.I,
)
"""Matches the messages of PyTorch on the CPU and on accelerators, of safetensors, Linux and Windows."""


class GuidanceError(ValueError):
    """The operation cannot continue. The message says what to do."""


class OutOfMemoryError(GuidanceError):
    """Memory ran out. No file is damaged."""


def short(text: object) -> str:
    """A text for a message: on one line, truncated to SHOWN characters."""
    line = " ".join(str(text).split())
    return line if len(line) <= SHOWN else f"{line[:SHOWN]}…"


def quoted(value: object) -> str:
    """A value for a message: its repr, on one line and truncated."""
    return short(repr(value))


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an error of any library means that memory ran out, on the CPU or an accelerator."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError, OutOfMemoryError)):
        return True
    return getattr(error, "errno", None) == errno.ENOMEM or _NO_MEMORY.search(str(error)) is not None


def pass_out_of_memory(error: Exception, doing: str) -> None:
    """Raise if memory ran out; for handlers that would otherwise report a damaged file.

    doing: what was being done, such as "x was read". An accelerator's error is raised unchanged, because ComfyUI
    handles it by freeing memory. Any other becomes an OutOfMemoryError.
    """
    if ran_out_of_memory(error):
        if isinstance(error, (*_ACCELERATOR, OutOfMemoryError)):
            raise error
        raise OutOfMemoryError(f"Memory ran out while {doing}: close other programs, and try again.") from error
