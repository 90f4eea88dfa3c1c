"""Adds entries to the metadata of PNG files: `reward_guidance` maps a node id to its entry."""

import json
from collections.abc import Sequence

from .reporting import running

METADATA = "reward_guidance"


def add_entry(hidden, entry: dict) -> None:
    """Add the entry of a node to the metadata of the run. A node that runs for several batches has a list of entries.

    ComfyUI passes one dictionary to all nodes of a run, and the nodes that save images write all of it.
    """
    if hidden.extra_pnginfo is not None:
        entries = hidden.extra_pnginfo.setdefault(METADATA, {})
        before = entries.get(hidden.unique_id, [])
        together = [*(before if isinstance(before, list) else [before]), entry]
        entries[hidden.unique_id] = together if before else entry


def downstream_inputs(hidden, outputs: Sequence[int]) -> str:
    """A fingerprint of the nodes that these outputs are connected to, in the prompt that is being executed.

    A cached node adds no entry. With this fingerprint it runs again when the images are saved in another way.
    """
    links = [[hidden.unique_id, output] for output in outputs]
    item = running()
    prompt = item[2] if item else {}
    return json.dumps(
        {
            node: content["inputs"]
            for node, content in prompt.items()
            if any(v in links for v in content["inputs"].values())
        }
    )
