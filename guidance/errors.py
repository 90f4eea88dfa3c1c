"""What cannot go on, and how a message says it."""

import errno
import re

import torch

SHOWN = 80
"""Letters of an input that a message shows."""
_ACCELERATOR = (torch.cuda.OutOfMemoryError, getattr(torch, "AcceleratorError", torch.cuda.OutOfMemoryError))
_NO_MEMORY = re.compile(
    r"out of memory|(can't|cannot|unable to) allocate|not enough memory|paging file is too small|bad_alloc|os error 12\b",
    re.I,
)
"""In the messages of PyTorch on the CPU and on accelerators, of safetensors, Linux and Windows."""


class GuidanceError(ValueError):
    """Guidance cannot go on. The message says what to do."""


class OutOfMemoryError(GuidanceError):
    """Memory ran out, which is the fault of no file."""


def short(text: object) -> str:
    """A text as a message shows it: on one line, and no more of it than a person reads."""
    line = " ".join(str(text).split())
    return line if len(line) <= SHOWN else f"{line[:SHOWN]}…"


def quoted(value: object) -> str:
    """An input as a message shows it, in quotation marks if it is a text."""
    return short(repr(value))


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on the CPU or an accelerator, whoever raised it."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError, OutOfMemoryError)):
        return True
    return getattr(error, "errno", None) == errno.ENOMEM or _NO_MEMORY.search(str(error)) is not None


def pass_out_of_memory(error: Exception, doing: str) -> None:
    """For handlers that call a file damaged: raise where memory ran out instead.

    An accelerator's error is raised as it is, as ComfyUI knows it and frees memory; any other as one that says while doing what.
    """
    if ran_out_of_memory(error):
        if isinstance(error, (*_ACCELERATOR, OutOfMemoryError)):
            raise error
        raise OutOfMemoryError(f"Memory ran out while {doing}: close what else takes memory, and try again.") from error
