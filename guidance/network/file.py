"""Guidance network files: safetensors, with the architecture and the card as JSON in the metadata."""

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
    path: Path, network: GuidanceNetwork, card: Card, advice: str = "Correct that and save again.", new: bool = False
) -> None:
    """Write a network file atomically.

    Raises GuidanceError with `advice` if that fails, and FileExistsError as `write` does.
    """
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "architecture": json.dumps(asdict(network.architecture)),
        "card": json.dumps(asdict(card)),
    }
    weights = {name: tensor.contiguous().cpu() for name, tensor in network.state_dict().items()}
    write(path, lambda partial: save_file(weights, partial, metadata), advice, new)


def load_network(path: Path) -> tuple[GuidanceNetwork, Card]:
    """Read a network file, in single precision and frozen.

    Raises GuidanceError if it is damaged, or of another kind. The header is checked before any weights are read or
    allocated.
    """
    try:
        shapes, metadata = read_header(path)
    except Exception as error:
        pass_out_of_memory(error, f"{path.name} was read")
        raise GuidanceError(f"{path.name} is not a safetensors file, or an incomplete one: copy it again.") from error
    if metadata.get("format") != FORMAT:
        raise GuidanceError(f"{path.name} is not a guidance network. Save Guidance Network writes those.")
    if metadata.get("version") != str(VERSION):
        raise GuidanceError(
            f"{path.name} has version {short(metadata.get('version'))} of the format, "
            f"but this pack reads version {VERSION}: update the pack."
        )
    try:
        network = GuidanceNetwork.without_weights(record(Architecture, json.loads(metadata["architecture"])))
        card = card_from(json.loads(metadata["card"]))
        _require_fitting(network, card, shapes)
        network.load_state_dict({name: tensor.float() for name, tensor in read_tensors(path).items()}, assign=True)
    except Exception as error:
        pass_out_of_memory(error, f"{path.name} was read")
        raise GuidanceError(
            f"{path.name} is a guidance network, but it is damaged ({short(error)}): copy it again."
        ) from error
    if not all(tensor.isfinite().all() for tensor in network.state_dict().values()):
        raise GuidanceError(
            f"{path.name} holds weights that are not finite numbers: copy it again, "
            "and if that does not help, train it again."
        )
    return network.eval().requires_grad_(False), card


def _require_fitting(network: GuidanceNetwork, card: Card, shapes: Shapes) -> None:
    """Raise ValueError if the tensors of a file do not fit the network that it describes."""
    a = network.architecture
    channels = card.shape[0] if card.shape else card.base.channels
    if (a.inputs, a.scalar, a.channels) != (FORMS[card.form].inputs, card.form == "potential", channels):
        raise ValueError("its card and its network contradict each other")
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    if wrong := [name for name in expected.keys() | shapes.keys() if expected.get(name) != shapes.get(name)]:
        raise ValueError(f"{quoted(min(wrong))} does not fit")
