"""Link types and widgets that several nodes share."""

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
"""A target that no reward reaches: it switches the target off."""


def sampler_inputs(sampler_name: io.Input | None = None) -> list[io.Input]:
    """The inputs of a stock KSampler without the model."""
    every_sampler = io.Combo.Input(
        "sampler_name",
        options=comfy.samplers.KSampler.SAMPLERS,
        tooltip="The sampling method, which changes look and speed. Any sampler of ComfyUI works; "
        "choose one that is known to work well with the model.",
    )
    return [
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=2**64 - 1,
            control_after_generate=True,
            tooltip="The seed of the noise. The same seed makes the same picture again.",
        ),
        io.Int.Input(
            "steps",
            default=20,
            min=1,
            max=10000,
            tooltip="Denoising steps. More steps give finer pictures and take longer. 15 to 50; distilled models need "
            "fewer.",
        ),
        io.Float.Input(
            "cfg",
            default=4.0,
            min=0.0,
            max=100.0,
            step=0.1,
            round=0.01,
            tooltip="Classifier-free guidance scale. Higher values follow the prompt more strictly. "
            "3 to 8; 1 for distilled models.",
        ),
        sampler_name or every_sampler,
        io.Combo.Input(
            "scheduler",
            options=comfy.samplers.KSampler.SCHEDULERS,
            tooltip="The noise level of each step. Choose one that is known to work well with the model.",
        ),
        io.Conditioning.Input("positive", tooltip="What the pictures should show."),
        io.Conditioning.Input("negative", tooltip="What the pictures should not show."),
        io.Latent.Input("latent_image", tooltip="The latent to denoise."),
        io.Float.Input(
            "denoise",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="1 starts from pure noise; lower values keep more of the latent. 0.3 to 1.",
        ),
    ]


def reward_inputs() -> list[io.Input]:
    """The inputs of reward guidance that are always visible."""
    return [
        REWARD.Input(
            "reward",
            optional=True,
            tooltip="The reward to follow. If it is not connected, the model samples without guidance.",
        ),
        io.String.Input(
            "prompt",
            multiline=True,
            default="",
            optional=True,
            tooltip="The prompt, for rewards that compare the picture with it. "
            "Write the same text as in the positive prompt.",
        ),
        io.Float.Input(
            "strength",
            default=1.0,
            min=0.0,
            max=20.0,
            step=0.05,
            optional=True,
            tooltip="How strongly to follow the reward. 0 is off, 1 samples the reward-weighted distribution. "
            "Lower it if pictures look overdone. 0.3 to 2.",
        ),
    ]


def held_out_input() -> io.Input:
    return REWARD.Input(
        "held_out",
        optional=True,
        tooltip="A second reward, which is only measured and drawn in the curve. If it falls while the first rises, "
        "the pictures exploit errors of the first reward: lower the strength.",
    )


def scoring_inputs() -> list[io.Input]:
    """The inputs that say how a reward scores the estimates during sampling."""
    rare = dict[str, Any](advanced=True, optional=True)
    return [
        io.Combo.Input(
            "decoder",
            options=list(DECODERS),
            tooltip="How estimates are decoded to pixels for the reward. auto: taesd if its file is in "
            "models/vae_approx, else the vae, else latent_rgb. taesd decodes pictures of 1024 pixels and more at half "
            "their size.",
            **rare,
        ),
        io.Int.Input(
            "frames",
            default=3,
            min=1,
            max=64,
            tooltip="Videos only: number of evenly spaced frames that are scored. More frames cover the video better; "
            "the cost is proportional. 1 to 8.",
            **rare,
        ),
        io.Vae.Input(
            "vae",
            optional=True,
            tooltip="The model's VAE, for the decoder 'vae'. 'auto' uses it if there is no taesd.",
        ),
        held_out_input(),
    ]


def interval_inputs(what: str, ends: str) -> list[io.Input]:
    """The part of the sampling in which `what` acts. ends: a good range for the end."""
    common = {"min": 0.0, "max": 1.0, "step": 0.01, "advanced": True, "optional": True}
    way = "on the way from noise (0) to the picture (1)"
    start = f"Where {what} starts, {way}. A later start leaves the composition to the model. 0 to 0.3."
    end = f"Where {what} ends, {way}. An earlier end leaves the details to the model and avoids artefacts. {ends}."
    return [
        io.Float.Input("start_percent", default=0.0, tooltip=start, **common),
        io.Float.Input("end_percent", default=1.0, tooltip=end, **common),
    ]


