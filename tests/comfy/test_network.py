"""Guidance networks inside ComfyUI's samplers, on models whose answers are known."""

import dataclasses
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from reward_guidance.tests.harness.inprocess import load_comfyui

load_comfyui()

import comfy.sample
import comfy.samplers
import comfy.utils
import folder_paths
import torch
from reward_guidance.guidance.data.collection import Collection
from reward_guidance.guidance.data.description import Description
from reward_guidance.guidance.data.samples import Rows, Samples, Texts, states
from reward_guidance.guidance.errors import GuidanceError
from reward_guidance.guidance.estimators import ESTIMATORS, Settings, Smoothing
from reward_guidance.guidance.network.card import Card
from reward_guidance.guidance.network.file import load_network
from reward_guidance.guidance.network.forms import FORMS
from reward_guidance.guidance.network.unet import Architecture, GuidanceNetwork
from reward_guidance.guidance.process import Diffusion, Flow
from reward_guidance.guidance.rewards import ImageStatistic, RewardError
from reward_guidance.guidance.training.loop import Progress, fit
from reward_guidance.guidance.training.objectives import Plan
from reward_guidance.guidance.training.recipe import plan_for, prepare
from reward_guidance.nodes.wiring.collector import Collector, sigma_at
from reward_guidance.nodes.wiring.folders import NETWORKS, save_numbered
from reward_guidance.nodes.wiring.loaded import manage_network
from reward_guidance.nodes.wiring.model_info import base_of, name_of, require_unguided, text_of_conditioning
from reward_guidance.nodes.wiring.patch_network import GuidedNoise, NetworkGuidance, guided_sampling, tilt_noise
from reward_guidance.nodes.wiring.patch_reward import RewardGuidance
from reward_guidance.nodes.wiring.sample_maker import SampleMaker, denoise_once, stackable, stacked
from reward_guidance.nodes.wiring.sampling import Sampling
from reward_guidance.nodes.wiring.training_monitor import Preview, TrainingMonitor, score_or_nan
from reward_guidance.tests.standins.analytic import CLOUD, CONDITION, STEPS, PlainReward, analytic_model, sample
from reward_guidance.tests.standins.mixture import energy_distance, resample
from reward_guidance.tests.standins.ring import RING, nearness


@pytest.fixture(scope="module", params=[True, False], ids=["flow", "diffusion"])
def model(request):
    return analytic_model(RING, request.param)


pytestmark = pytest.mark.usefixtures("like_a_node")


@torch.inference_mode(False)
def network(model, form="correction", trained=True, channels=2, tokens=0, base=None):
    """A random one; before training its last layer is zero."""
    target = "noise" if form == "noise" else "data"
    architecture = Architecture(
        channels, FORMS[form].inputs, tokens=tokens, width=16, scalar=form == "potential"
    ).fitted((channels, 1, 1))
    torch.manual_seed(3)
    made = GuidanceNetwork(architecture)
    if trained:
        torch.nn.init.normal_(made.last.weight, std=0.3)
    card = Card(
        base=dataclasses.replace(base_of(model, target), **(base or {})), form=form, objective="weighted", temperature=1.0, rewards=("likes",),
        reward_weights=(1.0,), reward_mean=0.0, reward_std=1.0, prompts="", samples=1, steps=1, effective=1.0, curve=(),
    )  # fmt: skip
    return manage_network(made.eval().requires_grad_(False), card)


DATA_FORMS = [form for form in FORMS if form != "noise"]


@pytest.mark.parametrize("form", DATA_FORMS)
@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m_sde"])
def test_every_form_guides_without_an_additional_model_call(model, form, sampler):
    calls, made = model.model.diffusion_model, []
    for candidate in (model, NetworkGuidance(network(model, form)).attach(model)):
        calls.calls = 0
        made.append((sample(candidate, sampler), calls.calls))
    (plain, before), (guided, after) = made
    assert guided.isfinite().all() and (guided - plain).abs().max() > 1e-3
    assert before == after > 0


@pytest.mark.parametrize(
    ("sampler", "form"), list(zip(comfy.samplers.KSampler.SAMPLERS, itertools.cycle(DATA_FORMS), strict=False))
)
def test_an_untrained_network_changes_not_one_bit(model, sampler, form):
    untrained = NetworkGuidance(network(model, form, trained=False)).attach(model)
    assert torch.equal(sample(untrained, sampler), sample(model, sampler))


