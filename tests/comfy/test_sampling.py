"""Guidance inside ComfyUI's samplers, on models whose answers are known."""

from functools import partial
from types import SimpleNamespace

import pytest
from reward_guidance.tests.harness.inprocess import load_comfyui

load_comfyui()

import comfy.model_management
import comfy.model_sampling
import comfy.sample
import comfy.samplers
import torch
from comfy_extras.nodes_train import TrainLoraNode
from reward_guidance.guidance.errors import GuidanceError
from reward_guidance.guidance.estimators import ESTIMATORS, Settings, Smoothing
from reward_guidance.guidance.process import Diffusion, Flow
from reward_guidance.guidance.randomness import generator
from reward_guidance.guidance.rewards import ImageStatistic, Reward
from reward_guidance.nodes.wiring.autograd import gradients, normal_weights
from reward_guidance.nodes.wiring.latent_reward import LatentReward
from reward_guidance.nodes.wiring.loaded import LoadedReward, manage_reward
from reward_guidance.nodes.wiring.model_info import process_of
from reward_guidance.nodes.wiring.patch_reward import RewardGuidance
from reward_guidance.tests.standins import analytic
from reward_guidance.tests.standins.analytic import CONDITION, PlainReward, analytic_model
from reward_guidance.tests.standins.families import CAUSAL_WAN, WAN_5B
from reward_guidance.tests.standins.mixture import Mixture
from reward_guidance.tests.standins.ring import RING, nearness

sample = partial(analytic.sample, steps=8, count=64)
flow_model = partial(analytic_model, RING)


def guidance(function=nearness, estimator="shift", start=0.0, end=1.0, report=lambda step: None, **settings):
    settings = Settings(
        **{"smoothing": Smoothing(4, 1.0, 0), "variance": 1.15, "cap": 8.0, "momentum": 0.0, **settings}
    )
    return RewardGuidance(PlainReward(function), estimator, settings, start, end, report)


@pytest.mark.parametrize("sampler", comfy.samplers.KSampler.SAMPLERS)
@pytest.mark.parametrize("flow", [True, False], ids=["flow", "diffusion"])
def test_every_sampler_follows_the_reward(sampler, flow):
    model = analytic_model(RING, flow)
    plain, guided = sample(model, sampler), sample(guidance().attach(model), sampler)
    assert guided.isfinite().all()
    assert nearness(guided).mean() > nearness(plain).mean() + 0.5


@pytest.mark.parametrize("scheduler", comfy.samplers.KSampler.SCHEDULERS)
def test_every_scheduler_follows_the_reward(scheduler):
    plain, guided = (sample(model, scheduler=scheduler) for model in (flow_model(), guidance().attach(flow_model())))
    assert nearness(guided).mean() > nearness(plain).mean() + 0.5


@pytest.mark.parametrize(
    "sampler", ["euler", "heun", "dpmpp_2m", "euler_ancestral", "dpm_2", "dpmpp_sde", "res_multistep"]
)
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_no_additional_model_call(sampler, cfg):
    model = flow_model()
    network = model.model.diffusion_model
    counts = []
    for candidate in (model, guidance().attach(model)):
        network.calls = 0
        sample(candidate, sampler, cfg=cfg)
        counts.append(network.calls)
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("sampler", comfy.samplers.KSampler.SAMPLERS)
def test_a_reward_without_slope_changes_not_one_bit(sampler):
    """Also of the noise that ancestral and SDE samplers draw."""
    flat = guidance(lambda latents: 0 * latents.sum((1, 2, 3))).attach(flow_model())
    assert torch.equal(sample(flat, sampler), sample(flow_model(), sampler))


def test_strength_zero_and_an_empty_interval_leave_the_model_alone():
    model = flow_model()
    assert guidance(strength=0.0).attach(model) is model
    assert guidance(start=0.5, end=0.5).attach(model) is model


def test_guidance_acts_only_inside_its_interval():
    sigmas = []
    model = guidance(start=0.25, end=0.75, report=lambda step: sigmas.append(step.sigma)).attach(flow_model())
    sample(model, steps=20)
    sampling = model.get_model_object("model_sampling")
    assert sigmas
    assert max(sigmas) <= sampling.percent_to_sigma(0.25)
    assert min(sigmas) > sampling.percent_to_sigma(0.75)