def tuning_inputs() -> list[io.Input]:
    """The inputs of reward guidance that are rarely changed."""
    rare = dict[str, Any](advanced=True, optional=True)
    return [
        io.Float.Input(
            "temperature",
            default=0.05,
            min=0.001,
            max=100.0,
            step=0.005,
            tooltip="β in exp(reward/β), in units of the reward's typical spread. Lower values prefer the best "
            "pictures more. 0.03 to 1.",
            **rare,
        ),
        io.Combo.Input(
            "estimator",
            options=list(ESTIMATORS),
            tooltip="How the reward's gradient guides the model. shift: no additional model calls. shift_two_pass: "
            "two calls a step. denoised: weakest. jacobian: backward pass through the model, much memory, prone to "
            "artefacts.",
            **rare,
        ),
        *interval_inputs("guidance", "0.6 to 1"),
        *gradient_inputs(),
        *scoring_inputs(),
        io.Float.Input(
            "target",
            default=NO_TARGET,
            min=-NO_TARGET,
            max=NO_TARGET,
            step=0.1,
            tooltip="A score that is good enough, in the units of the node's curve. Near it, the previous shift is "
            "kept and decays with the noise, instead of being replaced at every step. A low target weakens guidance "
            "but never stops it. 0.5 to 2, with strength 3 and momentum 0; 100 is off.",
            **rare,
        ),
    ]


def gradient_inputs() -> list[io.Input]:
    """How the gradient of the reward is computed and limited."""
    rare = dict[str, Any](advanced=True, optional=True)
    return [
        io.Int.Input(
            "smoothing",
            default=0,
            min=0,
            max=64,
            tooltip="Number of points around the estimate whose gradients are averaged. Each costs one evaluation of "
            "the reward. With 4 points, strength may be 2. 0 to 8.",
            **rare,
        ),
        io.Float.Input(
            "radius",
            default=1.0,
            min=0.0,
            max=2.0,
            step=0.05,
            tooltip="Distance of the smoothing points from the estimate, in standard deviations of the estimate's "
            "uncertainty. Larger values smooth more; if they are too large, the points are no realistic pictures. 0.3 "
            "to 1.",
            **rare,
        ),
        io.Float.Input(
            "momentum",
            default=0.5,
            min=0.0,
            max=0.95,
            step=0.05,
            tooltip="Share of the previous reward gradient that is kept. Higher values make the direction steadier, "
            "but slower to change. 0 to 0.7.",
            **rare,
        ),
        io.Float.Input(
            "cap",
            default=0.5,
            min=0.0,
            max=20.0,
            step=0.05,
            tooltip="Largest shift of a sample, in standard deviations of its noise. Lower it if colours are "
            "oversaturated. Raise it if more strength has no effect; too high values break the picture. 0.25 to 1.",
            **rare,
        ),
        io.Int.Input(
            "every",
            default=1,
            min=1,
            max=100,
            tooltip="A new reward gradient is computed once in so many model calls. Higher values are faster and "
            "weaker. 1 to 4.",
            **rare,
        ),
    ]


GUIDES, TILTS = "4 about a quarter of it; 0.5 to 5", "higher values extrapolate; 0.5 to 2"
"""The end of the tooltip of `strength`, for networks that guide data or tilt noise."""


def strength_input(beyond: str = GUIDES) -> io.Input:
    """The strength of a network. beyond: the effect of a strength above 1, and a good range."""
    return io.Float.Input(
        "strength",
        default=1.0,
        min=0.0,
        max=20.0,
        step=0.05,
        optional=True,
        tooltip=f"How strongly to follow the network. 0 is off, 1 the temperature that it was trained at, {beyond}.",
    )


def noise_steps_input(name: str = "noise_steps", **options) -> io.Input:
    return io.Int.Input(
        name,
        default=4,
        min=1,
        max=1000,
        optional=True,
        tooltip="For networks that tilt noise: calls of the network before the model call. More calls are more exact. "
        "4 to 16.",
        **options,
    )


def parse_colour(colour: str) -> tuple[float, float, float]:
    """#rrggbb -> red, green and blue in [0,1]. Raises GuidanceError for another format."""
    if not (digits := re.fullmatch("#?([0-9a-fA-F]{2})([0-9a-fA-F]{2})([0-9a-fA-F]{2})(?:[0-9a-fA-F]{2})?", colour)):
        raise GuidanceError(f"A colour is written as #rrggbb, not as {quoted(colour)}.")
    red, green, blue = (int(pair, 16) / 255 for pair in digits.groups())
    return red, green, blue
