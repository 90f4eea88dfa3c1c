"""Labelled samples on disk: shards of safetensors that training reads without a diffusion model.

    collection.json         what they belong to, and the prompts
    prompts.safetensors     tokens and pooled text of each prompt
    shard-00000.safetensors a fixed number of samples each: latents, scores, prompt, seed, and K noised states with the model's D

Only D is kept of a noised state; its noise is drawn again from the sample's seed.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import GuidanceError
from .files import Base
from .files import write as write_whole
from .network import Text, column
from .process import Process
from .randomness import generator
from .training import Batch

SHARD = 32


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
    """How the samples were drawn, for people and for telling one collection from another."""
    reward_weights: tuple[float, ...] = field(default=(), compare=False)
    """Of the rewards where nothing else is said; they can be changed without sampling again. Empty means 1 each."""

    def seed_of(self, index: int) -> int:
        return (self.seed + index) % 2**64

    def prompt_of(self, index: int) -> int:
        return index % len(self.prompts)

    def weights(self, wanted: Sequence[float] = ()) -> tuple[float, ...]:
        """A weight for each reward: those wanted, or those of the collection."""
        weights = tuple(wanted) or self.reward_weights or (1.0,) * len(self.rewards)
        if len(weights) != len(self.rewards):
            raise GuidanceError(f"The samples have scores of {', '.join(self.rewards)}: give {len(self.rewards)} weights, not {len(weights)}.")
        return weights

    def combined(self, scores: Tensor, weights: Sequence[float] = ()) -> Tensor:
        """Raw scores (N,R) -> weighted sums (N,) of the standardized ones."""
        means, stds = (torch.tensor(values) for values in (self.reward_means, self.reward_stds))
        return ((scores - means) / stds * torch.tensor(self.weights(weights))).sum(1)


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


def percents(seed: int, levels: int) -> Tensor:
    """Where in the sampling (K,), 0 noise and 1 clean, the noised states of a sample lie: one in each of K equal parts."""
    return (torch.arange(levels) + torch.rand(levels, generator=generator(seed, -1))) / max(levels, 1)


@dataclass(frozen=True)
class Collection:
    """A folder of shards. Samples are numbered; which seed and prompt a number has is known beforehand, so any number can be redone."""

    folder: Path
    description: Description

    @staticmethod
    def create(folder: Path, description: Description, text: Text | Callable[[], Text]) -> "Collection":
        """Begin a collection, or go on with one of the same description. Raises GuidanceError where another lies there.

        text: of each prompt; a function is called only where it is not on disk yet.
        """
        if (folder / "collection.json").exists():
            existing = Collection.open(folder)
            existing.description.base.require(description.base, "collection")
            if existing.description != description:
                different = [name for name, value in asdict(description).items() if asdict(existing.description)[name] != value]
                raise GuidanceError(f"{folder.name} holds samples with another {', '.join(different)}; choose another folder, or delete it.")
        else:
            text = text() if callable(text) else text
            rows = {f"{kind}.{i}": half(row) for kind in ("tokens", "pooled") for i, row in enumerate(getattr(text, kind))}
            write(folder / "prompts.safetensors", rows)
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
        except (ValueError, TypeError, KeyError) as error:
            raise GuidanceError(f"collection.json in {folder.name} is damaged; collect into another folder.") from error

    def path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05}.safetensors"

    def missing(self, count: int) -> Iterator[range]:
        """The numbers of the samples of every shard that is not there yet, or damaged, up to `count` samples."""
        for shard in range(-(-count // SHARD)):
            numbers = range(shard * SHARD, min((shard + 1) * SHARD, count))
            if _length(self.path(shard)) < len(numbers):
                yield numbers

    def add(self, numbers: range, samples: Sequence[Sample]) -> None:
        """Write one shard. Raises GuidanceError where the disk is full; what is there already stays."""
        if any(not torch.isfinite(sample.scores).all() for sample in samples):
            raise GuidanceError("A reward returned a score that is not a finite number; this shard was not written.")
        stacked = {name: torch.stack([getattr(sample, name) for sample in samples]) for name in ("clean", "scores", "sigma", "denoised")}
        halves = {name: half(stacked[name]) for name in ("clean", "denoised")}
        write(self.path(numbers.start // SHARD), {name: value.contiguous().cpu() for name, value in (stacked | halves).items()})

    def shards(self) -> list[Path]:
        found = sorted(self.folder.glob("shard-*.safetensors"))
        if not found:
            raise GuidanceError(f"{self.folder.name} holds no samples yet; collect some first.")
        return found

    def scores(self) -> tuple[Tensor, Tensor]:
        """The number (N,) and the raw scores (N,R) of every sample; nothing else is read."""
        parts, numbers = [], []
        for path in self.readable_shards():
            with safe_open(path, "pt") as file:
                parts.append(file.get_tensor("scores"))
            first = int(path.stem.split("-")[1]) * SHARD
            numbers.append(torch.arange(first, first + len(parts[-1])))
        return torch.cat(numbers), torch.cat(parts)

    def readable_shards(self) -> Iterator[Path]:
        for path in self.shards():
            if not _length(path):
                raise GuidanceError(f"{path.name} in {self.folder.name} is damaged; delete it and collect again, which redoes only that shard.")
            yield path

    def load(self) -> "Samples":
        """All samples. Raises GuidanceError that names the shard which is damaged or of another shape."""
        parts = []
        for path in self.readable_shards():
            part = load_file(path)
            if tuple(part["clean"].shape[1:]) != self.description.shape:
                raise GuidanceError(f"{path.name} in {self.folder.name} holds latents of another shape; it belongs to another collection.")
            parts.append(part)
        joined = {name: torch.cat([part[name] for part in parts]) for name in ("clean", "scores", "sigma", "denoised")}
        return Samples(self.description, self.scores()[0], self.text(), **joined)

    def text(self) -> Text:
        try:
            rows = load_file(self.folder / "prompts.safetensors")
        except (OSError, SafetensorError) as error:
            raise GuidanceError(f"prompts.safetensors in {self.folder.name} is missing or damaged; collect into another folder.") from error
        tokens = [rows[f"tokens.{i}"] for i in range(len(self.description.prompts))]
        pooled = torch.stack([rows[f"pooled.{i}"] for i in range(len(self.description.prompts))])
        return Text(padded(tokens), pooled)


def half(tensor: Tensor) -> Tensor:
    """In half precision; what lies beyond its range is brought to its end."""
    most = torch.finfo(torch.float16).max
    return tensor.clamp(-most, most).half().contiguous()


def padded(rows: Sequence[Tensor]) -> Tensor:
    """(T_i,E) of several lengths -> (N,T,E), zero where there is none."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)


