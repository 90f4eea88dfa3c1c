"""What all samples of a collection have in common, and its form as JSON."""

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
"""Letters of a value that an error about two of them quotes."""
ROUNDED = 1e-4
"""How far the highest noise level of a model may lie above that of its process."""


@dataclass(frozen=True)
class Description:
    """What every shard of a collection has in common."""

    base: Base
    shape: tuple[int, ...]
    """Of a latent (C,H,W) or (C,T,H,W)."""
    levels: int
    """Noised states per sample, K; 0 where the process needs no model."""
    prompts: tuple[str, ...]
    rewards: tuple[str, ...]
    reward_means: tuple[float, ...]
    reward_stds: tuple[float, ...]
    seed: int
    settings: str = ""
    """How the samples were drawn, in lines, for people and for telling one collection from another."""
    reward_weights: tuple[float, ...] = ()
    """Of the rewards where nothing else is said; they can be changed without sampling again. Empty means 1 each."""

    def __post_init__(self):
        if fault := next(self.faults(), None):
            raise GuidanceError(f"Samples cannot have {fault}.")

    def faults(self) -> Iterator[str]:
        """What cannot be, and what it must be, in words."""
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
        """A digest of what tells these samples from others. What has its default is left out, so that later versions may
        add to it; and numbers are as collection.json has them."""
        same = record(Description, asdict(self))
        parts = [list(changed(each).items()) for each in (same.base, same)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def written(self) -> str:
        """As collection.json has it."""
        return json.dumps(asdict(self), indent=1)

    def seed_of(self, index: int) -> int:
        return (self.seed + index) % 2**64

    def prompt_of(self, index: int) -> int:
        return index % len(self.prompts)

    def weights(self, wanted: Sequence[float] = ()) -> tuple[float, ...]:
        """A weight for each reward: those wanted, or those of the collection."""
        weights = tuple(wanted) or self.reward_weights or (1.0,) * len(self.rewards)
        if len(weights) != len(self.rewards):
            names = short(", ".join(self.rewards))
            raise GuidanceError(
                f"The samples have scores of {names}: give one weight for each, not {len(weights)} in all."
            )
        if not 0 < math.hypot(*weights) < math.inf:
            given = short(", ".join(f"{weight:g}" for weight in weights))
            raise GuidanceError(f"Weights must be finite numbers and not all 0, not {given}.")
        return weights

    def combined(self, scores: Tensor, weights: Sequence[float] = ()) -> Tensor:
        """Raw scores (N,R) -> (N,), combined as CombinedReward does: Σ w·z / |w|, z the standardized scores."""
        means, stds = (torch.tensor(values) for values in (self.reward_means, self.reward_stds))
        weight = torch.tensor(self.weights(weights))
        return ((scores - means) / stds * weight).sum(1) / weight.norm()

    def differences(self, other: "Description") -> list[str]:
        """What the other says otherwise: name, old and new value."""
        old, new = ({**asdict(one.base), **asdict(one)} for one in (self, other))
        names = [name for name in old if name not in ("base", "reward_weights") and old[name] != new[name]]
        return [f"{name.replace('_', ' ')} {change(old[name], new[name])}" for name in names]


def change(old: Any, new: Any) -> str:
    """Two values in short; of lists of texts, the first that differ."""
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
    """Whether they are so many numbers of single precision, from the least on."""
    return len(values) == count and all(least <= value <= FLOAT.max for value in values)


def known_process(name: str) -> bool:
    try:
        return bool(process_named(name))
    except GuidanceError:
        return False


def changed(values: Any) -> dict[str, Any]:
    """The fields of a dataclass that are not at their defaults; without those that may change, or are dataclasses."""
    given = {
        item.name: getattr(values, item.name) for item in fields(values) if getattr(values, item.name) != item.default
    }
    return {name: value for name, value in given.items() if name not in ("base", "reward_weights")}


def described(content: str) -> Description:
    """The description in the text of a collection.json. Raises ValueError, which says what is wrong with it."""
    values = json.loads(content, object_pairs_hook=unique)
    if not isinstance(values, dict):
        raise ValueError("it has no names")
    base, known = values.get("base"), {item.name for kind in (Description, Base) for item in fields(kind)}
    if unknown := [name for name in (*values, *(base if isinstance(base, dict) else ())) if name not in known]:
        raise NewerError(quoted(unknown[0]))
    return record(Description, values)


class NewerError(ValueError):
    """A newer version of the pack wrote what this one does not know."""


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Values by name. Raises ValueError where a name stands there twice."""
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a name stands there twice")
    return values