@pytest.mark.parametrize(
    ("sampling", "options", "warned"),
    [
        ({}, {}, False),
        ({"steps": 1}, {}, True),
        ({"denoise": 0.3}, {"end": 0.6}, True),
        ({"denoise": 0.3}, {}, False),
        ({}, {"start": 0.999}, True),
    ],
    ids=str,
)
@pytest.mark.parametrize("estimator", ["shift", "jacobian"])
def test_where_nothing_is_guided_it_says_so(caplog, estimator, sampling, options, warned):
    model = flow_model()
    same = torch.equal(
        sample(model, **sampling), sample(guidance(estimator=estimator, **options).attach(model), **sampling)
    )
    assert same == warned
    assert ("Reward guidance changed nothing" in caplog.text) == warned


def test_an_empty_latent_is_refused():
    with pytest.raises(GuidanceError, match="latent is empty"):
        sample(guidance().attach(flow_model()), latent=torch.zeros(0, 2, 1, 1))


def test_a_second_run_starts_from_clean_state():
    model = guidance().attach(flow_model())
    first = sample(model, seed=1)
    sample(model, seed=2)
    assert torch.equal(sample(model, seed=1), first)


def test_a_failed_run_leaves_no_state_behind():
    armed = [False]

    def fragile(latents):
        if armed[0]:
            raise RuntimeError("out of luck")
        return nearness(latents)

    one = guidance(fragile)
    model = one.attach(flow_model())
    first = sample(model)
    armed[0] = True
    with pytest.raises(RuntimeError, match="out of luck"):
        sample(model)
    armed[0] = False
    assert not one.runs
    assert torch.equal(sample(model), first)
    assert comfy.model_management.in_training is False


class Slow(Reward):
    """Presses the interrupt button while it is being evaluated."""

    def forward(self, pixels, prompts):
        comfy.model_management.interrupt_current_processing()
        return pixels.mean((1, 2, 3))


def test_interrupt_stops_inside_the_reward_loop():
    decoder = SimpleNamespace(
        pixels=lambda latents: latents[:, :1].expand(-1, 3, -1, -1),
        modules=(),
        activation_bytes=lambda height, width: 0,
    )
    reward = LatentReward(LoadedReward(Slow()), decoder, "")
    calls = []
    model = RewardGuidance(reward, "shift", Settings(smoothing=Smoothing(4)), on_step=calls.append).attach(flow_model())
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(model)
    assert not calls, "the first model call's second reward evaluation was not reached"
    assert sample(guidance().attach(flow_model())).isfinite().all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_decoder_whose_pixels_are_not_finite_is_named(estimator):
    pixels = lambda latents: (latents[:, :1] / 0).expand(-1, 3, -1, -1)  # noqa: E731
    decoder = SimpleNamespace(name="taesd", pixels=pixels, modules=(), activation_bytes=lambda height, width: 0)
    reward = LatentReward(LoadedReward(ImageStatistic("brightness")), decoder, "")
    with pytest.raises(GuidanceError, match="The decoder taesd made pixels that are not finite numbers"):
        sample(RewardGuidance(reward, estimator, Settings()).attach(flow_model()))


def test_two_rewards_compose():
    left = guidance(lambda latents: -latents[:, 0, 0, 0])
    down = guidance(lambda latents: -latents[:, 1, 0, 0])
    both = sample(down.attach(left.attach(flow_model()))).flatten(1).mean(0)
    assert (both < -0.5).all()


def test_inpainting_keeps_what_the_mask_keeps():
    latent = torch.full((4, 2, 1, 1), 0.7)
    kept = sample(guidance().attach(flow_model()), latent=latent, noise_mask=torch.zeros(4, 1, 1, 1))
    assert torch.allclose(kept, latent)


def test_image_to_image_starts_below_full_noise():
    seen = []
    model = guidance(report=lambda step: seen.append(step)).attach(flow_model())
    sample(model, denoise=0.5, steps=10)
    assert len(seen) == 10
    assert seen[0].sigma < 0.9


@pytest.mark.parametrize("sampler", ["heun", "dpm_2"])
def test_steps_are_counted_once_however_often_the_model_is_called(sampler):
    seen = []
    sample(guidance(report=seen.append).attach(flow_model()), sampler, steps=6)
    assert [step.step for step in seen] == sorted(step.step for step in seen)
    assert seen[-1].step == seen[-1].steps == 6
    assert seen[-1].model_calls == len(seen)


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m_sde", "dpmpp_3m_sde", "er_sde", "sa_solver"])
@pytest.mark.parametrize("flow", [True, False], ids=["flow", "diffusion"])
def test_every_step_has_its_number(sampler, flow):
    seen = []
    sample(
        guidance(report=seen.append).attach(analytic_model(RING, flow)),
        sampler,
        steps=5,
    )
    assert [step.step for step in seen] == [1, 2, 3, 4, 5]


