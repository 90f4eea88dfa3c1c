"""Gives the checkout an importable name: `from reward_guidance.guidance import process`, `from reward_guidance.tests.harness import graphs`.

The name stands for the folder without running its __init__.py, which needs a ComfyUI around it. The folder itself stays off sys.path:
its `nodes` must not hide ComfyUI's nodes.py from tests that use ComfyUI in-process.
"""

import sys
import types
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]

package = types.ModuleType("reward_guidance")
package.__path__ = [str(CHECKOUT)]
sys.modules["reward_guidance"] = package
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != CHECKOUT]
