"""Guidance networks as files: one safetensors each, whose metadata says what it is and what it belongs to."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from secrets import token_hex
from shutil import rmtree
from typing import Any, BinaryIO

from safetensors.torch import save_file

from .errors import GuidanceError, pass_out_of_memory, quoted, short
from .network import FORMS, Architecture, GuidanceNetwork
from .records import record
from .tensors import Shapes, read_header, read_tensors

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
            raise GuidanceError(f"This {what} was made for {short(self.model)}, but the model is {other.model}: use one that was made for it.")
        for item, name in (("latents", "latents"), ("channels", "latent channels"), ("process", "noising process"), ("target", "target")):
            mine, theirs = getattr(self, item), getattr(other, item)
            if mine != theirs:
                raise GuidanceError(f"This {what} was made for {self.model} with the {name} {short(mine)}, but here it is {theirs}.")


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


def save_network(path: Path, network: GuidanceNetwork, card: Card, advice: str = "Mend that and save again.", new: bool = False) -> None:
    """Whole or not at all. Raises GuidanceError where the disk does not take it, and FileExistsError as `write` does."""
    metadata = {"format": FORMAT, "version": str(VERSION), "architecture": json.dumps(asdict(network.architecture)), "card": json.dumps(asdict(card))}
    weights = {name: tensor.contiguous().cpu() for name, tensor in network.state_dict().items()}
    write(path, lambda partial: save_file(weights, partial, metadata), advice, new)


def write(path: Path, save: Callable[[Path], object], advice: str = "Mend that and run again: it goes on from here.", new: bool = False) -> None:
    """Save to a path, whole or not at all. Raises GuidanceError, with advice, where the disk does not take it.

    new: raise FileExistsError where the path has a file already, also where another process writes it at this moment.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary(path) as partial:
            save(partial)
            taken = not (created if new else replaced)(partial, path)
    except Exception as error:
        pass_out_of_memory(error, f"{path.name} was written")
        raise GuidanceError(f"{path.name} could not be written ({short(str(error).partition(chr(10))[0])}). {advice}") from error
    if taken:
        raise FileExistsError(path)


@contextmanager
def temporary(path: Path) -> Iterator[Path]:
    """Where to write what will be renamed to a path: in a folder beside it, as savers have temporary files of their own. A path
    has one such folder, so that what a killed process leaves is deleted by the next; while another process writes in it, this
    one has another."""
    folder = path.with_name(f"{path.name}.partial")
    with suppress(FileExistsError):
        folder.mkdir()
    with held(folder) as own:
        if not own:
            folder = path.with_name(f"{path.name}.{token_hex(4)}.partial")
            folder.mkdir()
        try:
            yield folder / "whole"
        finally:
            rmtree(folder, ignore_errors=True)


def replaced(partial: Path, path: Path) -> bool:
    """Give a file a name, in place of what had it."""
    os.replace(partial, path)
    return True


def created(partial: Path, path: Path) -> bool:
    """Give a file a name that no other has. False where one has."""
    try:
        os.link(partial, path)
    except FileExistsError:
        return False
    except OSError:  # some disks know no links
        return not path.exists() and replaced(partial, path)
    return True


if sys.platform == "win32":

    @contextmanager
    def held(path: Path) -> Iterator[bool]:
        """Whether nobody has a file, or one in a folder, open: only then it can be renamed."""
        aside = path.with_name(f"{path.name}.{token_hex(4)}")
        try:
            path.rename(aside).rename(path)
            own = True
        except OSError:
            own = False
        yield own

    def in_use(path: Path) -> BinaryIO:
        """Open a file, so that `held` is False for it until it is closed."""
        return path.open("rb")
else:
    import fcntl

    @contextmanager
    def held(path: Path) -> Iterator[bool]:
        """Hold a file or folder until this process ends or lets go. False where another holds it, or it is gone."""
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            yield False
            return
        try:
            yield locked(descriptor, fcntl.LOCK_EX) and is_at(descriptor, path)
        finally:
            os.close(descriptor)

    def in_use(path: Path) -> BinaryIO:
        """Open a file, so that `held` is False for it until it is closed."""
        file = path.open("rb")
        locked(file.fileno(), fcntl.LOCK_SH)
        return file

    def locked(descriptor: int, kind: int) -> bool:
        """Lock what is open until it is closed. False where another has locked it; some disks know no locks."""
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            pass
        return True

    def is_at(descriptor: int, path: Path) -> bool:
        """Whether what is open still has this name: it may have been deleted before it was locked."""
        try:
            return os.path.samestat(os.fstat(descriptor), path.stat())
        except OSError:
            return False


def load_network(path: Path) -> tuple[GuidanceNetwork, Card]:
    """Raises GuidanceError, in a sentence, for whatever is not a guidance network or a damaged one.

    Of a damaged one no more is read than its header, and nothing is made that it does not hold.
    """
    try:
        shapes, metadata = read_header(path)
    except Exception as error:
        pass_out_of_memory(error, f"{path.name} was read")
        raise GuidanceError(f"{path.name} is not a safetensors file, or only half of one; copy it again.") from error
    if metadata.get("format") != FORMAT:
        raise GuidanceError(f"{path.name} is not a guidance network; Save Guidance Network writes those.")
    if metadata.get("version") != str(VERSION):
        raise GuidanceError(f"{path.name} has version {short(metadata.get('version'))} of the format; this pack reads {VERSION}. Update the pack.")
    try:
        network = GuidanceNetwork.described(record(Architecture, json.loads(metadata["architecture"])))
        card = _card(json.loads(metadata["card"]))
        _require_fitting(network, card, shapes)
        network.load_state_dict({name: tensor.float() for name, tensor in read_tensors(path).items()}, assign=True)
    except Exception as error:
        pass_out_of_memory(error, f"{path.name} was read")
        raise GuidanceError(f"{path.name} is a guidance network, but a damaged one ({short(error)}); copy it again.") from error
    if not all(tensor.isfinite().all() for tensor in network.state_dict().values()):
        raise GuidanceError(f"{path.name} holds weights that are not finite numbers: copy it again, and if that is no help, train it anew.")
    return network.eval().requires_grad_(False), card


def _card(content: Any) -> Card:
    """What this version knows of a card: a newer one may say more."""
    known = {item.name for item in fields(Card)}
    card = record(Card, {name: value for name, value in dict(content).items() if name in known})
    if card.form not in FORMS or len(card.rewards) != len(card.reward_weights):
        raise ValueError("its card contradicts itself")
    return card


def _require_fitting(network: GuidanceNetwork, card: Card, shapes: Shapes) -> None:
    """Raise ValueError where a file does not hold the network that it describes."""
    a = network.architecture
    if (a.inputs, a.scalar) != (FORMS[card.form].inputs, card.form == "potential"):
        raise ValueError("its card and its network contradict each other")
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    if wrong := [name for name in expected.keys() | shapes.keys() if expected.get(name) != shapes.get(name)]:
        raise ValueError(f"{quoted(min(wrong))} does not fit")
