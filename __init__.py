"""Reward Guidance for ComfyUI: sample from p(x)·exp(reward/β) without finetuning."""

from comfy_api.v0_0_2 import ComfyExtension, io

from .nodes import guidance, particles, public, reporting, rewards, scores, selection

GROUPS = rewards, scores, guidance, selection, particles
WEB_DIRECTORY = "./nodes/web"


class RewardGuidanceExtension(ComfyExtension):
    async def on_load(self) -> None:
        rewards.register_folder()
        reporting.serve_steps()
        public.publish()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [node for group in GROUPS for node in group.NODES]


async def comfy_entrypoint() -> RewardGuidanceExtension:
    return RewardGuidanceExtension()