def restart_sampler():
    """Euler that twice climbs back from the middle of the schedule, as restart sampling does (arXiv 2306.14878)."""

    def function(model, x, sigmas, extra_args=None, callback=None, disable=None):
        draw = torch.Generator().manual_seed(0)
        one = x.new_ones([x.shape[0]])
        levels = sigmas.tolist()
        middle = len(levels) // 2
        path = [*levels[: middle + 2], *levels[middle - 2 : middle + 2], *levels[middle - 2 :]]
        for sigma, following in zip(path, path[1:], strict=False):
            if following > sigma:
                scale = (1 - following) / (1 - sigma)
                spread = (following**2 - (scale * sigma) ** 2) ** 0.5
                x = scale * x + spread * torch.randn(x.shape, generator=draw)
                continue
            x = x + (following - sigma) * (x - model(x, sigma * one, **extra_args)) / sigma
        return x

    return comfy.samplers.KSAMPLER(function)


def test_restarts_do_not_break_the_lagged_gradient():
    model = guidance().attach(flow_model())
    latent = torch.zeros(256, 2, 1, 1)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 12)
    with torch.inference_mode():
        noise = comfy.sample.prepare_noise(latent, 0)
        restarted, plain = (
            comfy.sample.sample_custom(
                candidate, noise, 1.0, restart_sampler(), sigmas, CONDITION, CONDITION, latent, disable_pbar=True
            )
            for candidate in (model, flow_model())
        )
    assert nearness(restarted).mean() > nearness(plain).mean() + 0.5


def test_normal_weights_are_the_same_memory_and_are_put_back():
    with torch.inference_mode():
        layer = torch.nn.Linear(3, 3)
    original = layer.weight
    with gradients(layer), torch.enable_grad():
        assert not layer.weight.is_inference()
        assert layer.weight.data_ptr() == original.data_ptr()
        point = torch.ones(1, 3, requires_grad=True)
        layer(point).sum().backward()
    assert point.grad is not None
    assert layer.weight is original
    with pytest.raises(ZeroDivisionError), normal_weights(layer):
        raise ZeroDivisionError
    assert layer.weight is original


def test_what_a_module_replaces_meanwhile_stays():
    with torch.inference_mode():
        layer = torch.nn.Linear(3, 3)
        layer.cache = torch.ones(3)
    with gradients(layer):
        assert not layer.cache.is_inference()
        layer.cache = layer.cache + 1
    assert layer.cache.tolist() == [2, 2, 2]


class WithTensors(Reward):
    """As another pack may write it, with tensors that no one registered."""

    name = "stripes"

    def __init__(self, hidden: bool):
        super().__init__()
        own = torch.rand(3, 1, 1)
        self.weight, self.hidden = own, [own] if hidden else None

    def forward(self, pixels, prompts):
        return (pixels * (self.hidden[0] if self.hidden else self.weight)).flatten(1).mean(1)


@pytest.mark.parametrize("hidden", [False, True])
def test_a_reward_with_tensors_of_its_own_guides_or_says_how_to_keep_them(hidden):
    with torch.inference_mode():
        loaded = manage_reward(WithTensors(hidden))
    decoder = SimpleNamespace(modules=(), pixels=lambda latents: latents)
    reward = LatentReward(loaded, decoder, "")
    with gradients(*reward.modules), torch.enable_grad():
        point = torch.zeros(1, 3, 4, 4, requires_grad=True)
        if hidden:
            with pytest.raises(GuidanceError, match="stripes .* Register it with register_buffer"):
                reward(point)
        else:
            assert torch.autograd.grad(reward(point).sum(), point)[0].abs().min() > 0


