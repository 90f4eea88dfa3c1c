"""Makes the pack importable as `reward_guidance` without putting its root on sys.path.

Its folder `nodes` and ComfyUI's own nodes.py must never meet there. The root `__init__.py` is not executed: it needs ComfyUI.
"""

import sys
import types
from pathlib import Path

import torch

package = types.ModuleType("reward_guidance")
package.__path__ = [str(Path(__file__).parents[1])]
sys.modules.setdefault("reward_guidance", package)

torch.set_num_threads(1)
