"""ComfyUI inside this process, for tests and benchmarks that look behind the HTTP API."""

import sys
import types
from pathlib import Path

from .environment import comfyui

ROOT = Path(__file__).parents[2]


def register_pack() -> None:
    """Make the pack importable as `reward_guidance` without putting its root on sys.path, where its `nodes` would hide ComfyUI's."""
    if "reward_guidance" not in sys.modules:
        package = types.ModuleType("reward_guidance")
        package.__path__ = [str(ROOT)]
        sys.modules["reward_guidance"] = package


def load_comfyui() -> None:
    """Make ComfyUI importable, on the CPU unless an accelerator is there."""
    register_pack()
    sys.path.insert(0, str(comfyui()))
    import torch
    from comfy.cli_args import args

    args.cpu = not torch.cuda.is_available()
    args.disable_progress_bar = True
