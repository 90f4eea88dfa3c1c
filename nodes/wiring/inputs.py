"""Types and widgets that several nodes share."""

import re
from typing import Any

import comfy.samplers
from comfy_api.v0_0_2 import io

from ...guidance.errors import GuidanceError, quoted
from ...guidance.estimators import ESTIMATORS
from .decoders import DECODERS

REWARD = io.Custom("REWARD")
NETWORK = io.Custom("GUIDANCE_NETWORK")
DATA = io.Custom("GUIDANCE_DATA")
HIDDEN = [io.Hidden.unique_id]
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
            "steps",
            default=20,
            min=1,
            max=10000,
            tooltip="Denoising steps: more are finer and take longer. 15 to 50; distilled models need fewer.",
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
        io.Float.Input(
            "denoise",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="1 starts from noise; less keeps more of the latent. 0.3 to 1.",
        ),
    ]


def reward_inputs() -> list[io.Input]:
    return [
        REWARD.Input(
            "reward",
            optional=True,
            tooltip="What the pictures should follow. Unconnected, the model samples as it always does.",
        ),
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


def scoring_inputs() -> list[io.Input]:
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
        io.Vae.Input(
            "vae",
            optional=True,
            tooltip="The model's VAE, for the decoder 'vae', which 'auto' takes where there is no taesd.",
        ),
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
        *scoring_inputs(),
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


GUIDES, TILTS = "4 about a quarter of it; 0.5 to 5", "and more guesses; 0.5 to 2"


def strength_input(beyond: str = GUIDES) -> io.Input:
    """`beyond`: what a strength above 1 does, and a good range."""
    return io.Float.Input(
        "strength",
        default=1.0,
        min=0.0,
        max=20.0,
        step=0.05,
        optional=True,
        tooltip=f"How closely to follow what the network learned. 0 is off, 1 the temperature it was trained at, {beyond}.",
    )


def noise_steps_input(name: str = "noise_steps", **options) -> io.Input:
    return io.Int.Input(
        name,
        default=4,
        min=1,
        max=1000,
        optional=True,
        tooltip="For networks that tilt noise: calls of the small network before the model is asked. More are more exact; 4 to 16.",
        **options,
    )


def parse_colour(colour: str) -> tuple[float, float, float]:
    """#rrggbb -> red, green and blue in [0,1]. Raises GuidanceError for another format."""
    if not (digits := re.fullmatch("#?([0-9a-fA-F]{2})([0-9a-fA-F]{2})([0-9a-fA-F]{2})(?:[0-9a-fA-F]{2})?", colour)):
        raise GuidanceError(f"A colour is written as #rrggbb, not as {quoted(colour)}.")
    red, green, blue = (int(pair, 16) / 255 for pair in digits.groups())
    return red, green, blue
