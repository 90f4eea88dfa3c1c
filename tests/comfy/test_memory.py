"""What guidance costs in memory, on two sizes of Flux."""

import pytest
from reward_guidance.tests.harness.inprocess import load_comfyui

load_comfyui()

import comfy.sample
import comfy.sd
import torch
from reward_guidance.guidance.estimators import Settings, Smoothing
from reward_guidance.guidance.rewards import ImageStatistic
from reward_guidance.nodes.wiring.autograd import manage
from reward_guidance.nodes.wiring.decoders import LatentRGB
from reward_guidance.nodes.wiring.latent_reward import LatentReward
from reward_guidance.nodes.wiring.loaded import LoadedReward
from reward_guidance.nodes.wiring.patch_reward import RewardGuidance
from reward_guidance.tests.harness import models
from reward_guidance.tests.standins import formats
from torch.profiler import ProfilerActivity, profile

CONDITION = [[torch.zeros(1, 8, 768), {"pooled_output": torch.zeros(1, 768)}]]


@pytest.fixture(scope="module")
def sizes():
    """The small Flux, and one with 24 times its weights."""
    return [
        comfy.sd.load_diffusion_model(str(models.format_standins() / name))
        for name in (formats.FLUX, formats.LARGE_FLUX)
    ]


def peak(function):
    """Bytes: the most that `function` held at once, over what there was before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def sample(model):
    latent = torch.zeros(1, 16, 16, 16)
    noise = comfy.sample.prepare_noise(latent, 1)
    with torch.inference_mode():
        comfy.sample.sample(
            model, noise, 2, 1.0, "euler", "simple", CONDITION, CONDITION, latent, seed=1, disable_pbar=True
        )


def guided(model, estimator):
    reward = LatentReward(
        LoadedReward(ImageStatistic("brightness")), LatentRGB(model.get_model_object("latent_format")), ""
    )
    return RewardGuidance(reward, estimator, Settings(smoothing=Smoothing(4))).attach(model)


def additional(model, estimator):
    """Peak memory of a guided run over that of the plain one."""
    other = guided(model, estimator)
    sample(other)  # loads the model
    return peak(lambda: sample(other)) - peak(lambda: sample(model))


@pytest.mark.parametrize("estimator", ["shift", "shift_two_pass", "denoised"])
def test_memory_does_not_grow_with_the_model(sizes, estimator):
    small, large = (additional(model, estimator) for model in sizes)
    assert large < small + 100_000


def test_memory_of_the_jacobian_does(sizes):
    """So the measurement above sees a graph where there is one."""
    small, large = (additional(model, "jacobian") for model in sizes)
    assert large > 3 * small > 1_000_000


def test_weights_that_are_moved_under_inference_mode_stay_fit_for_gradients():
    """What moves as a node runs would else need an alias in every step."""
    patcher = manage(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)))
    with torch.inference_mode():
        patcher.load(torch.device("meta"), full_load=True)
    tensors = [*patcher.model.parameters(), *patcher.model.buffers()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert not any(tensor.is_inference() for tensor in tensors)
