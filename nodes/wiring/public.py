"""What other packs may use: from reward_guidance import Reward, RewardError, manage_reward. See web/docs/your_own_reward.md."""

import sys
import types

from ...guidance.rewards import Reward, RewardError
from .loaded import manage_reward

NAME = "reward_guidance"
OFFERED = {"Reward": Reward, "RewardError": RewardError, "manage_reward": manage_reward}


def publish() -> None:
    """ComfyUI imports packs under the paths of their folders, which nobody else can know; this gives the public part a name.

    It is a module of its own, without submodules: importing the pack's modules by a second name would make every class twice.
    """
    module = types.ModuleType(NAME, __doc__)
    vars(module).update(OFFERED, __all__=list(OFFERED))
    sys.modules.setdefault(NAME, module)
