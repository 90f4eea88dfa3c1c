"""Noise masks: what they keep is shown to the model as it is without guidance, and to the reward as the person gets it."""

import pytest
from reward_guidance.tests.harness.inprocess import load_comfyui

load_comfyui()

import torch
from comfy_extras.nodes_differential_diffusion import DifferentialDiffusion
from reward_guidance.guidance.estimators import ESTIMATORS, Settings
from reward_guidance.guidance.network.card import Card
from reward_guidance.guidance.network.forms import FORMS
from reward_guidance.guidance.network.unet import Architecture, GuidanceNetwork
from reward_guidance.nodes.wiring.loaded import manage_network
from reward_guidance.nodes.wiring.model_info import base_of
from reward_guidance.nodes.wiring.patch_network import NetworkGuidance
from reward_guidance.nodes.wiring.patch_reward import RewardGuidance
from reward_guidance.tests.standins import analytic
from reward_guidance.tests.standins.analytic import PlainReward, analytic_model
from reward_guidance.tests.standins.mixture import Mixture

SHAPE = (3, 2, 4, 4)
MIXTURE = Mixture.random(6, 32, torch.Generator().manual_seed(0))
RAMP = torch.linspace(0, 1, 4).expand(1, 4, 4).clone()
MASKS = {
    "half": (torch.arange(4) > 1).float().expand(1, 4, 4).clone(),
    "soft": RAMP,
    "of each sample": torch.stack([RAMP, RAMP.flip(-1), (RAMP > 0.5).float()]).view(3, 4, 4),
}
FORMS_OF_DATA = [form for form in FORMS if form not in ("noise", "leap")]


@pytest.fixture(params=[True, False], ids=["flow", "diffusion"])
def model(request):
    made = analytic_model(MIXTURE, request.param)
    made.model.latent_format.latent_channels = SHAPE[1]
    return made


def by_reward(estimator, reward=lambda latents: latents.flatten(1).sum(1)):
    return lambda model: RewardGuidance(PlainReward(reward), estimator, Settings(strength=2.0, cap=2.0)).attach(model)


def by_network(form):
    @torch.inference_mode(False)
    def attach(model):
        architecture = Architecture(SHAPE[1], FORMS[form].inputs, width=16, scalar=form == "potential").fitted(
            SHAPE[1:]
        )
        torch.manual_seed(3)
        made = GuidanceNetwork(architecture).requires_grad_(False)
        torch.nn.init.normal_(made.last.weight, std=0.3)
        card = Card(base_of(model), form, "weighted", 1.0, ("likes",), (1.0,), 0.0, 1.0, "", 1, 1, 1.0, ())
        return NetworkGuidance(manage_network(made, card)).attach(model)

    return attach


WAYS = {estimator: by_reward(estimator) for estimator in ESTIMATORS} | {
    f"network {form}": by_network(form) for form in FORMS_OF_DATA
}


def sample(model, mask, sampler="euler", steps=5):
    """The sample (B,...), and the model's inputs: (timestep, x) of each call."""
    latent = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    shown = []
    hook = model.model.diffusion_model.register_forward_pre_hook(
        lambda _, inputs: shown.append((float(inputs[1][0]), inputs[0].detach().clone()))
    )
    made = analytic.sample(model, sampler, steps=steps, latent=latent, seed=2, noise_mask=mask)
    hook.remove()
    return made, shown


def assert_same(before, after, kept):
    """A noise level's second call, of samplers and estimators that have one, is held against its first."""
    expected = dict(reversed(before))
    for timestep, found in after:
        assert torch.equal(found[kept], expected[timestep][kept])


def kept_of(mask):
    return mask.view(-1, 1, 4, 4).expand(len(mask), SHAPE[1], 4, 4).expand(SHAPE) == 0


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("way", WAYS)
def test_the_model_is_shown_what_is_kept_as_without_guidance(model, way, mask):
    kept = kept_of(MASKS[mask])
    (plain, before), (guided, after) = sample(model, MASKS[mask]), sample(WAYS[way](model), MASKS[mask])
    assert_same(before, after, kept)
    assert torch.equal(guided[kept], plain[kept])
    assert (guided - plain)[~kept].abs().max() > 1e-3


@pytest.mark.parametrize("sampler", ["heun", "euler_ancestral", "dpmpp_2m_sde", "uni_pc", "lcm"])
@pytest.mark.parametrize("way", ["shift", "network shift"])
def test_whatever_the_sampler(model, way, sampler):
    kept = kept_of(MASKS["half"])
    (_, before), (_, after) = sample(model, MASKS["half"], sampler), sample(WAYS[way](model), MASKS["half"], sampler)
    assert len(before) == len(after)
    assert_same(before, after, kept)


@pytest.mark.parametrize("way", ["shift", "denoised", "network shift"])
def test_a_mask_that_changes_on_the_way(model, way):
    """Differential Diffusion samples more and more of the latent; what it keeps at a call is what counts there."""
    made = DifferentialDiffusion.execute(model).result[0]
    masks = []
    function = made.model_options["denoise_mask_function"]
    made.set_model_denoise_mask_function(lambda *args, **options: masks.append(function(*args, **options)) or masks[-1])
    _, before = sample(made, RAMP)
    kept = [mask == 0 for mask in masks]
    assert 0 < kept[-1].sum() < kept[0].sum()
    _, after = sample(WAYS[way](made), RAMP)
    for where, (_, expected), (_, found) in zip(kept, before, after, strict=True):
        assert torch.equal(found[where], expected[where])


@pytest.mark.parametrize("mask", ["half", "soft"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_reward_sees_what_is_kept_in_its_place(model, estimator, mask):
    seen = []
    sample(
        by_reward(estimator, lambda latents: seen.append(latents.detach()) or latents.flatten(1).sum(1))(model),
        MASKS[mask],
    )
    latent, kept = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)), kept_of(MASKS[mask])
    assert seen
    for latents in seen:
        assert torch.equal(latents[kept], latent[kept])


def test_a_mask_that_keeps_everything_keeps_everything(model):
    (plain, _), (guided, _) = sample(model, torch.zeros(1, 4, 4)), sample(WAYS["shift"](model), torch.zeros(1, 4, 4))
    assert torch.equal(plain, guided)


def test_a_mask_that_keeps_nothing_is_as_none(model):
    (bare, _), (masked, _) = sample(WAYS["shift"](model), None), sample(WAYS["shift"](model), torch.ones(1, 4, 4))
    assert torch.allclose(bare, masked, atol=1e-6)
