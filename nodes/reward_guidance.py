"""Nodes that sample from the reward-weighted distribution."""

import logging
import math
from collections.abc import Callable

from comfy_api.v0_0_2 import io

import nodes as comfy_nodes

from ..guidance.estimators import Settings, Smoothing
from .wiring.decoders import make_decoder
from .wiring.inputs import HIDDEN, NO_TARGET, reward_inputs, sampler_inputs, tuning_inputs
from .wiring.latent_reward import LatentReward
from .wiring.loaded import LoadedReward
from .wiring.node import prepares_inputs
from .wiring.patch_reward import RewardGuidance
from .wiring.reporting import Reporter
from .wiring.scoring import remarks

CATEGORY = "reward guidance"


def guide(
    hidden, model, reward: LoadedReward | None, prompt: str, strength: float, tuning: dict
) -> tuple[object, Reporter | None]:
    """The guided clone of a model, and the reporter that hears of its steps."""
    if reward is None or strength == 0:
        return model, None
    decoder = make_decoder(tuning["decoder"], model.get_model_object("latent_format"), tuning.get("vae"))
    logging.info(f"Reward guidance decodes by {decoder.name}.")
    reporter = Reporter(hidden, decoder=decoder.name)
    held_out = tuning.get("held_out")
    for remark in remarks(prompt, reward, held_out):
        logging.info(remark)
    guidance = RewardGuidance(
        reward=LatentReward(reward, decoder, prompt, tuning["frames"]),
        estimator=tuning["estimator"],
        settings=Settings(
            strength=strength,
            temperature=tuning["temperature"],
            smoothing=Smoothing(tuning["smoothing"], tuning["radius"]),
            momentum=tuning["momentum"],
            cap=tuning["cap"],
            target=math.inf if tuning["target"] == NO_TARGET else tuning["target"],
            every=tuning["every"],
        ),
        start=tuning["start_percent"],
        end=tuning["end_percent"],
        report=reporter,
        held_out=LatentReward(held_out, decoder, prompt, tuning["frames"]) if held_out else None,
    )
    return guidance.attach(model), reporter


@prepares_inputs
class RewardGuidanceModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RewardGuidance",
            display_name="Reward Guidance",
            category=CATEGORY,
            description="Makes a model follow a reward while it samples, with any sampler and guider, without finetuning.",
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
        return io.NodeOutput(guide(cls.hidden, model, reward, prompt, strength, tuning)[0])


@prepares_inputs
class RewardGuidanceKSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RewardGuidanceKSampler",
            display_name="KSampler (Reward Guided)",
            category=CATEGORY,
            description="A KSampler whose pictures follow a reward, at the model calls of the plain one.",
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
        guided, reporter = guide(cls.hidden, model, reward, prompt, strength, tuning)
        sample: Callable = comfy_nodes.common_ksampler
        (latent,) = sample(
            guided, seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image, denoise=denoise
        )
        return io.NodeOutput(latent, ui={"reward_guidance": reporter.history if reporter else []})


NODES = [RewardGuidanceModel, RewardGuidanceKSampler]
