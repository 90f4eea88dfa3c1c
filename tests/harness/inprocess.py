"""ComfyUI inside this process, for tests and benchmarks that look behind the HTTP API."""

import runpy
import sys
from pathlib import Path

from .environment import comfyui


def load_comfyui() -> None:
    """Import ComfyUI, on the CPU unless an accelerator is there, and the checkout as `reward_guidance`."""
    runpy.run_path(str(Path(__file__).parents[1] / "conftest.py"))
    sys.path.insert(0, str(comfyui()))
    import torch
    from comfy.cli_args import args

    args.cpu = not torch.cuda.is_available()
