"""Builds a guided model from the inputs of a node."""

import logging
import math

from ...guidance.estimators import Settings, Smoothing
from .decoders import make_decoder
from .inputs import NO_TARGET
from .latent_reward import LatentReward
from .loaded import LoadedReward
from .patch_reward import RewardGuidance
from .reporting import Reporter
from .scoring import prompt_remarks


def guided_model(
    hidden, model, reward: LoadedReward | None, prompt: str, strength: float, tuning: dict
) -> tuple[object, Reporter | None]:
    """A guided clone of the model, and the reporter of its steps.

    Without a reward, or with strength 0: the model itself, and None. tuning: the values of `tuning_inputs`.
    """
    if reward is None or strength == 0:
        return model, None
    decoder = make_decoder(tuning["decoder"], model.get_model_object("latent_format"), tuning.get("vae"))
    logging.info(f"Reward guidance decodes by {decoder.name}.")
    reporter = Reporter(hidden, decoder=decoder.name)
    held_out = tuning.get("held_out")
    for remark in prompt_remarks(prompt, reward, held_out):
        logging.info(remark)
    guidance = RewardGuidance(
        reward=LatentReward(reward, decoder, prompt, tuning["frames"]),
        estimator=tuning["estimator"],
        settings=settings_from(strength, tuning),
        start=tuning["start_percent"],
        end=tuning["end_percent"],
        on_step=reporter,
        held_out=LatentReward(held_out, decoder, prompt, tuning["frames"]) if held_out else None,
    )
    return guidance.attach(model), reporter


def settings_from(strength: float, tuning: dict) -> Settings:
    return Settings(
        strength=strength,
        temperature=tuning["temperature"],
        smoothing=Smoothing(tuning["smoothing"], tuning["radius"]),
        momentum=tuning["momentum"],
        cap=tuning["cap"],
        target=math.inf if tuning["target"] == NO_TARGET else tuning["target"],
        every=tuning["every"],
    )
