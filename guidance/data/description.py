"""The description that all samples of a collection share, and its JSON format."""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from itertools import zip_longest
from os.path import commonprefix
from typing import Any

import torch
from torch import Tensor

from ..errors import GuidanceError, quoted, short
from ..network.card import Base
from ..process import process_named
from ..records import record

FLOAT = torch.finfo(torch.float32)
SHOWN = 60
"""Characters of each value that a message about two values shows."""
ROUNDED = 1e-4
"""Tolerance by which a noise level may exceed the highest one of its process."""


@dataclass(frozen=True)
class Description:
    """What all samples of a collection have in common. Raises GuidanceError for values that are not allowed."""

    base: Base
    shape: tuple[int, ...]
    """Shape of a latent: (C,H,W), or (C,T,H,W) of a video."""
    levels: int
    """Noised states per sample, K. 0 for the target noise, whose D is known."""
    prompts: tuple[str, ...]
    rewards: tuple[str, ...]
    reward_means: tuple[float, ...]
    reward_stds: tuple[float, ...]
    seed: int
    settings: str = ""
    """How the samples were made, one setting per line. Part of the identity."""
    reward_weights: tuple[float, ...] = ()
    """Default weights of the rewards. They may change without sampling again. Empty means 1 each."""

    def __post_init__(self):
        if fault := next(self.faults(), None):
            raise GuidanceError(f"Samples cannot have {fault}.")

    def faults(self) -> Iterator[str]:
        """The values that are not allowed, each as a phrase for a message."""
        base, count = self.base, len(self.rewards)
        sound = {
            "channels": (base.channels >= 1, "at least 1"),
            "process": (known_process(base.process), "one that this version of the pack knows, such as Flow"),
            "target": (base.target in ("data", "noise"), "data or noise"),
            "shape": (len(self.shape) in (3, 4) and min(self.shape) >= 1, "3 numbers of at least 1, or 4 for videos"),
            "levels": (self.levels == 0 if base.target == "noise" else self.levels >= 1, "at least 1, and 0 for noise"),
            "prompts": (len(self.prompts) >= 1, "at least one"),
            "rewards": (count >= 1, "at least one"),
            "reward_means": (within(self.reward_means, count), "a finite number for each reward"),
            "reward_stds": (within(self.reward_stds, count, FLOAT.tiny), "a number above 0 for each reward"),
            "reward_weights": (within(self.reward_weights or (0.0,) * count, count), "a finite number for each reward"),
            "seed": (-(2**63) <= self.seed < 2**64, "a number of 64 bits"),
        }
        values = asdict(base) | asdict(self)
        for name, (holds, must) in sound.items():
            if not holds:
                yield f"{name.replace('_', ' ')} {quoted(values[name])}: it must be {must}"

    @cached_property
    def identity(self) -> str:
        """A digest that distinguishes these samples from others.

        Fields at their defaults are left out, so that later versions can add fields. Numbers are as in collection.json.
        """
        same = record(Description, asdict(self))
        parts = [list(not_default(each).items()) for each in (same.base, same)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """The content of collection.json."""
        return json.dumps(asdict(self), indent=1)

    def seed_of(self, index: int) -> int:
        """The seed of a sample."""
        return (self.seed + index) % 2**64

    def prompt_of(self, index: int) -> int:
        """The prompt index of a sample."""
        return index % len(self.prompts)

    def weights(self, wanted: Sequence[float] = ()) -> tuple[float, ...]:
        """One weight per reward: those wanted, or the collection's defaults.

        Raises GuidanceError for another number of weights, and for weights that are not finite or all 0.
        """
        weights = tuple(wanted) or self.reward_weights or (1.0,) * len(self.rewards)
        if len(weights) != len(self.rewards):
            names = short(", ".join(self.rewards))
            raise GuidanceError(
                f"The samples have scores of {names}: give one weight for each reward, not {len(weights)} in all."
            )
        if not 0 < math.hypot(*weights) < math.inf:
            given = short(", ".join(f"{weight:g}" for weight in weights))
            raise GuidanceError(f"Weights must be finite numbers and not all 0, not {given}.")
        return weights

    def combined(self, scores: Tensor, weights: Sequence[float] = ()) -> Tensor:
        """Raw scores (N,R) -> (N,): Σ w·z / |w| as in CombinedReward, with z the standardized scores."""
        means, stds = (torch.tensor(values) for values in (self.reward_means, self.reward_stds))
        weight = torch.tensor(self.weights(weights))
        return ((scores - means) / stds * weight).sum(1) / weight.norm()

    def differences(self, other: "Description") -> list[str]:
        """Phrases for the fields in which the other description differs, with both values."""
        old, new = ({**asdict(one.base), **asdict(one)} for one in (self, other))
        names = [name for name in old if name not in ("base", "reward_weights") and old[name] != new[name]]
        return [f"{name.replace('_', ' ')} {was_and_is(old[name], new[name])}" for name in names]


def was_and_is(old: Any, new: Any) -> str:
    """Two values for a message, truncated to where they differ. For lists of texts, the first pair that differs."""
    values = [value.splitlines() if isinstance(value, str) else value for value in (old, new)]
    if all(isinstance(value, list | tuple) and all(isinstance(part, str) for part in value) for value in values):
        old, new = next((pair for pair in zip_longest(*values, fillvalue="none") if pair[0] != pair[1]), (old, new))
    old, new = str(old), str(new)
    start = max(0, len(commonprefix([old, new])) - 20) if max(len(old), len(new)) > SHOWN else 0
    shown = [
        f"{'…' if start else ''}{value[start : start + SHOWN]}{'…' if len(value) > start + SHOWN else ''}"
        for value in (old, new)
    ]
    return f"was {shown[0]} and is now {shown[1]}"


def within(values: Sequence[float], count: int, least: float = FLOAT.min) -> bool:
    """Whether there are `count` values, all within [least, maximum of single precision]."""
    return len(values) == count and all(least <= value <= FLOAT.max for value in values)


def known_process(name: str) -> bool:
    try:
        return bool(process_named(name))
    except GuidanceError:
        return False


def not_default(values: Any) -> dict[str, Any]:
    """The fields of a dataclass that differ from their defaults, without `base` and `reward_weights`."""
    given = {
        item.name: getattr(values, item.name) for item in fields(values) if getattr(values, item.name) != item.default
    }
    return {name: value for name, value in given.items() if name not in ("base", "reward_weights")}


def description_from(content: str) -> Description:
    """The description in the content of a collection.json. Raises ValueError, or NewerError for unknown entries."""
    values = json.loads(content, object_pairs_hook=unique_names)
    if not isinstance(values, dict):
        raise ValueError("it has no names")
    base, known = values.get("base"), {item.name for kind in (Description, Base) for item in fields(kind)}
    if unknown := [name for name in (*values, *(base if isinstance(base, dict) else ())) if name not in known]:
        raise NewerError(quoted(unknown[0]))
    return record(Description, values)


class NewerError(ValueError):
    """A file has an entry that this version of the pack does not know."""


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A dictionary of the pairs. Raises ValueError if a name occurs twice."""
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a name occurs twice")
    return values