def test_bad_settings_are_refused_in_a_sentence():
    with pytest.raises(GuidanceError, match="start must not lie after the end"):
        guidance(start=0.8, end=0.2)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_estimators_agree_with_the_library_outside_comfyui(estimator):
    """The sampler path adds nothing of its own: same Euler steps, same numbers."""
    model = guidance(estimator=estimator).attach(flow_model())
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 8).tolist()
    one = ESTIMATORS[estimator](
        Flow(),
        nearness,
        Settings(smoothing=Smoothing(4, 1.0, 0), variance=1.15, cap=8.0, momentum=0.0),
        generator(3),
    )
    x = comfy.sample.prepare_noise(torch.zeros(64, 2, 1, 1), 3)
    for sigma, following in zip(sigmas, sigmas[1:], strict=False):

        def denoise(point, sigma=sigma):
            return RING.denoised(point.flatten(1).double(), Flow(), sigma).float().view_as(point)

        denoised = one(denoise, x, sigma)
        x = x + (following - sigma) * (x - denoised) / sigma
    assert (sample(model) - x).abs().max() < 2e-4


def test_a_video_that_is_made_block_by_block():
    """Causal Wan: three blocks of two frames, the last of one, each of them all the way from noise."""
    model, latent, condition = CAUSAL_WAN.build(), CAUSAL_WAN.empty(), CAUSAL_WAN.conditioning()
    reward = lambda latents: latents.flatten(1).mean(1)  # noqa: E731
    made = []
    for candidate in (model, guidance(reward, smoothing=Smoothing(0), strength=4.0).attach(model)):
        sigmas = comfy.samplers.calculate_sigmas(candidate.get_model_object("model_sampling"), "simple", 4)
        sampler = comfy.samplers.ksampler("ar_video", {"num_frame_per_block": 2})
        with torch.inference_mode():
            noise = comfy.sample.prepare_noise(latent, 1)
            rest = (noise, 1.0, sampler, sigmas, condition, condition, latent)
            made.append(comfy.sample.sample_custom(candidate, *rest, disable_pbar=True, seed=1))
    rise = (made[1] - made[0]).mean((0, 1, 3, 4))
    assert (rise > 1e-3).all(), "every frame follows the reward"


@pytest.mark.parametrize(
    ("estimator", "why"), [("shift_two_pass", "calls the model 2 times"), ("jacobian", "backpropagates")]
)
def test_a_model_that_remembers_its_calls_is_called_once(estimator, why):
    model, latent, condition = CAUSAL_WAN.build(), CAUSAL_WAN.empty(), CAUSAL_WAN.conditioning()
    guided = guidance(lambda latents: latents.flatten(1).mean(1), estimator, smoothing=Smoothing(0)).attach(model)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 2)
    with pytest.raises(GuidanceError, match=f"{why}.*choose the estimator shift"), torch.inference_mode():
        noise = comfy.sample.prepare_noise(latent, 1)
        comfy.sample.sample_custom(
            guided,
            noise,
            1.0,
            comfy.samplers.ksampler("ar_video"),
            sigmas,
            condition,
            condition,
            latent,
            disable_pbar=True,
        )


def growing_sampler():
    """Euler that doubles the picture in the middle, as samplers that begin small do."""

    def function(model, x, sigmas, extra_args=None, callback=None, disable=None):
        for i, sigma in enumerate(sigmas[:-1]):
            if i == len(sigmas) // 2:
                x = x.repeat_interleave(2, -1)
            x = x + (sigmas[i + 1] - sigma) * (x - model(x, sigma * x.new_ones(len(x)), **extra_args)) / sigma
        return x

    return comfy.samplers.KSAMPLER(function)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_picture_that_grows_on_the_way(estimator):
    """The state of the small picture is of no use to the large one."""
    model = analytic_model(Mixture.random(4, 1, torch.Generator().manual_seed(0)))
    model.model.diffusion_model.answer = lambda x, sigma: x
    guided = guidance(
        lambda latents: latents.flatten(1).mean(1), estimator, smoothing=Smoothing(2, 1.0, 0), target=1.0
    ).attach(model)
    latent = torch.zeros(2, 1, 1, 20)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 6)
    with torch.inference_mode():
        noise = comfy.sample.prepare_noise(latent, 0)
        made = comfy.sample.sample_custom(
            guided, noise, 1.0, growing_sampler(), sigmas, CONDITION, CONDITION, latent, disable_pbar=True
        )
    assert made.shape == (2, 1, 1, 40) and made.isfinite().all()


def test_samples_of_several_noise_levels_are_refused():
    def function(model, x, sigmas, extra_args=None, callback=None, disable=None):
        return model(x, torch.linspace(0.2, 0.8, len(x)), **extra_args)

    with pytest.raises(GuidanceError, match="one noise level"), torch.inference_mode():
        latent, model = torch.zeros(4, 2, 1, 1), guidance().attach(flow_model())
        sigmas, sampler = torch.tensor([0.8, 0.0]), comfy.samplers.KSAMPLER(function)
        comfy.sample.sample_custom(model, latent, 1.0, sampler, sigmas, CONDITION, CONDITION, latent, disable_pbar=True)


