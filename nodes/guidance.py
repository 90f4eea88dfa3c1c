"""Nodes that sample from the reward-weighted distribution."""

import logging
import math
from collections.abc import Callable
from typing import Any

import comfy.samplers
from comfy_api.v0_0_2 import io

import nodes as comfy_nodes

from ..guidance.estimators import ESTIMATORS, Settings, Smoothing
from .decoders import DECODERS, make_decoder
from .node import prepares_inputs
from .reporting import Reporter
from .rewards import REWARD, remarks
from .runtime import LatentReward, LoadedReward, RewardGuidance

CATEGORY = "reward guidance"
NO_TARGET = 100.0
"""A score that no reward reaches."""


def sampler_inputs(sampler_name: io.Input | None = None) -> list[io.Input]:
    """What a stock KSampler asks for, but for the model."""
    every_sampler = io.Combo.Input(
        "sampler_name",
        options=comfy.samplers.KSampler.SAMPLERS,
        tooltip="How each step is taken, which changes look and speed. Any sampler of ComfyUI works; take the one that the model is known to like.",
    )
    return [
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=2**64 - 1,
            control_after_generate=True,
            tooltip="The seed of the noise: another one makes other pictures, the same one makes the same again.",
        ),
        io.Int.Input(
            "steps", default=20, min=1, max=10000, tooltip="Denoising steps: more are finer and take longer. 15 to 50; distilled models need fewer."
        ),
        io.Float.Input(
            "cfg",
            default=4.0,
            min=0.0,
            max=100.0,
            step=0.1,
            round=0.01,
            tooltip="Classifier-free guidance scale: how strictly to keep to the prompt. 3 to 8; distilled models take 1.",
        ),
        sampler_name or every_sampler,
        io.Combo.Input(
            "scheduler",
            options=comfy.samplers.KSampler.SCHEDULERS,
            tooltip="How the noise falls from step to step, so where on the way most steps are spent. Take the one that the model is known to like.",
        ),
        io.Conditioning.Input("positive", tooltip="What the pictures should show."),
        io.Conditioning.Input("negative", tooltip="What they should not show."),
        io.Latent.Input("latent_image", tooltip="The latent to denoise."),
        io.Float.Input("denoise", default=1.0, min=0.0, max=1.0, step=0.01, tooltip="1 starts from noise; less keeps more of the latent. 0.3 to 1."),
    ]


def reward_inputs() -> list[io.Input]:
    return [
        REWARD.Input("reward", optional=True, tooltip="What the pictures should follow. Unconnected, the model samples as it always does."),
        io.String.Input(
            "prompt",
            multiline=True,
            default="",
            optional=True,
            tooltip="The prompt, for rewards that compare the picture with it. Write the same text as in the positive prompt.",
        ),
        io.Float.Input(
            "strength",
            default=1.0,
            min=0.0,
            max=20.0,
            step=0.05,
            optional=True,
            tooltip="How closely to follow the reward. 0 is off, 1 the reward-weighted distribution; lower it when pictures look overdone. 0.3 to 2.",
        ),
    ]


def held_out_input() -> io.Input:
    return REWARD.Input(
        "held_out",
        optional=True,
        tooltip="A second reward that is not followed but drawn beside the first. Where it falls while the first rises, the pictures only fool "
        "the first: lower the strength.",
    )


def judging_inputs() -> list[io.Input]:
    """How a reward sees estimates on the way, and what judges them beside it."""
    rare = dict[str, Any](advanced=True, optional=True)
    return [
        io.Combo.Input(
            "decoder",
            options=list(DECODERS),
            tooltip="How estimates become pixels. auto: taesd if its file is in models/vae_approx, else the vae, else latent_rgb. "
            "taesd shows pictures of 1024 pixels and more at half their size.",
            **rare,
        ),
        io.Int.Input(
            "frames",
            default=3,
            min=1,
            max=64,
            tooltip="Video: how many evenly spaced frames are scored in each look. More leave less unseen, and cost as much more. 1 to 8.",
            **rare,
        ),
        io.Vae.Input("vae", optional=True, tooltip="The model's VAE, for the decoder 'vae', which 'auto' takes where there is no taesd."),
        held_out_input(),
    ]


