from .base import Reward, RewardError, evaluate

__all__ = ["Reward", "RewardError", "evaluate"]
