"""The values of REWARD and GUIDANCE_NETWORK links."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from textwrap import shorten

import comfy.model_management
from torch.utils.weak import WeakTensorKeyDictionary

from ...guidance.errors import GuidanceError
from ...guidance.network.card import Card
from ...guidance.network.unet import GuidanceNetwork
from ...guidance.rewards import CombinedReward, Reward
from .autograd import GradientPatcher, manage


@dataclass(frozen=True)
class LoadedReward:
    """The value of a REWARD link: the reward, and a patcher for each part that has weights."""

    reward: Reward
    patchers: tuple[GradientPatcher, ...] = ()
    scored: WeakTensorKeyDictionary = field(
        default_factory=WeakTensorKeyDictionary, init=False, compare=False, repr=False
    )
    """Image batches that still exist -> prompt -> the reward and its parts with their scores."""


def manage_reward(reward: Reward) -> LoadedReward:
    """Freeze a reward, hand its weights to ComfyUI's model management, and let interrupts stop it between layers.

    Raises GuidanceError if it is no Reward, or if its reference_std is not a finite number above 0.
    """
    if not isinstance(reward, Reward):
        raise GuidanceError(
            f"manage_reward takes a Reward, not {shorten(repr(reward), 90)}; "
            "derive a class from Reward and pass an instance of it."
        )
    if not 0 < reward.reference_std < math.inf:
        raise GuidanceError(
            f"{reward.name} has a reference_std of {reward.reference_std}; "
            "it must be the typical spread of its scores, above 0."
        )
    for module in reward.eval().requires_grad_(False).modules():
        module.register_forward_pre_hook(_stop_if_interrupted)
    return LoadedReward(
        reward, (manage(reward),) if any(True for _ in chain(reward.parameters(), reward.buffers())) else ()
    )


def combine_rewards(rewards: Sequence[LoadedReward | None], weights: Sequence[float]) -> LoadedReward:
    """The weighted sum of the connected rewards. Raises GuidanceError if every weight is 0."""
    parts = [
        (loaded, weight) for loaded, weight in zip(rewards, weights, strict=True) if loaded is not None and weight != 0
    ]
    if not parts:
        raise GuidanceError("Combine Rewards has nothing to combine: every weight is 0.")
    reward = CombinedReward([loaded.reward for loaded, _ in parts], [weight for _, weight in parts])
    return LoadedReward(reward, tuple(dict.fromkeys(patcher for loaded, _ in parts for patcher in loaded.patchers)))


def _stop_if_interrupted(*_) -> None:
    comfy.model_management.throw_exception_if_processing_interrupted()


@dataclass(frozen=True, eq=False)
class LoadedNetwork:
    """The value of a GUIDANCE_NETWORK link: the network, its card, and the patcher of its weights."""

    network: GuidanceNetwork
    card: Card
    patcher: GradientPatcher

    def require(self, target: str, advice: str) -> None:
        """Raise GuidanceError if the network was trained for the other target. target: "data" or "noise"."""
        if self.card.base.target != target:
            raise GuidanceError(f"This guidance network tilts {self.card.base.target}, not {target}: use {advice}.")


def manage_network(network: GuidanceNetwork, card: Card) -> LoadedNetwork:
    return LoadedNetwork(network, card, manage(network))
