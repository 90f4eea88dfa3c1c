from .aesthetic import AestheticReward
from .base import Reward, RewardError, evaluate, evaluate_unchecked, require_prompt
from .clip import CLIP_KINDS, ClipReward
from .combine import CombinedReward, breakdown, parts_of
from .files import LoadOptions
from .image_reward import ImageReward
from .image_similarity import LIKENESSES, ClipImageSimilarity, ImageSimilarity
from .image_statistics import STATISTICS, ColourReward, ImageStatistic
from .loading import load_reward

__all__ = [
    "CLIP_KINDS",
    "LIKENESSES",
    "STATISTICS",
    "AestheticReward",
    "ClipImageSimilarity",
    "ClipReward",
    "ColourReward",
    "CombinedReward",
    "ImageReward",
    "ImageSimilarity",
    "ImageStatistic",
    "LoadOptions",
    "Reward",
    "RewardError",
    "breakdown",
    "evaluate",
    "evaluate_unchecked",
    "load_reward",
    "parts_of",
    "require_prompt",
]
