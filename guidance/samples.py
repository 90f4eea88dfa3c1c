"""Labelled samples on disk: shards of safetensors that training reads without a diffusion model.

    collection.json         what they belong to, and the prompts
    prompts.safetensors     tokens and pooled text of each prompt
    shard-00000.safetensors a fixed number of samples each: latents, scores, prompt, seed, and K noised states with the model's D

Only D is kept of a noised state; its noise is drawn again from the sample's seed. A training reads what it needs of the
shards, and a collection may be larger than memory.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from itertools import zip_longest
from os.path import commonprefix
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .errors import GuidanceError, pass_out_of_memory, quoted, short
from .files import Base
from .files import write as write_whole
from .network import Text
from .process import Process, column, process_named
from .randomness import generator
from .records import record
from .stored import OWNER, Stored, StoredRows, is_finite, not_finite, reason, shown, stored
from .training import Batch

SHARD = 32
FLOAT = torch.finfo(torch.float32)
SHOWN = 60
"""Letters of a value that an error about two of them quotes."""
SHARD_NAME = re.compile(r"shard-([0-9]{5,9})\.safetensors")
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
            raise GuidanceError(f"The samples have scores of {names}: give one weight for each, not {len(weights)} in all.")
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
    shown = [f"{'…' if start else ''}{value[start : start + SHOWN]}{'…' if len(value) > start + SHOWN else ''}" for value in (old, new)]
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
    given = {item.name: getattr(values, item.name) for item in fields(values) if getattr(values, item.name) != item.default}
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


@dataclass(frozen=True)
class Sample:
    """What is kept of one sample."""

    clean: Tensor
    """(C,...) in the model's space."""
    scores: Tensor
    """(R,) raw, one for each reward."""
    sigma: Tensor
    """(K,)"""
    denoised: Tensor
    """(K,C,...)"""


def noise(shape: Sequence[int], seed: int, level: int) -> Tensor:
    """The noise of one noised state of a sample."""
    return torch.randn(tuple(shape), generator=generator(seed, level))


def states(
    clean: Tensor, scores: Tensor, seeds: Sequence[int], sigmas: Tensor, process: Process, denoise: Callable[[Tensor, Tensor], Tensor]
) -> list[Sample]:
    """Clean latents (N,C,...) with scores (N,R), noised to levels σ (N,K), and the model's D: denoise(x (N,C,...), σ (N,)) -> (N,C,...).

    They are noised as they will be again in training: from the half precision that they are stored in.
    """
    clean = half(clean.cpu()).float()
    denoised = []
    for level, sigma in enumerate(sigmas.unbind(1)):
        drawn = torch.stack([noise(clean.shape[1:], seed, level) for seed in seeds])
        denoised.append(denoise(process.add_noise(clean, drawn, column(sigma, clean)), sigma).cpu())
    return [Sample(*each) for each in zip(clean, scores, sigmas, torch.stack(denoised, 1), strict=True)]


def percents(seed: int, levels: int) -> Tensor:
    """Where in the sampling (K,), 0 noise and 1 clean, the noised states of a sample lie: one in each of K equal parts."""
    return (torch.arange(levels) + torch.rand(levels, generator=generator(seed, -1))) / max(levels, 1)


class DamagedError(GuidanceError):
    """A file of a collection that is written anew when it is collected again."""


@dataclass(frozen=True)
class Shard:
    """Samples that lie in one file, of which nothing but scores and noise levels is read yet."""

    numbers: range
    scores: Tensor
    """(N,R)"""
    sigma: Tensor
    """(N,K)"""
    clean: Stored
    denoised: Stored


