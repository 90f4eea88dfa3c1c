"""The public interface for other packs: `from reward_guidance import Reward, RewardError, manage_reward`.

See web/docs/your_own_reward.md.
"""

import sys
import types

from ...guidance.rewards import Reward, RewardError
from .loaded import manage_reward

NAME = "reward_guidance"
PUBLIC = {"Reward": Reward, "RewardError": RewardError, "manage_reward": manage_reward}


def publish() -> None:
    """Register the public names as the module `reward_guidance`.

    ComfyUI imports a pack under the path of its folder, which other packs cannot know. The module has no submodules:
    importing the pack's modules under a second name would create every class twice.
    """
    module = types.ModuleType(NAME, __doc__)
    vars(module).update(PUBLIC, __all__=list(PUBLIC))
    sys.modules.setdefault(NAME, module)