def _length(path: Path) -> int:
    """How many samples a shard holds; 0 if it cannot be read."""
    try:
        with safe_open(path, "pt") as file:
            return file.get_slice("scores").get_shape()[0]
    except (OSError, SafetensorError):
        return 0


@dataclass(frozen=True)
class Samples:
    """A whole collection in memory; half precision."""

    description: Description
    numbers: Tensor
    """(N,) as the collection counts."""
    text: Text
    """Of every prompt."""
    clean: Tensor
    scores: Tensor
    """(N,R)"""
    sigma: Tensor
    """(N,K)"""
    denoised: Tensor
    """(N,K,C,...)"""

    @property
    def prompts(self) -> Tensor:
        """(N,) the prompt of each."""
        return self.numbers % len(self.description.prompts)

    def rewards(self, weights: Sequence[float] = ()) -> Tensor:
        """(N,) weighted sums of the standardized scores."""
        return self.description.combined(self.scores, weights)

    def rows(self, chosen: Tensor) -> "Samples":
        return Samples(
            self.description, self.numbers[chosen], self.text, self.clean[chosen], self.scores[chosen], self.sigma[chosen], self.denoised[chosen]
        )

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
        return [self.samples.description.seed_of(int(number)) for number in self.samples.numbers]

    def batch(self, size: int, key: tuple[int, ...], part: slice = slice(None)) -> Batch:
        rng = generator(*key)
        samples, levels = self.samples, self.samples.sigma.shape[1]
        rows = torch.randint(len(samples.clean), (size,), generator=rng)[part]
        chosen = torch.randint(levels, (size,), generator=rng)[part]
        clean, sigma = samples.clean[rows].float(), samples.sigma[rows, chosen]
        drawn = torch.stack([noise(clean.shape[1:], self.seeds[row], level) for row, level in zip(rows.tolist(), chosen.tolist(), strict=True)])
        x = self.process.add_noise(clean, drawn, column(sigma, clean))
        prompts = samples.prompts[rows]
        clean, x, sigma, denoised, weights = (
            value.to(self.device, torch.float32) for value in (clean, x, sigma, samples.denoised[rows, chosen], self.weights[rows])
        )
        ask = self.denoise
        denoise = None if ask is None else lambda point: ask(point, sigma, prompts)
        return Batch(clean, x, sigma, denoised, weights, samples.text[prompts].to(self.device), denoise, prompts)


def write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    write_whole(path, lambda partial: save_file(dict(tensors), partial))


def write_text(path: Path, content: str) -> None:
    write_whole(path, lambda partial: partial.write_text(content, encoding="utf-8"))
