"""Gives the checkout an importable name: `from reward_guidance.guidance import process`.

The name stands for the folder without running its __init__.py, which needs a ComfyUI around it. The folder itself stays off sys.path:
its `nodes` must not hide ComfyUI's nodes.py from tests that use ComfyUI in-process.
"""

import os
import sys
import tempfile
import types
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]

package = types.ModuleType("reward_guidance")
package.__path__ = [str(CHECKOUT)]
sys.modules.setdefault("reward_guidance", package)
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != CHECKOUT]


def pytest_configure() -> None:
    import torch
    from reward_guidance.tests.harness.environment import cache

    scratch = cache() / "work" / "tmp"
    scratch.mkdir(parents=True, exist_ok=True)
    tempfile.tempdir = os.environ["TMPDIR"] = str(scratch)
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = (
        "1"  # of the processes that tests start: sums in another order differ in their last bits
    )
