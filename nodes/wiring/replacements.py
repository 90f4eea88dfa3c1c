"""Replacements for nodes that were removed or changed their inputs. ComfyUI applies them to workflows and prompts."""

from comfy_api.v0_0_2 import ComfyAPI, io

REPLACEMENTS: list[io.NodeReplace] = []
"""Empty: no id was renamed yet."""


async def register() -> None:
    for replacement in REPLACEMENTS:
        await ComfyAPI().node_replacement.register(replacement)