@pytest.mark.parametrize("size", [1, 2])
def test_parts_of_a_batch_are_refused(size):
    """The gradient of the last part is not that of the next."""

    def function(model, x, sigmas, extra_args=None, callback=None, disable=None):
        return torch.cat([model(part, sigmas[:1].expand(len(part)), **extra_args) for part in x.split(size)])

    with pytest.raises(GuidanceError, match=f"needs all 4 samples .* calls the model with {size}"), torch.inference_mode():
        latent, model = torch.zeros(4, 2, 1, 1), guidance().attach(flow_model())
        sigmas, sampler = torch.tensor([0.8, 0.0]), comfy.samplers.KSAMPLER(function)
        comfy.sample.sample_custom(model, latent, 1.0, sampler, sigmas, CONDITION, CONDITION, latent, disable_pbar=True)


class PictureToPicture(comfy.model_sampling.CONST):
    """Under a name that only a newer ComfyUI has."""


PictureToPicture.__name__ = "IMG_TO_IMG_VELOCITY"


@pytest.mark.parametrize(
    "kind", [comfy.model_sampling.IMG_TO_IMG, comfy.model_sampling.IMG_TO_IMG_FLOW, PictureToPicture]
)
def test_models_that_map_picture_to_picture_are_refused_at_once(kind):
    model = flow_model()
    model.add_object_patch("model_sampling", type("Sampling", (kind,), {})())
    with pytest.raises(GuidanceError, match="maps picture to picture"):
        guidance().attach(model)
    assert guidance(strength=0.0).attach(model) is model


class ScaledBySize(comfy.model_sampling.CONST):
    """Noise that grows with the picture, as SenseNova's."""

    def noise_scaling(self, sigma, noise, latent_image, max_denoise=False):
        return super().noise_scaling(sigma, noise * noise.shape[-1] ** 0.5, latent_image, max_denoise)


def test_the_scale_of_the_noise_is_that_of_the_picture_that_is_made():
    sampling = ScaledBySize()
    assert process_of(sampling, (1, 4, 16, 16)) == Flow(4.0)
    assert process_of(sampling, (2, 4, 1, 8, 64)) == Flow(8.0)
    sampling.noise_scale = 0.5
    assert process_of(sampling, (1, 4, 16, 16)) == Flow(2.0)
    assert process_of(comfy.model_sampling.CONST(), (1, 4, 16, 16)) == Flow()
    assert process_of(comfy.model_sampling.COSMOS_RFLOW(), (1, 4, 16, 16)) == Diffusion()


@pytest.mark.parametrize("estimator", ["shift", "jacobian"])
def test_a_lora_is_trained_on_the_model_without_its_guidance(caplog, estimator):
    """Train LoRA calls the model where nobody samples."""
    family = WAN_5B
    losses = []
    for guided in (False, True):
        model = family.build()
        model.cached_patcher_init = (lambda disable_dynamic=False: family.build(), ())
        if guided:
            model = guidance(
                lambda latents: latents.flatten(1).mean(1), estimator, smoothing=Smoothing(0), strength=9.0
            ).attach(model)
        with torch.inference_mode():
            latents = [{"samples": torch.randn(family.shape, generator=torch.Generator().manual_seed(5))}]
            settings = {
                "batch_size": 1, "grad_accumulation_steps": 1, "steps": 2, "learning_rate": 1e-3, "rank": 2, "optimizer": "SGD",
                "loss_function": "MSE", "seed": 3, "training_dtype": "none", "lora_dtype": "fp32", "quantized_backward": False,
                "algorithm": "LoRA", "gradient_checkpointing": False, "checkpoint_depth": 1, "offloading": False,
                "existing_lora": "[None]", "bucket_mode": False, "bypass_mode": False,
            }  # fmt: skip
            torch.manual_seed(0)
            out = TrainLoraNode.execute(
                [model], latents, [family.conditioning()], **{name: [value] for name, value in settings.items()}
            )
        losses.append(out.result[1]["loss"])
        assert ("guidance is off" in caplog.text) == guided
    assert losses[0] == losses[1]
    assert not comfy.model_management.in_training
