"""What nodes write into the PNG files of a run, beside the workflow: `reward_guidance`, node id -> what the node says of its pictures."""

import json
from collections.abc import Sequence

from .reporting import running

METADATA = "reward_guidance"


def note(hidden, entry: dict) -> None:
    """ComfyUI hands the same dictionary to every node of a run, and those that save pictures write all of it: after the whole list where a
    node runs for each batch of one. The entries of several batches are therefore a list too."""
    if hidden.extra_pnginfo is not None:
        entries = hidden.extra_pnginfo.setdefault(METADATA, {})
        before = entries.get(hidden.unique_id, [])
        together = [*(before if isinstance(before, list) else [before]), entry]
        entries[hidden.unique_id] = together if before else entry


def downstream_inputs(hidden, outputs: Sequence[int]) -> str:
    """For `fingerprint_inputs`: where these outputs go in the prompt that is being executed, so that a node whose pictures are to be saved
    in another way notes its entry once more, and does not leave them without one because ComfyUI remembers what it gave."""
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
