"""Reward Guidance for ComfyUI: sample from p(x)·exp(reward/β) without finetuning."""

from comfy_api.v0_0_2 import ComfyExtension, io

from .nodes import guidance_data, guidance_network, particles, reward_guidance, rewards, scores, selection, training
from .nodes.wiring import folders, public, replacements, reporting

GROUPS = rewards, scores, reward_guidance, guidance_network, guidance_data, training, selection, particles
WEB_DIRECTORY = "./nodes/web"


class RewardGuidanceExtension(ComfyExtension):
    async def on_load(self) -> None:
        for folder in (folders.REWARDS, folders.NETWORKS):
            folders.register_folder(folder)
        reporting.serve_steps()
        public.publish()
        await replacements.register()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [node for group in GROUPS for node in group.NODES]


async def comfy_entrypoint() -> RewardGuidanceExtension:
    return RewardGuidanceExtension()
