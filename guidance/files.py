"""Guidance networks as files: one safetensors each, whose metadata says what it is and what it belongs to."""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from .errors import GuidanceError
from .network import Architecture, GuidanceNetwork

FORMAT = "reward-guidance-network"
VERSION = 1


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
            raise GuidanceError(f"This {what} was made for {self.model}, but the model is {other.model}: use one that was made for it.")
        for item, name in (("latents", "latents"), ("channels", "latent channels"), ("process", "noising process"), ("target", "target")):
            mine, theirs = getattr(self, item), getattr(other, item)
            if mine != theirs:
                raise GuidanceError(f"This {what} was made for {self.model} with the {name} {mine}, but here it is {theirs}.")


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
        rewards = " + ".join(f"{weight:g} {name}" for name, weight in zip(self.rewards, self.reward_weights, strict=True))
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


def save_network(path: Path, network: GuidanceNetwork, card: Card, advice: str = "Mend that and save again.") -> None:
    """Whole or not at all. Raises GuidanceError where the disk does not take it."""
    metadata = {"format": FORMAT, "version": str(VERSION), "architecture": json.dumps(asdict(network.architecture)), "card": json.dumps(asdict(card))}
    weights = {name: tensor.contiguous().cpu() for name, tensor in network.state_dict().items()}
    write(path, lambda partial: save_file(weights, partial, metadata), advice)


def write(path: Path, save: Callable[[Path], object], advice: str = "Mend that and run again: it goes on from here.") -> None:
    """Save to a path, whole or not at all. Raises GuidanceError, with advice, where the disk does not take it."""
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save(partial)
        os.replace(partial, path)
    except Exception as error:
        with suppress(OSError):
            partial.unlink()
        reason = str(error).partition("\n")[0]
        raise GuidanceError(f"{path.name} could not be written ({reason}). {advice}") from error


def load_network(path: Path) -> tuple[GuidanceNetwork, Card]:
    """Raises GuidanceError, in a sentence, for whatever is not a guidance network or a damaged one."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise GuidanceError(f"{path.name} is not a safetensors file, or only half of one; copy it again.") from error
    if metadata.get("format") != FORMAT:
        raise GuidanceError(f"{path.name} is not a guidance network; Save Guidance Network writes those.")
    if metadata.get("version") != str(VERSION):
        raise GuidanceError(f"{path.name} has version {metadata.get('version')} of the format; this pack reads {VERSION}. Update the pack.")
    try:
        network = GuidanceNetwork(Architecture(**json.loads(metadata["architecture"])))
        network.load_state_dict(weights)
        return network.eval().requires_grad_(False), _card(json.loads(metadata["card"]))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise GuidanceError(f"{path.name} is a guidance network, but a damaged one ({type(error).__name__}); copy it again.") from error


def _card(content: dict[str, Any]) -> Card:
    known = {item.name for item in fields(Card)}
    values = {name: _tuples(value) for name, value in content.items() if name in known}
    return Card(**values | {"base": Base(**content["base"])})


def _tuples(value: Any) -> Any:
    return tuple(_tuples(part) for part in value) if isinstance(value, list) else value
