"""The metadata of a network file: the model it belongs to, and how it was trained."""

import math
from dataclasses import dataclass, fields
from typing import Any

from ..errors import GuidanceError, quoted, short
from ..records import record
from .forms import FORMS

FORMS_OF_NOISE = ("noise", "leap")
LARGEST = 2**28
"""Most numbers that a latent may have, more than any model makes. A file that claims more would use up all memory."""


@dataclass(frozen=True)
class Base:
    """The kind of diffusion model that samples and networks belong to."""

    model: str
    """The model family by ComfyUI's name, such as "SD3"."""
    latents: str
    """The latent format, such as "SD3"."""
    channels: int
    """Channels of a latent."""
    process: str
    """The name of the noising process, such as "Diffusion" or "Flow"."""
    target: str = "data"
    """The distribution that is tilted: "data", or the "noise" that a one-step generator starts from."""

    def require(self, other: "Base", what: str) -> None:
        """Raise GuidanceError if something made for `self` does not fit `other`.

        what: names it in the message. Finetunes of a family are not distinguished.
        """
        if self.model != other.model:
            raise GuidanceError(
                f"This {what} was made for {short(self.model)}, but the model is {other.model}: "
                "use one that was made for it."
            )
        for item, name in (
            ("latents", "latents"),
            ("channels", "latent channels"),
            ("process", "noising process"),
            ("target", "target"),
        ):
            mine, theirs = getattr(self, item), getattr(other, item)
            if mine != theirs:
                raise GuidanceError(
                    f"This {what} was made for {self.model} with the {name} {short(mine)}, but here it is {theirs}."
                )


@dataclass(frozen=True)
class Card:
    """How a network was trained."""

    base: Base
    form: str
    objective: str
    temperature: float
    """β in standard deviations of the reward within a prompt."""
    rewards: tuple[str, ...]
    reward_weights: tuple[float, ...]
    reward_mean: float
    reward_std: float
    """Standard deviation of the reward within a prompt."""
    prompts: str
    """Digest of the prompts."""
    samples: int
    steps: int
    effective: float
    """Effective sample size of the labels, as a share of the samples."""
    curve: tuple[tuple[int, float], ...]
    """Step and held-out loss of the last evaluations."""
    best: tuple[int, float] | None = None
    """Step and held-out loss of the network that was kept. None if no samples were held out."""
    shape: tuple[int, ...] = ()
    """Shape (C,H,W) or (C,T,H,W) of the latents in training, on which the process may depend. Empty if unknown."""

    def describe(self) -> str:
        """A summary for people, several lines."""
        rewards = " + ".join(
            f"{weight:g} {name}" for name, weight in zip(self.rewards, self.reward_weights, strict=True)
        )
        lines = [
            f"{self.form} network for {self.base.model}: {rewards} at temperature {self.temperature:g}",
            f"{self.samples} samples, of which {self.effective:.1%} count; digest of the prompts {self.prompts}",
            f"mean reward {self.reward_mean:+.3f}, with a standard deviation of {self.reward_std:.3f} within a prompt",
            f"{self.steps} steps of training by the objective {self.objective}",
        ]
        if self.best is not None:
            step, loss = self.best
            last = f"; the last was {self.curve[-1][1]:.4f}" if step < self.steps else ""
            lines.append(f"best at step {step}, with a held-out loss of {loss:.4f}{last}")
        return "\n".join(lines)


def card_from(content: Any) -> Card:
    """The card in JSON content. Entries of newer versions are ignored. Raises ValueError if it is damaged."""
    known = {item.name for item in fields(Card)}
    card = record(Card, {name: value for name, value in dict(content).items() if name in known})
    if card.form not in FORMS or len(card.rewards) != len(card.reward_weights):
        raise ValueError("its card contradicts itself")
    if card.base.target != ("noise" if card.form in FORMS_OF_NOISE else "data") or (card.best and not card.curve):
        raise ValueError("its card contradicts itself")
    if card.shape and not (len(card.shape) in (3, 4) and min(card.shape) >= 1 and math.prod(card.shape) <= LARGEST):
        raise ValueError(f"shape cannot be {quoted(card.shape)}")
    return card
