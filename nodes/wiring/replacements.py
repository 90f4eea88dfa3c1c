"""What becomes of a node that goes or changes its inputs: ComfyUI puts the new one in its place, in the page and in prompts."""

from comfy_api.v0_0_2 import ComfyAPI, io

REPLACEMENTS: list[io.NodeReplace] = []
"""Ids are never renamed, so there is none yet."""


async def register() -> None:
    for replacement in REPLACEMENTS:
        await ComfyAPI().node_replacement.register(replacement)