@dataclass(frozen=True)
class Collection:
    """A folder of shards. Samples are numbered; which seed and prompt a number has is known beforehand, so any number can be redone."""

    folder: Path
    description: Description

    @staticmethod
    def create(folder: Path, description: Description, text: "Text | Texts | Callable[[], Texts]") -> "Collection":
        """Begin a collection, or go on with one of the same description. Raises GuidanceError where another lies there.

        text: of each prompt; a function is called only where it is not on disk yet.
        """
        existing, collection = Collection.described(folder), Collection(folder, description)
        if existing:
            collection.require_same(existing)
        elif collection.files():
            what = f"{folder.name} holds samples, but no collection.json says of what"
            raise GuidanceError(f"{what}: choose another folder, or take the samples away.")
        rows = None if existing and collection.has_text() else rows_of(text() if callable(text) else text)
        if existing is None:
            try:
                write_text(folder / "collection.json", description.written(), new=True)
            except FileExistsError:  # another process was faster
                return Collection.create(folder, description, text)
        elif existing != description:
            write_text(folder / "collection.json", description.written())
        if rows is not None:
            write(folder / "prompts.safetensors", rows, description.identity)
        return collection

    @staticmethod
    def open(folder: Path) -> "Collection":
        """Raises GuidanceError where there is none, or its collection.json cannot be used."""
        if (description := Collection.described(folder)) is None:
            raise GuidanceError(f"{folder.name} holds no samples; Collect Guidance Data makes them.")
        return Collection(folder, description)

    @staticmethod
    def described(folder: Path) -> Description | None:
        """What collection.json says; none where there is no such file. Raises GuidanceError where it cannot be used."""
        path = folder / "collection.json"
        try:
            return described(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except OSError as error:
            told = f"{shown(path)} cannot be read ({reason(error)})"
            raise GuidanceError(f"{told}: mend that, or collect into another folder.") from error
        except NewerError as error:
            told = f"{shown(path)} has {error}, which this version of the pack does not know"
            raise GuidanceError(f"{told}: update the pack, or collect into another folder.") from error
        except (ValueError, RecursionError) as error:
            told = f"{shown(path)} is damaged ({str(error).rstrip('.')})"
            raise GuidanceError(f"{told}: put a copy of it back, or collect into another folder.") from error

    def require_same(self, other: Description) -> None:
        """Raise GuidanceError where samples of the other description lie in this folder."""
        if different := other.differences(self.description):
            more = f" and {len(different) - 2} more" if len(different) > 2 else ""
            told = ", ".join(different[:2]) + more
            raise GuidanceError(f"{self.folder.name} holds other samples: {told}. Choose another folder, or set that back.")

    def path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05}.safetensors"

    def missing(self, count: int) -> Iterator[range]:
        """The numbers of the samples of every shard that is not there yet, or damaged, up to `count` samples.

        Raises GuidanceError where what lies in the place of a shard is something else.
        """
        for shard in range(-(-count // SHARD)):
            numbers = range(shard * SHARD, min((shard + 1) * SHARD, count))
            if not self.has(numbers):
                yield numbers

    def has(self, numbers: range) -> bool:
        """Whether the samples of a shard with these numbers can be read."""
        try:
            return len(self.shard(numbers.start // SHARD).numbers) >= len(numbers)
        except (FileNotFoundError, DamagedError):
            return False

    def has_text(self) -> bool:
        """Whether the text of the prompts can be read."""
        try:
            return bool(self.text())
        except GuidanceError:
            return False

    def whole(self, count: int) -> bool:
        """Whether so many samples and the text of the prompts can be read, and are those of this description."""
        try:
            self.require_described()
            return next(self.missing(count), None) is None and self.has_text()
        except GuidanceError:
            return False

    def add(self, numbers: range, samples: Sequence[Sample]) -> None:
        """Write one shard. A sample that is not all finite numbers keeps its place, without scores: `load` leaves it out.

        Raises GuidanceError where all are such, where the disk is full, or where the folder was taken away; what is there already stays.
        """
        stacked = {name: torch.stack([getattr(sample, name) for sample in samples]) for name in ("clean", "scores", "sigma", "denoised")}
        sound = torch.stack([part.flatten(1).isfinite().all(1).cpu() for part in stacked.values()]).all(0)
        if not sound.any():
            raise GuidanceError(f"None of {len(samples)} samples is made of finite numbers: the model, the decoder or the reward is damaged.")
        scores = stacked["scores"].cpu().masked_fill(~sound[:, None], math.nan)
        halves = {name: half(stacked[name]).cpu() for name in ("clean", "denoised")}
        self.describe_again()
        if not self.has(numbers):  # nor has another process written it meanwhile
            rows = {"scores": scores, "sigma": stacked["sigma"].contiguous().cpu()} | halves
            write(self.path(numbers.start // SHARD), rows, self.owner(numbers.start // SHARD))

    def owner(self, shard: int) -> str:
        """What a shard says it belongs to: these samples, at this place among them."""
        return f"{self.description.identity} {shard}"

    def describe_again(self) -> None:
        """Write collection.json again where it alone was deleted. Raises GuidanceError where more was, or where other
        samples took its place."""
        if (found := Collection.described(self.folder)) is not None:
            self.require_same(found)
        elif not self.has_text():
            what = f"{self.folder.name} was deleted or moved while its samples were collected"
            raise GuidanceError(f"{what}: queue again, which collects them anew.")
        else:
            write_text(self.folder / "collection.json", self.description.written())

    def require_described(self) -> None:
        """Raise GuidanceError where the folder holds other samples than those of this description, or none."""
        self.require_same(Collection.open(self.folder).description)

    def shard(self, number: int) -> Shard:
        """One shard, after all that is to be checked of it.

        Raises FileNotFoundError where there is none, DamagedError where it must be made anew, and GuidanceError where
        something else lies in its place, which is not written over.
        """
        path, expected = self.path(number), self.shapes()
        try:
            parts = stored(path)
        except SafetensorError as error:
            raise self.damaged(number, "It is no safetensors file, or not all of one.") from error
        except FileNotFoundError:
            raise
        except OSError as error:
            pass_out_of_memory(error, f"{path.name} was read")
            told = f"{shown(path)} cannot be read ({reason(error)})"
            raise GuidanceError(f"{told}: mend that, or take it away and collect again.") from error
        if other := self.stranger(number, parts):
            raise GuidanceError(f"{shown(path)} belongs to another {other}: take it away and collect again.")
        if parts.keys() != expected.keys() or None in {part.dtype for part in parts.values()}:
            raise self.damaged(number, f"It must have floating point numbers by the names {', '.join(expected)}.")
        if len(rows := {len(part) for part in parts.values()}) > 1 or not 1 <= min(rows) <= SHARD:
            counts = " and ".join(map(str, sorted(rows)))
            raise self.damaged(number, f"Its parts have {counts} rows, and must all have one number of 1 to {SHARD}.")
        scores, sigma = (parts[name][()].float() for name in ("scores", "sigma"))
        scored, highest = scores.isfinite().all(1), process_named(self.description.base.process).highest + ROUNDED
        if not scored.any():
            raise self.damaged(number, "None of its samples has a score.")
        if not ((sigma[scored] > 0) & sigma[scored].isfinite() & (sigma[scored] <= highest)).all():
            raise self.damaged(number, "It has noise levels that there are not.")
        numbers = range(number * SHARD, number * SHARD + len(scores))
        return Shard(numbers, scores, sigma, parts["clean"], parts["denoised"])

    def stranger(self, number: int, parts: Mapping[str, Stored]) -> str:
        """What the parts of a shard belong to, if not there: by what their file says, or as they have other shapes."""
        owners, expected = {part.owner for part in parts.values()} - {None, self.owner(number)}, self.shapes()
        if any(str(owner).startswith(f"{self.description.identity} ") for owner in owners):
            return "place in this collection"
        shapes = any(name not in expected or part.shape[1:] != expected[name] for name, part in parts.items())
        return "collection" if owners or shapes else ""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of one row of each part of a shard."""
        described = self.description
        noised = (described.levels, *described.shape)
        return {"clean": described.shape, "scores": (len(described.rewards),), "sigma": noised[:1], "denoised": noised}

    def damaged(self, number: int, why: str) -> DamagedError:
        enough = f" with a count above {number * SHARD}," if number else ""
        advice = f"collect again,{enough} which redoes only that shard, or delete it"
        return DamagedError(f"{shown(self.path(number))} is damaged: {advice}. {why}")

    def shards(self) -> Iterator[Shard]:
        """Every shard. Raises GuidanceError that names one which cannot be used."""
        for number in self.files():
            with suppress(FileNotFoundError):  # deleted at this moment
                yield self.shard(number)

    def files(self) -> list[int]:
        """The numbers of the shards that have a file; copies by other names are none."""
        names = {path.name for path in self.folder.glob("shard-*.safetensors")}
        numbers = {int(match[1]) for match in map(SHARD_NAME.fullmatch, names) if match}
        return sorted(number for number in numbers if self.path(number).name in names)

    def load(self) -> "Samples":
        """All samples that could be scored; of latents nothing is read yet. Raises GuidanceError where there are none, or a shard does not fit."""
        self.require_described()
        if not (found := list(self.shards())):
            raise GuidanceError(f"{self.folder.name} holds no samples yet; collect some first.")
        return self.samples(found)

    def first(self, count: int) -> "Samples | None":
        """So many samples, or fewer, of the first shard that can be read; none where there is none."""
        for number in self.files():
            with suppress(FileNotFoundError, DamagedError):
                samples = self.samples([self.shard(number)])
                return samples.rows(torch.arange(min(count, len(samples))))
        return None

    def samples(self, found: Sequence[Shard]) -> "Samples":
        """Those of shards that could be scored."""
        scores = torch.cat([shard.scores for shard in found])
        scored = torch.where(scores.isfinite().all(1))[0]
        numbers = torch.tensor([number for shard in found for number in shard.numbers])
        sigma = torch.cat([shard.sigma for shard in found])
        clean, denoised = (Rows.of([getattr(shard, name) for shard in found]) for name in ("clean", "denoised"))
        whole = Samples(self.description, numbers, self.text(), clean, scores, sigma, denoised)
        return replace(whole.rows(scored), unscored=len(scores) - len(scored))

    def text(self) -> "Texts":
        """The text of every prompt. Raises GuidanceError where it is not all there."""
        path, count = self.folder / "prompts.safetensors", range(len(self.description.prompts))
        try:
            parts = stored(path)
            tokens, pooled = ([parts.pop(f"{kind}.{i}") for i in count] for kind in ("tokens", "pooled"))
            own = tokens[0].owner in (None, self.description.identity)
            if parts or not (own and alike(tokens, 2) and alike(pooled, 1)):
                raise DamagedError("It has other parts than the texts of these prompts.")
            vectors = torch.stack([row[()] for row in pooled])
            if not is_finite(vectors):
                raise not_finite(pooled[0])
            return Texts(StoredRows(tokens), vectors)
        except (OSError, SafetensorError, KeyError, GuidanceError) as error:
            raise DamagedError(f"{shown(path)} is missing or damaged: collect again, which writes it anew.") from error


def alike(parts: Sequence[Stored], dimensions: int) -> bool:
    """Whether all are floating point numbers of so many dimensions and the same size in the last."""
    kinds = {(len(part.shape), part.shape[-1:], part.dtype is None) for part in parts}
    return kinds == {(dimensions, parts[0].shape[-1:], False)}


def rows_of(text: "Text | Texts") -> dict[str, Tensor]:
    """The texts of prompts as they are kept."""
    return {f"{kind}.{i}": half(row) for kind in ("tokens", "pooled") for i, row in enumerate(getattr(text, kind))}


def half(tensor: Tensor) -> Tensor:
    """In half precision; what lies beyond its range is brought to its end."""
    most = torch.finfo(torch.float16).max
    return tensor.clamp(-most, most).half().contiguous()


@dataclass(frozen=True)
class Rows:
    """Rows (N,...) that lie in several tensors, as of files, and are read when they are asked for."""

    parts: tuple[Tensor | Stored, ...]
    places: Tensor
    """(N,2) the part that a row lies in, and where in it."""

    @staticmethod
    def of(parts: Sequence[Tensor | Stored]) -> "Rows":
        return Rows(tuple(parts), torch.tensor([(i, row) for i, part in enumerate(parts) for row in range(len(part))]))

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self), *self.parts[0].shape[1:]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index) -> Tensor:
        """The rows (B,), or what stands at further places (B,) in each, as of one tensor."""
        rows, *within = index if isinstance(index, tuple) else (index,)
        places = list(zip(*(indices.tolist() for indices in (*self.places[rows].unbind(-1), *within)), strict=True))
        read = [self.parts[part][tuple(place)] for part, *place in places]
        found = torch.stack(read)
        if not is_finite(found):
            part = next(self.parts[part] for (part, *_), each in zip(places, read, strict=True) if not is_finite(each))
            raise not_finite(part)
        return found

    def chosen(self, rows: Tensor) -> "Rows":
        return replace(self, places=self.places[rows])


@dataclass(frozen=True)
class Texts:
    """The texts of all prompts, of several lengths."""

    tokens: Sequence[Tensor]
    """(T_i,E) of each."""
    pooled: Tensor
    """(N,P)"""

    def __getitem__(self, rows: Tensor) -> Text:
        """Those of some, as long as the longest of them, zero where there is none."""
        tokens = torch.nn.utils.rnn.pad_sequence([self.tokens[row] for row in rows], batch_first=True)
        if not is_finite(tokens):
            raise not_finite(self.tokens)
        return Text(tokens, self.pooled[rows])


@dataclass(frozen=True)
class Samples:
    """The samples of a collection that could be scored; latents in half precision and still on disk."""

    description: Description
    numbers: Tensor
    """(N,) as the collection counts."""
    text: Texts
    """Of every prompt."""
    clean: Rows
    scores: Tensor
    """(N,R)"""
    sigma: Tensor
    """(N,K)"""
    denoised: Rows
    """(N,K,C,...)"""
    unscored: int = 0
    """How many were left out."""

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def prompts(self) -> Tensor:
        """(N,) the prompt of each."""
        return self.numbers % len(self.description.prompts)

    @property
    def seeds(self) -> list[int]:
        return [self.description.seed_of(number) for number in self.numbers.tolist()]

    def rewards(self, weights: Sequence[float] = ()) -> Tensor:
        """(N,) weighted sums of the standardized scores."""
        return self.description.combined(self.scores, weights)

    def rows(self, chosen: Tensor) -> "Samples":
        tensors = {name: getattr(self, name)[chosen] for name in ("numbers", "scores", "sigma")}
        return replace(self, clean=self.clean.chosen(chosen), denoised=self.denoised.chosen(chosen), **tensors)

    def split(self, share: float) -> tuple[Tensor, Tensor]:
        """Rows to train on, and rows held out, chosen by their numbers alone."""
        held_out = torch.tensor([float(torch.rand(1, generator=generator(int(number)))) < share for number in self.numbers])
        return torch.where(~held_out)[0], torch.where(held_out)[0]


@dataclass(frozen=True)
class StoredPairs:
    """Batches of stored states: no diffusion model is needed, but for forms that ask it elsewhere."""

    samples: Samples
    weights: Tensor
    process: Process
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    denoise: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    """x (B,...), σ (B,), prompts (B,) -> D (B,...)."""

    @cached_property
    def seeds(self) -> list[int]:
        return self.samples.seeds

    def batch(self, size: int, key: tuple[int, ...], part: slice = slice(None)) -> Batch:
        rng = generator(*key)
        samples, levels = self.samples, self.samples.sigma.shape[1]
        rows = torch.randint(len(samples.clean), (size,), generator=rng)[part]
        chosen = torch.randint(levels, (size,), generator=rng)[part]
        clean, sigma = samples.clean[rows].float(), samples.sigma[rows, chosen]
        drawn = torch.stack([noise(clean.shape[1:], self.seeds[row], level) for row, level in zip(rows.tolist(), chosen.tolist(), strict=True)])
        return self.noised(rows, clean, drawn, sigma, samples.denoised[rows, chosen])

    def noised(self, rows: Tensor, clean: Tensor, drawn: Tensor, sigma: Tensor, denoised: Tensor) -> Batch:
        """The samples (B,) with these latents, noise and denoised estimates (B,...), at noise levels (B,)."""
        x, prompts = self.process.add_noise(clean, drawn, column(sigma, clean)), self.samples.prompts[rows]
        clean, x, sigma, denoised, weights = (value.to(self.device, torch.float32) for value in (clean, x, sigma, denoised, self.weights[rows]))
        ask = self.denoise
        denoise = None if ask is None else lambda point: ask(point, sigma, prompts)
        return Batch(clean, x, sigma, denoised, weights, self.samples.text[prompts].to(self.device), denoise, prompts)


@dataclass(frozen=True)
class FreshPairs(StoredPairs):
    """Fresh noise for every batch, at any noise level of the collection. In place of D stands the clean latent, whose mean D is."""

    def batch(self, size: int, key: tuple[int, ...], part: slice = slice(None)) -> Batch:
        rng = generator(*key)
        samples, levels = self.samples, self.samples.sigma.flatten()
        rows = torch.randint(len(samples.clean), (size,), generator=rng)[part]
        sigma = levels[torch.randint(len(levels), (size,), generator=rng)[part]]
        drawn = torch.randn(size, *samples.clean.shape[1:], generator=rng)[part]
        clean = samples.clean[rows].float()
        return self.noised(rows, clean, drawn, sigma, clean)


def write(path: Path, tensors: Mapping[str, Tensor], owner: str) -> None:
    write_whole(path, lambda partial: save_file(dict(tensors), partial, {OWNER: owner}))


def write_text(path: Path, content: str, new: bool = False) -> None:
    write_whole(path, lambda partial: partial.write_text(content, encoding="utf-8"), new=new)
