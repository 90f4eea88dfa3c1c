"""Files as large as wanted that take no room, and processes with little memory to read them in."""

import json
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

CHECKOUT = Path(__file__).resolve().parents[2]
LITTLE = 2**28
"""Bytes that such a process may take beside what it has after its imports."""


def sparse(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] = {}) -> None:
    """A safetensors file of float32 tensors of these shapes, all zero, that takes no room on the disk."""
    header, end = {"__metadata__": dict(metadata)}, 0
    for name, tensor in tensors.items():
        size = 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def run_with_little_memory(imported: str, path: Path) -> str:
    """The first words of the error with which load(path), as it was imported, ends in a process of its own."""
    script = f"""
import resource, runpy
runpy.run_path({str(CHECKOUT / "tests" / "conftest.py")!r})
from pathlib import Path
{imported}
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + {LITTLE}, taken + {LITTLE}))
try:
    load(Path({str(path)!r}))
except Exception as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    kind, *words = done.stdout.split()
    return " ".join(words[:6])
