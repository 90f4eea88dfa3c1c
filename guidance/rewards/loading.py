"""Loads reward files. Their kind is recognised from their content, and no code in them is run."""

import logging
import math
from collections.abc import Callable
from pathlib import Path

import torch

from ..errors import pass_out_of_memory, quoted, short
from .aesthetic import is_aesthetic_head, load_aesthetic
from .base import Reward, RewardError
from .clip import load_clip, load_clip_of_towers
from .clip_checkpoint import has_image_tower, has_text_tower, unsupported
from .files import Hints, LoadOptions, Shapes, Weights, one_line, read
from .image_reward import is_image_reward, load_image_reward

log = logging.getLogger(__name__)

_SUPPORTED = "PickScore, HPS v2 and v2.1, any CLIP with ViT towers, LAION's aesthetic heads (v2) and ImageReward"

# A new kind of reward adds a line here: a test of its keys, and a function that builds the reward.
_KINDS: tuple[tuple[Callable[[Shapes], bool], Callable[[Weights, LoadOptions], Reward]], ...] = (
    (lambda keys: has_image_tower(keys) and has_text_tower(keys), load_clip),
    (has_image_tower, load_clip_of_towers),
    (is_aesthetic_head, load_aesthetic),
    (is_image_reward, load_image_reward),
)


@torch.inference_mode(False)
def load_reward(path: str | Path, options: LoadOptions | None = None) -> Reward:
    """The reward of a weights file or a Hugging Face folder, on the CPU.

    A weights file is a safetensors file, or a PyTorch checkpoint without code. The safetensors metadata may give kind,
    reference_mean, reference_std, vision_heads, text_heads and quick_gelu. Weights are not checked for finite numbers;
    `evaluate` refuses the first score that is not finite. Raises RewardError if the file cannot be used.
    """
    weights = read(path)
    reward = build_reward(weights, options or LoadOptions())
    reward.name, reward.files = weights.name, (*weights.files, *reward.files)
    reward.reference_mean = _number(weights.hints, "reference_mean", reward.reference_mean)
    reward.reference_std = _number(weights.hints, "reference_std", reward.reference_std)
    if reward.reference_std <= 0:
        raise RewardError(
            f"The metadata of {weights.path.name} gives reference_std as {reward.reference_std}; it must be positive."
        )
    log.info("%s is used as %s.", weights.path.name, reward.description)
    return reward


def build_reward(weights: Weights, options: LoadOptions) -> Reward:
    """The reward of weights that were read. Raises RewardError if they are of no known kind, or damaged."""
    name, shapes = weights.path.name, weights.shapes
    if other := unsupported(shapes):
        raise RewardError(
            f"{name} is {other}, which cannot be read; "
            "of CLIPs only those with ViT towers and CLIP's own text tower can."
        )
    for recognises, build in _KINDS:
        if recognises(shapes):
            try:
                return build(weights, options)
            except RewardError as error:
                raise RewardError(f"{name}: {error}") from error
            except (LookupError, ValueError, TypeError, ArithmeticError, RuntimeError) as error:
                pass_out_of_memory(error, f"{name} was loaded")
                advice = "download it again, or use the published file where this one was converted"
                raise RewardError(
                    f"{name} is of a known kind, but its weights do not fit together ({one_line(error)}); {advice}."
                ) from error
    if has_text_tower(shapes):
        raise RewardError(
            f"{name} is a text tower alone; choose the image tower that belongs to it, and this as its text tower."
        )
    found = short(", ".join(sorted(shapes)[:3])) or "no tensors"
    raise RewardError(f"{name} is not a reward that can be read (it holds {found}); supported are {_SUPPORTED}.")


def _number(hints: Hints, key: str, default: float) -> float:
    if key not in hints:
        return default
    try:
        number = float(hints[key])
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise RewardError(
            f"The metadata entry {key} must be a number, not {quoted(hints[key])}; correct it or remove it."
        )
    return number