def test_strength_zero_and_an_empty_interval_leave_the_model_alone(model):
    for options in ({"strength": 0.0}, {"start": 0.4, "end": 0.4}):
        assert NetworkGuidance(network(model), **options).attach(model) is model


def test_the_interval_bounds_the_guidance(model):
    loaded, seen = network(model), []
    loaded.network.register_forward_pre_hook(lambda _, inputs: seen.append(float(inputs[1][0])))
    sample(NetworkGuidance(loaded, start=0.25, end=0.75).attach(model))
    assert 0 < len(seen) < STEPS
    seen.clear()
    sample(NetworkGuidance(loaded).attach(model))
    assert len(seen) == STEPS


def test_states_of_several_noise_levels_are_each_guided_by_the_interval(model):
    """As where samples are collected."""
    guided = NetworkGuidance(network(model), start=0.25, end=0.75).attach(model)
    sampling = model.get_model_object("model_sampling")
    sigma = torch.tensor([sampling.percent_to_sigma(percent) for percent in (0.1, 0.5, 0.9)])
    x, latent = torch.randn(3, 2, 1, 1), {"samples": torch.zeros(1, 2, 1, 1)}
    both = [ask(candidate, latent, x, sigma) for candidate in (model, guided)]
    changed = (both[0] - both[1]).flatten(1).abs().amax(1) > 1e-6
    assert changed.tolist() == [False, True, False]


