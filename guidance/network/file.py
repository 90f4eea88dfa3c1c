"""Guidance networks as files: one safetensors each, with the card in its metadata."""

import json
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import save_file

from ..disk import write
from ..errors import GuidanceError, pass_out_of_memory, quoted, short
from ..records import record
from ..tensors import Shapes, read_header, read_tensors
from .card import Card, card_from
from .forms import FORMS
from .unet import Architecture, GuidanceNetwork

FORMAT = "reward-guidance-network"
VERSION = 1


def save_network(
    path: Path, network: GuidanceNetwork, card: Card, advice: str = "Mend that and save again.", new: bool = False
) -> None:
    """Whole or not at all. Raises GuidanceError where the disk does not take it, and FileExistsError as `write` does."""
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "architecture": json.dumps(asdict(network.architecture)),
        "card": json.dumps(asdict(card)),
    }
    weights = {name: tensor.contiguous().cpu() for name, tensor in network.state_dict().items()}
    write(path, lambda partial: save_file(weights, partial, metadata), advice, new)


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
        raise GuidanceError(
            f"{path.name} has version {short(metadata.get('version'))} of the format; this pack reads {VERSION}. Update the pack."
        )
    try:
        network = GuidanceNetwork.described(record(Architecture, json.loads(metadata["architecture"])))
        card = card_from(json.loads(metadata["card"]))
        _require_fitting(network, card, shapes)
        network.load_state_dict({name: tensor.float() for name, tensor in read_tensors(path).items()}, assign=True)
    except Exception as error:
        pass_out_of_memory(error, f"{path.name} was read")
        raise GuidanceError(
            f"{path.name} is a guidance network, but a damaged one ({short(error)}); copy it again."
        ) from error
    if not all(tensor.isfinite().all() for tensor in network.state_dict().values()):
        raise GuidanceError(
            f"{path.name} holds weights that are not finite numbers: copy it again, and if that is no help, train it anew."
        )
    return network.eval().requires_grad_(False), card


def _require_fitting(network: GuidanceNetwork, card: Card, shapes: Shapes) -> None:
    """Raise ValueError where a file does not hold the network that it describes."""
    a = network.architecture
    if (a.inputs, a.scalar) != (FORMS[card.form].inputs, card.form == "potential"):
        raise ValueError("its card and its network contradict each other")
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    if wrong := [name for name in expected.keys() | shapes.keys() if expected.get(name) != shapes.get(name)]:
        raise ValueError(f"{quoted(min(wrong))} does not fit")
