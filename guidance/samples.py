"""Labelled samples on disk: shards of safetensors that training reads without a diffusion model.

    collection.json         what they belong to, and the prompts
    prompts.safetensors     tokens and pooled text of each prompt
    shard-00000.safetensors a fixed number of samples each: latents, scores, prompt, seed, and K noised states with the model's D

Only D is kept of a noised state; its noise is drawn again from the sample's seed. Shards are memory-mapped: a training reads what it needs of
them, and a collection may be larger than memory.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import zip_longest
from os.path import commonprefix
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import GuidanceError
from .files import Base
from .files import write as write_whole
from .network import Text
from .process import Process, column
from .randomness import generator
from .training import Batch

SHARD = 32
SHOWN = 60
"""Letters of a value that an error quotes."""


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

    def seed_of(self, index: int) -> int:
        return (self.seed + index) % 2**64

    def prompt_of(self, index: int) -> int:
        return index % len(self.prompts)

    def weights(self, wanted: Sequence[float] = ()) -> tuple[float, ...]:
        """A weight for each reward: those wanted, or those of the collection."""
        weights = tuple(wanted) or self.reward_weights or (1.0,) * len(self.rewards)
        if len(weights) != len(self.rewards):
            raise GuidanceError(f"The samples have scores of {', '.join(self.rewards)}: give one weight for each, not {len(weights)} in all.")
        if not 0 < math.hypot(*weights) < math.inf:
            raise GuidanceError(f"Weights must be finite numbers and not all 0, not {', '.join(f'{weight:g}' for weight in weights)}.")
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
        existing = Collection.open(folder).description if (folder / "collection.json").exists() else None
        if existing and (different := existing.differences(description)):
            more = f" and {len(different) - 2} more" if len(different) > 2 else ""
            raise GuidanceError(f"{folder.name} holds other samples: {', '.join(different[:2])}{more}. Choose another folder, or set that back.")
        if existing is None and any(folder.glob("shard-*.safetensors")):
            raise GuidanceError(f"{folder.name} holds samples, but no collection.json says of what: choose another folder, or delete it.")
        if existing is None or not _opened(folder / "prompts.safetensors"):
            text = text() if callable(text) else text
            rows = {f"{kind}.{i}": half(row) for kind in ("tokens", "pooled") for i, row in enumerate(getattr(text, kind))}
            write(folder / "prompts.safetensors", rows)
        if existing != description:
            write_text(folder / "collection.json", json.dumps(asdict(description), indent=1))
        return Collection(folder, description)

    @staticmethod
    def open(folder: Path) -> "Collection":
        try:
            content = json.loads((folder / "collection.json").read_text(encoding="utf-8"))
            values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in content.items()}
            return Collection(folder, Description(**values | {"base": Base(**content["base"])}))
        except FileNotFoundError as error:
            raise GuidanceError(f"{folder.name} holds no samples; Collect Guidance Data makes them.") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise GuidanceError(f"collection.json in {folder.name} is damaged; collect into another folder.") from error

    def path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05}.safetensors"

    def missing(self, count: int) -> Iterator[range]:
        """The numbers of the samples of every shard that is not there yet, or damaged, up to `count` samples."""
        for shard in range(-(-count // SHARD)):
            numbers = range(shard * SHARD, min((shard + 1) * SHARD, count))
            if len(_opened(self.path(shard)).get("scores", ())) < len(numbers):
                yield numbers

    def whole(self, count: int) -> bool:
        """Whether so many samples and the text of the prompts can be read."""
        return next(self.missing(count), None) is None and bool(_opened(self.folder / "prompts.safetensors"))

    def add(self, numbers: range, samples: Sequence[Sample]) -> None:
        """Write one shard. A sample that is not all finite numbers keeps its place, without scores: `load` leaves it out.

        Raises GuidanceError where all are such, or where the disk is full; what is there already stays.
        """
        stacked = {name: torch.stack([getattr(sample, name) for sample in samples]) for name in ("clean", "scores", "sigma", "denoised")}
        sound = torch.stack([part.flatten(1).isfinite().all(1).cpu() for part in stacked.values()]).all(0)
        if not sound.any():
            raise GuidanceError(f"None of {len(samples)} samples is made of finite numbers: the model, the decoder or the reward is damaged.")
        scores = stacked["scores"].cpu().masked_fill(~sound[:, None], math.nan)
        halves = {name: half(stacked[name]).cpu() for name in ("clean", "denoised")}
        write(self.path(numbers.start // SHARD), {"scores": scores, "sigma": stacked["sigma"].contiguous().cpu()} | halves)

    def shards(self) -> Iterator[tuple[range, dict[str, Tensor]]]:
        """The numbers of the samples of every shard, and its parts, memory-mapped. Raises GuidanceError that names a shard which does not fit."""
        described = self.description
        noised = (described.levels, *described.shape)
        fitting = {"clean": described.shape, "scores": (len(described.rewards),), "sigma": noised[:1], "denoised": noised}
        for first, path in self.files():
            if not (parts := _opened(path)):
                raise GuidanceError(f"{path.name} in {self.folder.name} is damaged: collect again, which redoes only that shard, or delete it.")
            if fitting != {name: tuple(part.shape[1:]) for name, part in parts.items()}:
                raise GuidanceError(f"{path.name} in {self.folder.name} belongs to another collection: take it away and collect again.")
            yield range(first, first + len(parts["scores"])), parts

    def files(self) -> Iterator[tuple[int, Path]]:
        """The number of the first sample of every shard, and its path."""
        for path in sorted(self.folder.glob("shard-*.safetensors")):
            if (number := path.stem.removeprefix("shard-")).isdecimal():  # and no copy of a shard
                yield int(number) * SHARD, path

    def load(self) -> "Samples":
        """All samples that could be scored; of latents nothing is read yet. Raises GuidanceError where there are none, or a shard does not fit."""
        found = list(self.shards())
        if not found or not len(samples := self.samples(found)):
            raise GuidanceError(f"{self.folder.name} holds no samples yet; collect some first.")
        return samples

    def first(self, count: int) -> "Samples | None":
        """So many samples that could be scored, or fewer, of the first shard that can be read; none where there is none."""
        for first, path in self.files():
            if (parts := _opened(path)) and len(samples := self.samples([(range(first, first + len(parts["scores"])), parts)])):
                return samples.rows(torch.arange(min(count, len(samples))))
        return None

    def samples(self, found: Sequence[tuple[range, dict[str, Tensor]]]) -> "Samples":
        """Those of shards that could be scored."""
        scores = torch.cat([parts["scores"] for _, parts in found])
        scored = torch.where(scores.isfinite().all(1))[0]
        numbers = torch.tensor([number for numbers, _ in found for number in numbers])
        sigma = torch.cat([parts["sigma"] for _, parts in found])
        clean, denoised = (Rows.of([parts[name] for _, parts in found]) for name in ("clean", "denoised"))
        whole = Samples(self.description, numbers, self.text(), clean, scores, sigma, denoised)
        return replace(whole.rows(scored), unscored=len(scores) - len(scored))

    def text(self) -> "Texts":
        rows, count = _opened(self.folder / "prompts.safetensors"), len(self.description.prompts)
        if len(rows) != 2 * count:
            raise GuidanceError(f"prompts.safetensors in {self.folder.name} is missing or damaged: collect again, which writes it anew.")
        return Texts(tuple(rows[f"tokens.{i}"] for i in range(count)), torch.stack([rows[f"pooled.{i}"] for i in range(count)]))


def half(tensor: Tensor) -> Tensor:
    """In half precision; what lies beyond its range is brought to its end."""
    most = torch.finfo(torch.float16).max
    return tensor.clamp(-most, most).half().contiguous()


def _opened(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, memory-mapped; none if it cannot be read."""
    try:
        return load_file(path)
    except (OSError, SafetensorError):
        return {}


@dataclass(frozen=True)
class Rows:
    """Rows (N,...) that lie in several tensors, as of memory-mapped files, and are read when they are asked for."""

    parts: tuple[Tensor, ...]
    places: Tensor
    """(N,2) the part that a row lies in, and where in it."""

    @staticmethod
    def of(parts: Sequence[Tensor]) -> "Rows":
        return Rows(tuple(parts), torch.tensor([(i, row) for i, part in enumerate(parts) for row in range(len(part))]))

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self), *self.parts[0].shape[1:]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index) -> Tensor:
        """The rows (B,), or what stands at further places (B,) in each, as of one tensor."""
        rows, *within = index if isinstance(index, tuple) else (index,)
        places = zip(*(indices.tolist() for indices in (*self.places[rows].unbind(-1), *within)), strict=True)
        return torch.stack([self.parts[part][tuple(place)] for part, *place in places])

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
        return Text(torch.nn.utils.rnn.pad_sequence([self.tokens[row] for row in rows], batch_first=True), self.pooled[rows])


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


def write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    write_whole(path, lambda partial: save_file(dict(tensors), partial))


def write_text(path: Path, content: str) -> None:
    write_whole(path, lambda partial: partial.write_text(content, encoding="utf-8"))