def ask(model, latent, x, sigma):
    return denoise_once(Sampling(model, STEPS, 1.0, "euler", "simple", CONDITION, CONDITION, 1.0), latent, x, sigma)


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("form", DATA_FORMS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_it_composes_with_reward_guidance(model, estimator, form, first):
    settings = Settings(smoothing=Smoothing(0), strength=0.5)
    by_reward = RewardGuidance(PlainReward(lambda latents: latents.flatten(1).sum(1)), estimator, settings)
    by_network = NetworkGuidance(network(model, form), strength=0.5)
    order = (by_network, by_reward) if first else (by_reward, by_network)
    both = sample(order[1].attach(order[0].attach(model)))
    assert both.isfinite().all()
    for one in order:
        assert (sample(one.attach(model)) - both).abs().max() > 1e-3


def test_a_second_run_is_the_same(model):
    guided = NetworkGuidance(network(model, "potential")).attach(model)
    assert torch.equal(sample(guided), sample(guided))


@pytest.mark.parametrize(
    ("base", "said"),
    [
        ({"latents": "Flux", "model": "Flux"}, "made for Flux, but the model is BASE: use one that was made for it"),
        ({"latents": "Flux"}, "with the latents Flux, but here it is PlainLatents"),
        ({"channels": 16}, "latent channels 16, but here it is 2"),
        ({"process": "Flow 8"}, "noising process Flow 8"),
        ({"target": "noise"}, "tilts noise, not data: use Guided Noise"),
    ],
)
def test_a_network_of_another_family_is_refused(model, base, said):
    with pytest.raises(GuidanceError, match=said):
        NetworkGuidance(network(model, base=base)).attach(model)


def test_text_of_another_encoder_is_refused_and_none_is_empty(model):
    loaded = network(model, tokens=5)
    guided = NetworkGuidance(loaded).attach(model)
    with pytest.raises(GuidanceError, match="text of 5 channels, but the conditioning has 7"):
        sample(guided, condition=[[torch.zeros(1, 4, 7), {}]])
    assert sample(guided, condition=[[None, {}]]).isfinite().all()
    words = torch.linspace(-1, 1, 5).expand(1, 4, 5)
    one, other = (sample(guided, condition=[[said, {}]]) for said in (words, -words))
    assert not torch.equal(one, other)


def test_start_after_the_end_is_refused(model):
    with pytest.raises(GuidanceError, match="the start must not lie after the end"):
        NetworkGuidance(network(model), start=0.8, end=0.2)


# Noise


def sampling_of(model, **options):
    return dataclasses.replace(Sampling(model, STEPS, 1.0, "euler", "simple", CONDITION, CONDITION, 1.0), **options)


def test_guided_noise_is_the_stock_noise_tilted():
    model = analytic_model(CLOUD, True)
    loaded, latent = (
        network(model, "noise", channels=48),
        {"samples": torch.zeros(3, 48, 1, 1), "batch_index": [4, 0, 2]},
    )
    stock = comfy.sample.prepare_noise(latent["samples"], 9, latent["batch_index"])
    tilted = GuidedNoise(loaded, CONDITION, 9, 4, 1.0).generate_noise(latent)
    assert tilted.shape == stock.shape and (tilted - stock).abs().max() > 1e-3
    assert torch.equal(GuidedNoise(loaded, CONDITION, 9, 4, 0.0).generate_noise(latent), stock)
    untrained = network(model, "noise", trained=False, channels=48)
    assert torch.equal(GuidedNoise(untrained, CONDITION, 9, 4, 1.0).generate_noise(latent), stock)
    alone = GuidedNoise(loaded, CONDITION, 9, 4, 1.0).generate_noise(
        {"samples": latent["samples"][:1], "batch_index": [4]}
    )
    torch.testing.assert_close(
        alone, tilted[:1], atol=1e-3, rtol=0
    )  # four calls of a network that rounds otherwise in a batch


def test_noise_stays_where_a_mask_keeps_the_latent():
    model = analytic_model(CLOUD, True)
    model.model.latent_format.latent_channels = 3
    loaded, mask = network(model, "noise", channels=3), torch.tensor([[0.0, 0.0, 0.5, 1.0]]).expand(1, 4, 4)
    latent = {"samples": torch.zeros(2, 3, 4, 4), "noise_mask": mask}
    stock = comfy.sample.prepare_noise(latent["samples"], 9)
    tilted = GuidedNoise(loaded, CONDITION, 9, 4, 1.0).generate_noise(latent)
    everywhere = GuidedNoise(loaded, CONDITION, 9, 4, 1.0).generate_noise({"samples": latent["samples"]})
    assert torch.equal(tilted[..., :2], stock[..., :2])
    assert torch.equal(tilted[..., 3], everywhere[..., 3])
    assert torch.allclose(tilted[..., 2], (stock + everywhere)[..., 2] / 2)
    seen = []
    sampling = dataclasses.replace(sampling_of(model), tilt_noise=lambda noise, mask: seen.append(mask) or noise)
    sampling({"samples": latent["samples"][:1], "noise_mask": mask}, [5, 6], lambda *_: None)
    assert torch.equal(seen[0], mask)


def test_one_box_samples_from_tilted_noise(model):
    loaded, latent = network(model, "noise"), {"samples": torch.zeros(2, 2, 1, 1)}
    plain = sampling_of(model)
    guided = guided_sampling(plain, loaded, noise_steps=2)(latent, [5], lambda *_: None)
    noise = tilt_noise(loaded, comfy.sample.prepare_noise(latent["samples"], 5), CONDITION, 2, 1.0)
    arguments = (STEPS, 1.0, "euler", "simple", CONDITION, CONDITION, latent["samples"])
    expected = comfy.sample.sample(model, noise, *arguments, seed=5, disable_pbar=True)
    assert torch.equal(guided, expected)
    off = guided_sampling(plain, loaded, strength=0.0)(latent, [5], lambda *_: None)
    assert torch.equal(off, plain(latent, [5], lambda *_: None))


def test_networks_that_are_saved_at_once_under_one_name_are_all_kept(tmp_path, monkeypatch):
    """As by two servers with one folder, which see the same number free."""
    monkeypatch.setitem(folder_paths.folder_names_and_paths, NETWORKS, ([str(tmp_path)], {".safetensors"}))
    loaded, counts = network(analytic_model(RING, True)), range(1, 9)
    barrier = threading.Barrier(len(counts))

    def save(count):
        barrier.wait()
        return save_numbered(
            "styles/blue", dataclasses.replace(loaded, card=dataclasses.replace(loaded.card, samples=count))
        )

    with ThreadPoolExecutor(len(counts)) as pool:
        paths = list(pool.map(save, counts))
    assert [load_network(path)[1].samples for path in paths] == list(counts)
    assert sorted(path.name for path in (tmp_path / "styles").iterdir()) == sorted(path.name for path in paths)


def test_noise_for_another_model_is_refused(model):
    with pytest.raises(GuidanceError, match="with 2 latent channels, not 3"):
        tilt_noise(network(model, "noise"), torch.zeros(1, 3, 1, 1), CONDITION, 4, 1.0)


# What samples are made by


def test_the_model_is_asked_what_the_closed_form_answers(model):
    process = Flow() if model.model.model_type.name == "FLOW" else Diffusion()
    sampling = model.get_model_object("model_sampling")
    sigma = torch.tensor([sigma_at(sampling, percent) for percent in (0.05, 0.4, 0.95)])
    x = torch.randn(3, 2, 1, 1)
    answers = ask(model, {"samples": torch.zeros(1, 2, 1, 1)}, x, sigma)
    for point, noise_level, answer in zip(x.split(1), sigma.tolist(), answers, strict=True):
        truth = RING.denoised(point.flatten(1).double(), process, noise_level)
        assert (answer.flatten() - truth).abs().max() < 1e-3


def test_levels_stay_within_what_the_model_knows(model):
    sampling = model.get_model_object("model_sampling")
    levels = [sigma_at(sampling, percent) for percent in (0.0, 0.3, 0.6, 1.0)]
    assert levels == sorted(levels, reverse=True)
    assert levels[0] == float(sampling.sigma_max) and levels[-1] == float(sampling.sigma_min) > 0


def conditioning(length, **options):
    return [[torch.ones(1, length, 4), {"pooled_output": torch.ones(1, 3)} | options]]


def test_prompts_of_one_length_are_told_together():
    twice = [*conditioning(5), *conditioning(5)]
    all_of_them = [
        conditioning(5),
        conditioning(7),
        conditioning(5),
        twice,
        conditioning(5),
        conditioning(5, guidance=3.5),
    ]
    assert sorted(stackable(all_of_them, 2)) == [[0, 2], [1], [3], [4], [5]]
    tokens, options = stacked([conditioning(5), conditioning(5)])[0]
    assert tokens.shape == (2, 5, 4) and options["pooled_output"].shape == (2, 3)
    assert stacked([twice]) is twice


def maker(model, batch=4, sampler="euler"):
    lengths = {"short": 3, "long": 5}
    encode = lambda prompt: [[torch.ones(1, lengths.get(prompt, 3), 1), {}]]  # noqa: E731
    latent = {"samples": torch.zeros(1, 48, 1, 1)}
    return SampleMaker(model, ("short", "long"), encode, "", STEPS, 1.0, sampler, "simple", latent, batch, None, None)


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m_sde", "dpm_adaptive"])
def test_samples_are_those_of_their_seeds_however_they_are_grouped(sampler):
    model, ticks = analytic_model(CLOUD, True), []
    made = maker(model, sampler=sampler).sample([0, 1, 0, 0, 1], [3, 4, 5, 6, 7], lambda count, x0: ticks.append(count))
    alone = torch.cat([sample(model, sampler, count=1, seed=seed) for seed in (3, 4, 5, 6, 7)])
    torch.testing.assert_close(made, alone, rtol=1e-4, atol=1e-4)
    if sampler != "dpm_adaptive":
        assert sum(ticks) == 5 * STEPS


def test_answers_come_in_the_order_of_the_questions():
    model = analytic_model(CLOUD, True)
    x, sigma = torch.randn(5, 48, 1, 1), torch.linspace(0.2, 0.8, 5)
    one_studio = maker(model)
    together = one_studio.denoise(x, sigma, [0, 1, 0, 1, 0])
    alone = torch.cat([one_studio.denoise(x[i : i + 1], sigma[i : i + 1], [0]) for i in range(5)])
    torch.testing.assert_close(together, alone)


def test_text_has_the_length_of_the_longest_prompt():
    text = maker(analytic_model(CLOUD, True)).text()[torch.arange(2)]
    assert text.tokens.shape == (2, 5, 1) and text.tokens.any(2).sum(1).tolist() == [3, 5]
    assert text_of_conditioning([[None, {}]]).tokens.shape == (1, 0, 0)


def test_samples_are_not_collected_from_a_guided_model(model):
    by_reward = RewardGuidance(PlainReward(lambda latents: latents.flatten(1).sum(1)), "shift", Settings())
    require_unguided(NetworkGuidance(network(model)).attach(model))
    with pytest.raises(GuidanceError, match="connect it before Reward Guidance"):
        require_unguided(by_reward.attach(model))


def test_a_patched_model_has_another_name(model):
    assert name_of(model) == "BaseModel"
    patched = model.clone()
    patched.patches = {"weight": [(0.5, None, 1.0, None, None)]}
    assert name_of(patched) == "BaseModel with 1 patches of strength 0.5"


class Interrupted:
    """A training that is interrupted in a step, and again while it judges what it has."""

    task = SimpleNamespace(plan=Plan())

    def __init__(self, curve):
        self.curve = curve

    def __iter__(self):
        raise comfy.model_management.InterruptProcessingException
        yield

    def pause(self):
        raise comfy.model_management.InterruptProcessingException


def test_two_interrupts_return_what_was_the_best_at_the_last_look():
    watch = lambda curve: TrainingMonitor(SimpleNamespace(training=Interrupted(curve)), None, None, 0)  # noqa: E731
    watch([(10, 0.1)]).run()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        watch([]).run()


def test_every_preview_is_shown_although_the_page_hears_of_some_steps_only(monkeypatch):
    steps = [Progress(step, 0.1) for step in range(1, 7)]

    class Steady(Interrupted):
        def __iter__(self):
            return iter(steps)

    shown = []
    monkeypatch.setattr(
        comfy.utils, "ProgressBar", lambda total: SimpleNamespace(update_absolute=lambda *told: shown.append(told))
    )
    fitting = SimpleNamespace(training=Steady([(1, 0.1)]), health=SimpleNamespace(effective=0.5))
    TrainingMonitor(fitting, lambda step: False, lambda _: Preview("a picture", [0.5]), 3).run()
    assert shown == [(step, Plan().steps, ("JPEG", "a picture", None)) for step in (3, 6)]


def test_a_preview_that_a_reward_refuses_does_not_end_the_training(caplog):
    def score(clip, prompt):
        raise RewardError("likes returned a score that is not a finite number.")

    maker = SimpleNamespace(score=score, reward=SimpleNamespace(reward=ImageStatistic("brightness")))
    assert score_or_nan(maker, torch.zeros(1, 8, 8, 3), "a cat").isnan().tolist() == [True]
    assert "The preview has no reward" in caplog.text


@torch.inference_mode(False)
def fitted(description, samples):
    """A network trained on samples as the node trains it, but without a disk."""
    stacked_samples = {
        name: torch.stack([getattr(sample, name) for sample in samples])
        for name in ("clean", "scores", "sigma", "denoised")
    }
    parts = {name: value.clone() for name, value in stacked_samples.items()}
    parts |= {name: Rows.of([parts[name]]) for name in ("clean", "denoised")}
    whole = Samples(description, torch.arange(len(samples)), Texts([torch.zeros(0, 0)], torch.zeros(1, 0)), **parts)
    with torch.enable_grad():
        fitting = prepare(whole, plan_for(description, steps=400, temperature=0.5, batch=128), "small")
        fit(fitting.training)
    return manage_network(fitting.network(), fitting.card())


def test_what_was_collected_leads_to_the_reward_weighted_ring():
    """The whole way but for the decoder: samples and answers of the model, labels, training, sampling."""
    model = analytic_model(RING, True)
    latent, count = {"samples": torch.zeros(1, 2, 1, 1)}, 2000
    one_studio = SampleMaker(
        model, ("",), lambda _: CONDITION, "", 20, 1.0, "euler", "simple", latent, count, None, None
    )
    description = Description(base_of(model), (2, 1, 1), 4, ("",), ("ring",), (0.0,), (1.0,), seed=0)
    clean = sample(model, count=count, seed=1, steps=20)
    collector = Collector(one_studio, Collection(Path(), description), False, lambda *_: None)
    rewards = nearness(clean)
    seeds, denoise = list(range(count)), lambda x, sigma: collector.denoise(x, sigma, [0] * count)
    loaded = fitted(
        description, states(clean, rewards[:, None], seeds, collector.sigmas(seeds), collector.process, denoise)
    )
    truth = RING.sample(20_000, torch.Generator().manual_seed(50))
    truth = resample(truth, nearness(truth) / (0.5 * rewards.std()), 1000, torch.Generator().manual_seed(51))
    plain, guided = (
        sample(each, count=1000, seed=2, steps=20).flatten(1).double()
        for each in (model, NetworkGuidance(loaded).attach(model))
    )
    assert energy_distance(plain, truth) > 0.3
    assert energy_distance(guided, truth) < 0.06
