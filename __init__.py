"""Reward Guidance for ComfyUI: sample from p(x)·exp(reward/β) without finetuning."""

from comfy_api.v0_0_2 import ComfyExtension, io

from .nodes import guidance, particles, rewards, selection


class RewardGuidanceExtension(ComfyExtension):
    async def on_load(self) -> None:
        rewards.register_folder()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [*rewards.NODES, *guidance.NODES, *selection.NODES, *particles.NODES]


async def comfy_entrypoint() -> RewardGuidanceExtension:
    return RewardGuidanceExtension()
