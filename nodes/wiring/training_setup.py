"""Prepares what a training needs besides the samples: model calls and gradients of rewards."""

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
from .latent_reward import LatentReward, differentiable_context
from .sample_maker import GuidanceData, SampleMaker
from .scoring import weighted_parts


def resolve_objective(data: GuidanceData, objective: str) -> str:
    """Resolve "auto": reward_gradient for noise, if a one-step generator and a differentiable reward are connected."""
    noise, maker = data.collection.description.base.target == "noise", data.maker
    possible = noise and maker is not None and maker.steps == 1 and maker.reward.reward.differentiable
    return "reward_gradient" if objective == "auto" and possible else objective


def training_functions(data: GuidanceData, plan: Plan, weights: Sequence[float]) -> dict[str, Callable]:
    """The functions that `prepare` takes: `denoise` for the form shift, `reward` for the objective reward_gradient.

    With either, also `step_context`, which loads the models of a step. weights: of the rewards in a combination.
    Raises GuidanceError if the samples come without their model.
    """
    description, model, reward, instead = data.collection.description, None, None, ""
    functions: dict[str, Callable] = {}
    if plan.form == "shift":
        instead = "the form correction"
        maker = with_static_model(data.require_maker("The form shift"), "The form shift", instead)
        model = maker.model
        functions["denoise"] = lambda x, sigma, prompts: maker.denoise(x, sigma, prompts.tolist())
    if plan.objective == "reward_gradient":
        maker = data.require_maker("The objective reward_gradient")
        make: Callable[[Tensor, list[int]], Tensor] = lambda latents, _: latents  # noqa: E731
        if description.base.target == "noise":
            instead = "the objective weighted"
            maker = with_static_model(maker, "The objective reward_gradient", instead)
            model, make = maker.model, one_step_generator(maker)
        decoder = make_decoder("auto", maker.model.get_model_object("latent_format"), maker.vae)
        combined = CombinedReward([part for part, _ in weighted_parts(maker.reward.reward)], weights)
        reward = LatentReward(replace(maker.reward, reward=combined), decoder, description.prompts[0])

        def score(latents: Tensor, batch: Batch) -> Tensor:
            assert batch.prompts is not None
            prompts = batch.prompts.tolist()
            texts = [description.prompts[prompt] for prompt in prompts]

            def score_part(values: Tensor, part: slice) -> Tensor:
                return reward.for_prompts(make(values, prompts[part]), texts[part])

            return in_chunks(score_part, latents, maker.batch)

        functions["reward"] = score
    if functions:
        functions["step_context"] = partial(differentiable_context, model, reward, instead)
    return functions


def with_static_model(maker: SampleMaker, what: str, instead: str) -> SampleMaker:
    return replace(maker, model=static_clone(maker.model, what, instead))


def one_step_generator(maker: SampleMaker) -> Callable[[Tensor, list[int]], Tensor]:
    """The function from noise (N,...) and prompts (N,) to denoised latents in the model's space, with gradients.

    Raises GuidanceError if the samples were made with several steps.
    """
    if maker.steps != 1:
        raise GuidanceError(
            "The objective reward_gradient takes the gradient through one model call, and these samples were made with "
            f"{maker.steps} steps: collect with 1, or choose the objective weighted."
        )
    sampling = maker.model.get_model_object("model_sampling")
    sigma = comfy.samplers.calculate_sigmas(sampling, maker.scheduler, 1)[0]

    def make(noise: Tensor, prompts: list[int]) -> Tensor:
        x = sampling.noise_scaling(sigma.to(noise), noise, torch.zeros_like(noise), max_denoise=True)
        return maker.denoise(x, sigma.expand(len(noise)), prompts)

    return make
