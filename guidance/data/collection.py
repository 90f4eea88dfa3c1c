"""Labelled samples on disk: shards of safetensors that training reads without a diffusion model.

    collection.json         what they belong to, and the prompts
    prompts.safetensors     tokens and pooled text of each prompt
    shard-00000.safetensors a fixed number of samples each: latents, scores, prompt, seed, and K noised states with the model's D

Only D is kept of a noised state; its noise is drawn again from the sample's seed. A training reads what it needs of the
shards, and a collection may be larger than memory.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..disk import write
from ..errors import GuidanceError, pass_out_of_memory
from ..network.unet import Text
from ..process import process_named
from ..tensors import OWNER, Stored, StoredRows, is_finite, not_finite, reason, shown, stored
from .description import ROUNDED, Description, NewerError, described
from .samples import Rows, Sample, Samples, Texts, half

SHARD = 32
SHARD_NAME = re.compile(r"shard-([0-9]{5,9})\.safetensors")


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
            write_tensors(folder / "prompts.safetensors", rows, description.identity)
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
            raise GuidanceError(
                f"{self.folder.name} holds other samples: {told}. Choose another folder, or set that back."
            )

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
        stacked = {
            name: torch.stack([getattr(sample, name) for sample in samples])
            for name in ("clean", "scores", "sigma", "denoised")
        }
        sound = torch.stack([part.flatten(1).isfinite().all(1).cpu() for part in stacked.values()]).all(0)
        if not sound.any():
            raise GuidanceError(
                f"None of {len(samples)} samples is made of finite numbers: the model, the decoder or the reward is damaged."
            )
        scores = stacked["scores"].cpu().masked_fill(~sound[:, None], math.nan)
        halves = {name: half(stacked[name]).cpu() for name in ("clean", "denoised")}
        self.describe_again()
        if not self.has(numbers):  # nor has another process written it meanwhile
            rows = {"scores": scores, "sigma": stacked["sigma"].contiguous().cpu()} | halves
            write_tensors(self.path(numbers.start // SHARD), rows, self.owner(numbers.start // SHARD))

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
            if parts or not (own and same_rows(tokens, 2) and same_rows(pooled, 1)):
                raise DamagedError("It has other parts than the texts of these prompts.")
            vectors = torch.stack([row[()] for row in pooled])
            if not is_finite(vectors):
                raise not_finite(pooled[0])
            return Texts(StoredRows(tokens), vectors)
        except (OSError, SafetensorError, KeyError, GuidanceError) as error:
            raise DamagedError(f"{shown(path)} is missing or damaged: collect again, which writes it anew.") from error


def same_rows(parts: Sequence[Stored], dimensions: int) -> bool:
    """Whether all are floating point numbers of so many dimensions and the same size in the last."""
    kinds = {(len(part.shape), part.shape[-1:], part.dtype is None) for part in parts}
    return kinds == {(dimensions, parts[0].shape[-1:], False)}


def rows_of(text: "Text | Texts") -> dict[str, Tensor]:
    """The texts of prompts as they are kept."""
    return {f"{kind}.{i}": half(row) for kind in ("tokens", "pooled") for i, row in enumerate(getattr(text, kind))}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], owner: str) -> None:
    write(path, lambda partial: save_file(dict(tensors), partial, {OWNER: owner}))


def write_text(path: Path, content: str, new: bool = False) -> None:
    write(path, lambda partial: partial.write_text(content, encoding="utf-8"), new=new)
