from .base import Reward, RewardError, evaluate, require_prompt
from .clip import ClipReward
from .combine import CombinedReward
from .image_similarity import LIKENESSES, ClipImageSimilarity, ImageSimilarity
from .image_statistics import STATISTICS, ColourReward, ImageStatistic
from .loading import load_reward

__all__ = [
    "LIKENESSES",
    "STATISTICS",
    "ClipImageSimilarity",
    "ClipReward",
    "ColourReward",
    "CombinedReward",
    "ImageSimilarity",
    "ImageStatistic",
    "Reward",
    "RewardError",
    "evaluate",
    "load_reward",
    "require_prompt",
]
