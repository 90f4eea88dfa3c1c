"""What travels along REWARD and GUIDANCE_NETWORK links."""

import math
from dataclasses import dataclass, field
from itertools import chain
from textwrap import shorten

import comfy.model_management
from torch.utils.weak import WeakTensorKeyDictionary

from ...guidance.errors import GuidanceError
from ...guidance.network.card import Card
from ...guidance.network.unet import GuidanceNetwork
from ...guidance.rewards import Reward
from .autograd import GradientPatcher, manage


@dataclass(frozen=True)
class LoadedReward:
    """What travels along a REWARD link: the reward, and a patcher for each of its parts that has weights."""

    reward: Reward
    patchers: tuple[GradientPatcher, ...] = ()
    scored: WeakTensorKeyDictionary = field(
        default_factory=WeakTensorKeyDictionary, init=False, compare=False, repr=False
    )
    """Pictures that are still around -> prompt -> what was said of them."""


def manage_reward(reward: Reward) -> LoadedReward:
    """Freeze a reward in evaluation mode, manage its weights, and let interrupts stop it between layers."""
    if not isinstance(reward, Reward):
        raise GuidanceError(
            f"manage_reward takes a Reward, not {shorten(repr(reward), 90)}; derive a class from Reward and give it an object of it."
        )
    if not 0 < reward.reference_std < math.inf:
        raise GuidanceError(
            f"{reward.name} has a reference_std of {reward.reference_std}; it must be the typical spread of its scores, above 0."
        )
    for module in reward.eval().requires_grad_(False).modules():
        module.register_forward_pre_hook(_stop_if_interrupted)
    return LoadedReward(
        reward, (manage(reward),) if any(True for _ in chain(reward.parameters(), reward.buffers())) else ()
    )


def _stop_if_interrupted(*_) -> None:
    comfy.model_management.throw_exception_if_processing_interrupted()


@dataclass(frozen=True, eq=False)
class LoadedNetwork:
    """What travels along a GUIDANCE_NETWORK link."""

    network: GuidanceNetwork
    card: Card
    patcher: GradientPatcher

    def require(self, target: str, advice: str) -> None:
        """Raise GuidanceError where a network that tilts data is to tilt noise, or the other way round."""
        if self.card.base.target != target:
            raise GuidanceError(f"This guidance network tilts {self.card.base.target}, not {target}: use {advice}.")


def manage_network(network: GuidanceNetwork, card: Card) -> LoadedNetwork:
    return LoadedNetwork(network, card, manage(network))
