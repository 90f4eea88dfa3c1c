"""What a network file says of itself: the model it belongs to, and how it was trained."""

from dataclasses import dataclass, fields
from typing import Any

from ..errors import GuidanceError, short
from ..records import record
from .forms import FORMS


@dataclass(frozen=True)
class Base:
    """The diffusion model that samples, and so a network, belong to."""

    model: str
    """Its family by ComfyUI's name, as "SD3"."""
    latents: str
    """The latent format, as "SD3"."""
    channels: int
    process: str
    """Its name, as "Diffusion" or "Flow"."""
    target: str = "data"
    """What is tilted: "data", or the "noise" that a one-step generator begins with."""

    def require(self, other: "Base", what: str) -> None:
        """Raise GuidanceError where something made for `self` meets a model of another family, or one that was patched into another kind.

        Finetunes of a family are not told apart.
        """
        if self.model != other.model:
            raise GuidanceError(
                f"This {what} was made for {short(self.model)}, but the model is {other.model}: use one that was made for it."
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
    """What is known of a trained network."""

    base: Base
    form: str
    objective: str
    temperature: float
    """In standard deviations of the reward within a prompt."""
    rewards: tuple[str, ...]
    reward_weights: tuple[float, ...]
    reward_mean: float
    reward_std: float
    prompts: str
    """Digest of the prompts."""
    samples: int
    steps: int
    effective: float
    """Effective sample size of the labels, as a share."""
    curve: tuple[tuple[int, float], ...]
    """The last values of the loss on held-out samples, by step."""
    best: tuple[int, float] | None = None
    """Step and loss of the network that was kept, the best; nothing where no samples were held out."""
    shape: tuple[int, ...] = ()
    """Of the latents it was trained on (C,H,W) or (C,T,H,W), to which the noising process belongs; empty in files that do not say."""

    def describe(self) -> str:
        """What it was trained for, on what, and how that ended, in lines."""
        rewards = " + ".join(
            f"{weight:g} {name}" for name, weight in zip(self.rewards, self.reward_weights, strict=True)
        )
        lines = [
            f"{self.form} network for {self.base.model}: {rewards} at temperature {self.temperature:g}",
            f"{self.samples} samples, of which {self.effective:.1%} count; digest of the prompts {self.prompts}",
            f"reward {self.reward_mean:+.3f}, with a spread of {self.reward_std:.3f} within a prompt",
            f"{self.steps} steps of training by the objective {self.objective}",
        ]
        if self.best is not None:
            step, loss = self.best
            ended = f"; at the end it was {self.curve[-1][1]:.4f}" if step < self.steps else ""
            lines.append(f"best at step {step}, with a loss of {loss:.4f} on samples it was not trained on{ended}")
        return "\n".join(lines)


def card_from(content: Any) -> Card:
    """What this version knows of a card: a newer one may say more."""
    known = {item.name for item in fields(Card)}
    card = record(Card, {name: value for name, value in dict(content).items() if name in known})
    if card.form not in FORMS or len(card.rewards) != len(card.reward_weights):
        raise ValueError("its card contradicts itself")
    return card
