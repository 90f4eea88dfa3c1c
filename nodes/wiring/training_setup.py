"""What a training needs of a model or a reward beside the samples."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import comfy.samplers
import torch
from torch import Tensor

from ...guidance.data.batches import Batch
from ...guidance.errors import GuidanceError
from ...guidance.rewards import CombinedReward
from ...guidance.training.objectives import Plan, in_chunks
from .autograd import static_clone
from .decoders import make_decoder
from .latent_reward import LatentReward, training_through
from .sample_maker import GuidanceData, SampleMaker
from .scoring import weighted_parts


def objective_of(data: GuidanceData, objective: str) -> str:
    """auto, made out where what is at hand decides it: noise that is to leap needs the generator, and a reward that has a gradient."""
    noise, maker = data.collection.description.base.target == "noise", data.maker
    leaps = noise and maker is not None and maker.steps == 1 and maker.reward.reward.differentiable
    return "reward_gradient" if objective == "auto" and leaps else objective


def assistants(data: GuidanceData, plan: Plan, weights: Sequence[float]) -> dict[str, Callable]:
    """What a training asks beside the samples: the model at other points, or the gradient of the rewards by these weights; and what its steps
    happen in."""
    description, model, reward, instead = data.collection.description, None, None, ""
    asked: dict[str, Callable] = {}
    if plan.form == "shift":
        instead = "the form correction"
        maker = with_static_model(data.ask("The form shift"), "The form shift", instead)
        model = maker.model
        asked["denoise"] = lambda x, sigma, prompts: maker.denoise(x, sigma, prompts.tolist())
    if plan.objective == "reward_gradient":
        maker = data.ask("The objective reward_gradient")
        make: Callable[[Tensor, list[int]], Tensor] = lambda latents, _: latents  # noqa: E731
        if description.base.target == "noise":
            instead = "the objective weighted"
            maker = with_static_model(maker, "The objective reward_gradient", instead)
            model, make = maker.model, generator_of(maker)
        decoder = make_decoder("auto", maker.model.get_model_object("latent_format"), maker.vae)
        weighted = replace(
            maker.reward, reward=CombinedReward([part for part, _ in weighted_parts(maker.reward.reward)], weights)
        )
        reward = LatentReward(weighted, decoder, description.prompts[0])

        def score(latents: Tensor, batch: Batch) -> Tensor:
            assert batch.prompts is not None
            prompts = batch.prompts.tolist()
            told = [description.prompts[prompt] for prompt in prompts]
            return in_chunks(
                lambda some, part: reward.score(make(some, prompts[part]), told[part]), latents, maker.batch
            )

        asked["reward"] = score
    if asked:
        asked["step_context"] = partial(training_through, model, reward, instead)
    return asked


def with_static_model(maker: SampleMaker, what: str, instead: str) -> SampleMaker:
    return replace(maker, model=static_clone(maker.model, what, instead))


def generator_of(maker: SampleMaker) -> Callable[[Tensor, list[int]], Tensor]:
    """What a one-step generator makes of noise (N,...) and prompts (N,), in the model's space; with a graph where a training goes through it."""
    if maker.steps != 1:
        raise GuidanceError(
            f"The objective reward_gradient goes through one call of the model, and these samples were made with {maker.steps} steps: collect "
            "with 1, or choose the objective weighted."
        )
    sampling = maker.model.get_model_object("model_sampling")
    sigma = comfy.samplers.calculate_sigmas(sampling, maker.scheduler, 1)[0]

    def make(noise: Tensor, prompts: list[int]) -> Tensor:
        x = sampling.noise_scaling(sigma.to(noise), noise, torch.zeros_like(noise), max_denoise=True)
        return maker.denoise(x, sigma.expand(len(noise)), prompts)

    return make
