"""Nodes that guide the sampling by the gradient of a reward."""

from collections.abc import Callable

from comfy_api.v0_0_2 import io

import nodes as comfy_nodes

from .wiring.guided_model import guided_model
from .wiring.inputs import HIDDEN, reward_inputs, sampler_inputs, tuning_inputs
from .wiring.loaded import LoadedReward
from .wiring.node import prepares_inputs

CATEGORY = "reward guidance"


@prepares_inputs
class RewardGuidanceModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RewardGuidance",
            display_name="Reward Guidance",
            category=CATEGORY,
            description="Guides a model by a reward during sampling. Works with any sampler and guider, without "
            "finetuning.",
            search_aliases=[
                "alignment",
                "preference guidance",
                "reward gradient",
                "PickScore guidance",
                "CLIP guidance",
            ],
            inputs=[io.Model.Input("model", tooltip="The model to guide."), *reward_inputs(), *tuning_inputs()],
            outputs=[io.Model.Output(tooltip="The model, guided by the reward.")],
            hidden=HIDDEN,
        )

    @classmethod
    def execute(
        cls, model, prompt: str, strength: float, reward: LoadedReward | None = None, **tuning
    ) -> io.NodeOutput:
        return io.NodeOutput(guided_model(cls.hidden, model, reward, prompt, strength, tuning)[0])


@prepares_inputs
class RewardGuidanceKSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RewardGuidanceKSampler",
            display_name="KSampler (Reward Guided)",
            category=CATEGORY,
            description="A KSampler that is guided by a reward, without additional model calls.",
            search_aliases=["reward sampler", "aligned sampling", "preference sampler"],
            inputs=[
                io.Model.Input("model", tooltip="The model to guide."),
                *sampler_inputs(),
                *reward_inputs(),
                *tuning_inputs(),
            ],
            outputs=[io.Latent.Output(tooltip="The denoised latent.")],
            hidden=HIDDEN,
        )

    @classmethod
    def execute(
        cls,
        model,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        positive,
        negative,
        latent_image: dict,
        denoise: float,
        prompt: str,
        strength: float,
        reward: LoadedReward | None = None,
        **tuning,
    ) -> io.NodeOutput:
        guided, reporter = guided_model(cls.hidden, model, reward, prompt, strength, tuning)
        sample: Callable = comfy_nodes.common_ksampler
        (latent,) = sample(
            guided, seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image, denoise=denoise
        )
        return io.NodeOutput(latent, ui={"reward_guidance": reporter.history if reporter else []})


NODES = [RewardGuidanceModel, RewardGuidanceKSampler]
