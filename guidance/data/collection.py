"""Collections of labelled samples on disk, which training reads without a diffusion model.

    collection.json          the description, which includes the prompts
    prompts.safetensors      the conditioning of each prompt
    shard-00000.safetensors  up to 32 samples: clean latents, scores, and the noise level and D of K noised states

The noise of a noised state is not stored, but drawn again from the sample's seed. Training reads latents as it needs
them, so a collection may be larger than memory.
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
from .description import ROUNDED, Description, NewerError, description_from
from .samples import Rows, Sample, Samples, Texts, half

SHARD = 32
"""Samples per shard."""
SHARD_NAME = re.compile(r"shard-([0-9]{5,9})\.safetensors")


class DamagedError(GuidanceError):
    """A file of a collection is damaged. Collecting again rewrites it."""


@dataclass(frozen=True)
class Shard:
    """The samples of one file. Only scores and noise levels are read yet."""

    numbers: range
    scores: Tensor
    """Raw scores (N,R). Samples without a score have none that is finite."""
    sigma: Tensor
    """Noise levels (N,K)."""
    clean: Stored
    denoised: Stored


@dataclass(frozen=True)
class Collection:
    """A folder of shards. A sample's number determines its seed and prompt, so that any sample can be made again."""

    folder: Path
    description: Description

    @staticmethod
    def create(folder: Path, description: Description, text: "Text | Texts | Callable[[], Texts]") -> "Collection":
        """Start a collection, or continue one with the same description.

        Raises GuidanceError if the folder has another.

        text: the conditioning of each prompt. A function is called only if it is not on disk yet.
        """
        existing, collection = Collection.read_description(folder), Collection(folder, description)
        if existing:
            collection.require_same(existing)
        elif collection.shard_numbers():
            what = f"{folder.name} holds samples, but no collection.json that describes them"
            raise GuidanceError(f"{what}: choose another folder, or move the samples away.")
        rows = None if existing and collection.has_text() else rows_of(text() if callable(text) else text)
        if existing is None:
            try:
                write_text(folder / "collection.json", description.to_json(), new=True)
            except FileExistsError:  # another process created it first
                return Collection.create(folder, description, text)
        elif existing != description:
            write_text(folder / "collection.json", description.to_json())
        if rows is not None:
            write_tensors(folder / "prompts.safetensors", rows, description.identity)
        return collection

    @staticmethod
    def open(folder: Path) -> "Collection":
        """The collection in a folder. Raises GuidanceError if there is none, or its collection.json cannot be read."""
        if (description := Collection.read_description(folder)) is None:
            raise GuidanceError(f"{folder.name} holds no samples. Collect Guidance Data makes them.")
        return Collection(folder, description)

    @staticmethod
    def read_description(folder: Path) -> Description | None:
        """The content of collection.json, None if there is no such file. Raises GuidanceError if it cannot be read."""
        path = folder / "collection.json"
        try:
            return description_from(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except OSError as error:
            what = f"{shown(path)} cannot be read ({reason(error)})"
            raise GuidanceError(f"{what}: correct that, or collect into another folder.") from error
        except NewerError as error:
            what = f"{shown(path)} has {error}, which this version of the pack does not know"
            raise GuidanceError(f"{what}: update the pack, or collect into another folder.") from error
        except (ValueError, RecursionError) as error:
            what = f"{shown(path)} is damaged ({str(error).rstrip('.')})"
            raise GuidanceError(f"{what}: restore it from a copy, or collect into another folder.") from error

    def require_same(self, other: Description) -> None:
        """Raise GuidanceError if the other description, that of the folder, differs."""
        if different := other.differences(self.description):
            more = f" and {len(different) - 2} more" if len(different) > 2 else ""
            listed = ", ".join(different[:2]) + more
            raise GuidanceError(
                f"{self.folder.name} holds other samples: {listed}. Choose another folder, or restore that setting."
            )

    def path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05}.safetensors"

    def missing(self, count: int) -> Iterator[range]:
        """The sample numbers of each shard that is missing or damaged, up to `count` samples.

        Raises GuidanceError if another file has the name of a shard.
        """
        for shard in range(-(-count // SHARD)):
            numbers = range(shard * SHARD, min((shard + 1) * SHARD, count))
            if not self.has(numbers):
                yield numbers

    def has(self, numbers: range) -> bool:
        """Whether the shard with these sample numbers can be read."""
        try:
            return len(self.shard(numbers.start // SHARD).numbers) >= len(numbers)
        except (FileNotFoundError, DamagedError):
            return False

    def has_text(self) -> bool:
        """Whether the conditioning of the prompts can be read."""
        try:
            return bool(self.text())
        except GuidanceError:
            return False

    def complete(self, count: int) -> bool:
        """Whether `count` samples and the conditioning of the prompts can be read, and belong to this description."""
        try:
            self.require_description()
            return next(self.missing(count), None) is None and self.has_text()
        except GuidanceError:
            return False

    def add(self, numbers: range, samples: Sequence[Sample]) -> None:
        """Write one shard. Samples that are not finite are written without scores, and `load` leaves them out.

        Raises GuidanceError if no sample is finite, the disk is full, or the folder was removed. Existing files stay.
        """
        stacked = {
            name: torch.stack([getattr(sample, name) for sample in samples])
            for name in ("clean", "scores", "sigma", "denoised")
        }
        sound = torch.stack([part.flatten(1).isfinite().all(1).cpu() for part in stacked.values()]).all(0)
        if not sound.any():
            raise GuidanceError(
                f"None of {len(samples)} samples is made of finite numbers: "
                "the model, the decoder or the reward is damaged."
            )
        scores = stacked["scores"].cpu().masked_fill(~sound[:, None], math.nan)
        halves = {name: half(stacked[name]).cpu() for name in ("clean", "denoised")}
        self.restore_description()
        if not self.has(numbers):  # another process may have written it meanwhile
            rows = {"scores": scores, "sigma": stacked["sigma"].contiguous().cpu()} | halves
            write_tensors(self.path(numbers.start // SHARD), rows, self.owner(numbers.start // SHARD))

    def owner(self, shard: int) -> str:
        """The owner entry of a shard: the collection's identity and the shard's number."""
        return f"{self.description.identity} {shard}"

    def restore_description(self) -> None:
        """Write collection.json again if it alone was deleted.

        Raises GuidanceError if more was deleted, or the folder now has other samples.
        """
        if (found := Collection.read_description(self.folder)) is not None:
            self.require_same(found)
        elif not self.has_text():
            what = f"{self.folder.name} was deleted or moved while its samples were collected"
            raise GuidanceError(f"{what}: queue again, which collects them again.")
        else:
            write_text(self.folder / "collection.json", self.description.to_json())

    def require_description(self) -> None:
        """Raise GuidanceError if the folder has no description, or another one."""
        self.require_same(Collection.open(self.folder).description)

    def shard(self, number: int) -> Shard:
        """One shard, checked.

        Raises FileNotFoundError if there is none, DamagedError if it must be rewritten, and GuidanceError for another
        file by its name, which must not be overwritten.
        """
        path, expected = self.path(number), self.shapes()
        try:
            parts = stored(path)
        except SafetensorError as error:
            raise self.damaged(number, "It is not a safetensors file, or an incomplete one.") from error
        except FileNotFoundError:
            raise
        except OSError as error:
            pass_out_of_memory(error, f"{path.name} was read")
            what = f"{shown(path)} cannot be read ({reason(error)})"
            raise GuidanceError(f"{what}: correct that, or move it away and collect again.") from error
        if other := self.other_owner(number, parts):
            raise GuidanceError(f"{shown(path)} belongs to another {other}: move it away and collect again.")
        if parts.keys() != expected.keys() or not all(part.is_float for part in parts.values()):
            raise self.damaged(number, f"It must have floating point tensors of the names {', '.join(expected)}.")
        if len(rows := {len(part) for part in parts.values()}) > 1 or not 1 <= min(rows) <= SHARD:
            counts = " and ".join(map(str, sorted(rows)))
            raise self.damaged(
                number, f"Its tensors have {counts} rows, and must all have the same number, from 1 to {SHARD}."
            )
        scores, sigma = (parts[name][()].float() for name in ("scores", "sigma"))
        scored, highest = scores.isfinite().all(1), process_named(self.description.base.process).highest + ROUNDED
        if not scored.any():
            raise self.damaged(number, "None of its samples has a score.")
        if not ((sigma[scored] > 0) & sigma[scored].isfinite() & (sigma[scored] <= highest)).all():
            raise self.damaged(number, "It has impossible noise levels.")
        numbers = range(number * SHARD, number * SHARD + len(scores))
        return Shard(numbers, scores, sigma, parts["clean"], parts["denoised"])

    def other_owner(self, number: int, parts: Mapping[str, Stored]) -> str:
        """To what else the tensors of a shard belong, by their owner entry or shapes. Empty if they belong here."""
        owners, expected = {part.owner for part in parts.values()} - {None, self.owner(number)}, self.shapes()
        if any(str(owner).startswith(f"{self.description.identity} ") for owner in owners):
            return "place in this collection"
        shapes = any(name not in expected or part.shape[1:] != expected[name] for name, part in parts.items())
        return "collection" if owners or shapes else ""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of one row of each tensor of a shard."""
        described = self.description
        noised = (described.levels, *described.shape)
        return {"clean": described.shape, "scores": (len(described.rewards),), "sigma": noised[:1], "denoised": noised}

    def damaged(self, number: int, why: str) -> DamagedError:
        enough = f" with a count above {number * SHARD}," if number else ""
        advice = f"collect again,{enough} which replaces only that shard, or delete it"
        return DamagedError(f"{shown(self.path(number))} is damaged: {advice}. {why}")

    def shards(self) -> Iterator[Shard]:
        """All shards. Raises GuidanceError that names one which cannot be used."""
        for number in self.shard_numbers():
            with suppress(FileNotFoundError):  # deleted since it was listed
                yield self.shard(number)

    def shard_numbers(self) -> list[int]:
        """The numbers of the shards that have a file. Copies with other names do not count."""
        names = {path.name for path in self.folder.glob("shard-*.safetensors")}
        numbers = {int(match[1]) for match in map(SHARD_NAME.fullmatch, names) if match}
        return sorted(number for number in numbers if self.path(number).name in names)

    def load(self) -> "Samples":
        """All scored samples, whose latents are not read yet.

        Raises GuidanceError if there are none, or a shard cannot be used.
        """
        self.require_description()
        if not (found := list(self.shards())):
            raise GuidanceError(f"{self.folder.name} holds no samples yet: collect some first.")
        return self.samples(found)

    def first(self, count: int) -> "Samples | None":
        """Up to `count` samples of the first shard that can be read. None if there is no such shard."""
        for number in self.shard_numbers():
            with suppress(FileNotFoundError, DamagedError):
                samples = self.samples([self.shard(number)])
                return samples.rows(torch.arange(min(count, len(samples))))
        return None

    def samples(self, found: Sequence[Shard]) -> "Samples":
        """The scored samples of these shards."""
        scores = torch.cat([shard.scores for shard in found])
        scored = torch.where(scores.isfinite().all(1))[0]
        numbers = torch.tensor([number for shard in found for number in shard.numbers])
        sigma = torch.cat([shard.sigma for shard in found])
        clean, denoised = (Rows.of([getattr(shard, name) for shard in found]) for name in ("clean", "denoised"))
        whole = Samples(self.description, numbers, self.text(), clean, scores, sigma, denoised)
        return replace(whole.rows(scored), unscored=len(scores) - len(scored))

    def text(self) -> "Texts":
        """The conditioning of every prompt. Raises DamagedError if it cannot be read."""
        path, count = self.folder / "prompts.safetensors", range(len(self.description.prompts))
        try:
            parts = stored(path)
            tokens, pooled = ([parts.pop(f"{kind}.{i}") for i in count] for kind in ("tokens", "pooled"))
            own = tokens[0].owner in (None, self.description.identity)
            if parts or not (own and same_rows(tokens, 2) and same_rows(pooled, 1)):
                raise DamagedError("Its tensors are not those of these prompts.")
            vectors = torch.stack([row[()] for row in pooled])
            if not is_finite(vectors):
                raise not_finite(pooled[0])
            return Texts(StoredRows(tokens), vectors)
        except (OSError, SafetensorError, KeyError, GuidanceError) as error:
            raise DamagedError(f"{shown(path)} is missing or damaged: collect again, which rewrites it.") from error


def same_rows(parts: Sequence[Stored], dimensions: int) -> bool:
    """Whether all are floating point tensors with this number of dimensions and the same last size."""
    kinds = {(len(part.shape), part.shape[-1:], part.is_float) for part in parts}
    return kinds == {(dimensions, parts[0].shape[-1:], True)}


def rows_of(text: "Text | Texts") -> dict[str, Tensor]:
    """The conditioning of prompts as tensors of a file, by name."""
    return {f"{kind}.{i}": half(row) for kind in ("tokens", "pooled") for i, row in enumerate(getattr(text, kind))}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], owner: str) -> None:
    write(path, lambda partial: save_file(dict(tensors), partial, {OWNER: owner}))


def write_text(path: Path, content: str, new: bool = False) -> None:
    write(path, lambda partial: partial.write_text(content, encoding="utf-8"), new=new)