def interval_inputs(what: str, ends: str) -> list[io.Input]:
    """Where on the way something acts; `ends` says where it may well end."""
    common = {"min": 0.0, "max": 1.0, "step": 0.01, "advanced": True, "optional": True}
    way = "on the way from noise (0) to the picture (1)"
    start = f"Where {what} starts, {way}. Later leaves the composition to the model. 0 to 0.3."
    end = f"Where {what} ends, {way}. Earlier leaves the finish to the model, which keeps artefacts out. {ends}."
    return [
        io.Float.Input("start_percent", default=0.0, tooltip=start, **common),
        io.Float.Input("end_percent", default=1.0, tooltip=end, **common),
    ]


def tuning_inputs() -> list[io.Input]:
    rare = dict[str, Any](advanced=True, optional=True)
    return [
        io.Float.Input(
            "temperature",
            default=0.05,
            min=0.001,
            max=100.0,
            step=0.005,
            tooltip="β in exp(reward/β), in units of the reward's typical spread. Lower values insist on the best pictures. 0.03 to 1.",
            **rare,
        ),
        io.Combo.Input(
            "estimator",
            options=list(ESTIMATORS),
            tooltip="shift: no additional model call. shift_two_pass: two calls a step. denoised: weakest. "
            "jacobian: backward pass through the model, much memory, prone to artefacts.",
            **rare,
        ),
        *interval_inputs("guidance", "0.6 to 1"),
        io.Int.Input(
            "smoothing",
            default=0,
            min=0,
            max=64,
            tooltip="Points around the estimate whose gradients are averaged; each costs a look at the reward. With 4 of them, strength may be 2. "
            "0 to 8.",
            **rare,
        ),
        io.Float.Input(
            "radius",
            default=1.0,
            min=0.0,
            max=2.0,
            step=0.05,
            tooltip="How far the points of smoothing lie from the estimate, in standard deviations of what the noise still leaves open. Farther is "
            "smoother; too far, and the reward sees no pictures. 0.3 to 1.",
            **rare,
        ),
        io.Float.Input(
            "momentum",
            default=0.5,
            min=0.0,
            max=0.95,
            step=0.05,
            tooltip="Share of the previous reward gradient that is kept. More steadies the direction, and lags behind. 0 to 0.7.",
            **rare,
        ),
        io.Float.Input(
            "cap",
            default=0.5,
            min=0.0,
            max=20.0,
            step=0.05,
            tooltip="Largest shift of a sample, in standard deviations of its noise. Lower it when colours burn; raise it when more strength changes "
            "nothing, but too far breaks the picture. 0.25 to 1.",
            **rare,
        ),
        io.Int.Input(
            "every",
            default=1,
            min=1,
            max=100,
            tooltip="Take a new reward gradient every so many times the sampler asks the model. 1 to 4: more is faster and weaker.",
            **rare,
        ),
        *judging_inputs(),
        io.Float.Input(
            "target",
            default=NO_TARGET,
            min=-NO_TARGET,
            max=NO_TARGET,
            step=0.1,
            tooltip="A score that is good enough, as the node's curve shows scores: near it, the direction that led there is kept and fades instead "
            "of being replaced at every step; a low one weakens guidance and never stops it. 0.5 to 2, with strength 3 and momentum 0; 100 is "
            "never content.",
            **rare,
        ),
    ]


def guide(hidden, model, reward: LoadedReward | None, prompt: str, strength: float, tuning: dict) -> tuple[object, Reporter | None]:
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


HIDDEN = [io.Hidden.unique_id]


@prepares_inputs
class RewardGuidanceModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RewardGuidance",
            display_name="Reward Guidance",
            category=CATEGORY,
            description="Makes a model follow a reward while it samples, with any sampler and guider, without finetuning.",
            search_aliases=["alignment", "preference guidance", "reward gradient", "PickScore guidance", "CLIP guidance"],
            inputs=[io.Model.Input("model", tooltip="The model to guide."), *reward_inputs(), *tuning_inputs()],
            outputs=[io.Model.Output(tooltip="The model, guided by the reward.")],
            hidden=HIDDEN,
        )

    @classmethod
    def execute(cls, model, prompt: str, strength: float, reward: LoadedReward | None = None, **tuning) -> io.NodeOutput:
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
        (latent,) = sample(guided, seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image, denoise=denoise)
        return io.NodeOutput(latent, ui={"reward_guidance": reporter.history if reporter else []})


NODES = [RewardGuidanceModel, RewardGuidanceKSampler]
