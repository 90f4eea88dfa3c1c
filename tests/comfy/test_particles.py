"""Noise of each candidate's own and particles inside ComfyUI's samplers, on models whose answers are known."""

import inspect
import re
from itertools import pairwise
from types import SimpleNamespace

import pytest
from reward_guidance.tests.harness.inprocess import load_comfyui

load_comfyui()

import comfy.clip_vision
import comfy.model_base
import comfy.model_management
import comfy.sample
import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP
from reward_guidance.guidance.errors import GuidanceError
from reward_guidance.guidance.estimators import Settings, Smoothing
from reward_guidance.guidance.particles import Population, Resampled
from reward_guidance.guidance.rewards import ImageStatistic
from reward_guidance.nodes import selection
from reward_guidance.nodes.wiring.conditioning import BatchRow
from reward_guidance.nodes.wiring.latents import SEEDS, fit_latent, join_latents, sampled_latent, select_samples
from reward_guidance.nodes.wiring.loaded import LoadedReward
from reward_guidance.nodes.wiring.memory import largest_batch
from reward_guidance.nodes.wiring.particle_run import SAMPLERS, FirstPredictionKnown, ParticleRun, ParticleSampler
from reward_guidance.nodes.wiring.patch_reward import RewardGuidance, ScoringHooks
from reward_guidance.nodes.wiring.sampling import Sampling
from reward_guidance.tests.harness.environment import CHECKOUT
from reward_guidance.tests.standins.analytic import CLOUD, CONDITION, STEPS, PlainReward, analytic_model, sample
from reward_guidance.tests.standins.mixture import energy_distance, resample
from reward_guidance.tests.standins.ring import RING, nearness

pytestmark = pytest.mark.usefixtures("like_a_node")


def sampling(model, sampler, cfg=1.0, denoise=1.0, steps=STEPS):
    return Sampling(model, steps, cfg, sampler, "simple", CONDITION, CONDITION, denoise)


def ignore(*_):
    pass


@pytest.mark.parametrize("sampler", comfy.samplers.KSampler.SAMPLERS)
@pytest.mark.parametrize("flow", [True, False], ids=["flow", "diffusion"])
def test_a_candidate_is_the_same_alone_in_a_batch_and_in_a_stock_ksampler(flow, sampler):
    model, latent, seeds = analytic_model(CLOUD, flow), {"samples": torch.zeros(1, 48, 1, 1)}, [5, 6, 7]
    each = sampling(model, sampler)
    expected = torch.cat([sample(model, sampler, latent=latent["samples"], seed=seed) for seed in seeds])
    alone = torch.cat([each(latent, [seed], ignore) for seed in seeds])
    assert torch.equal(alone, expected)
    if each.at_once(3, latent, 3) == 3:
        assert (each(latent, seeds, ignore) - expected).abs().max() < 1e-5
    else:
        assert sampler == "dpm_adaptive"


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m_sde"])
@pytest.mark.parametrize("denoise", [0.0, 0.5])
def test_candidates_of_image_to_image(sampler, denoise):
    model, latent = (
        analytic_model(CLOUD, True),
        {"samples": torch.full((1, 48, 1, 1), 0.7), "noise_mask": torch.ones(1, 1, 1, 1)},
    )
    each = sampling(model, sampler, denoise=denoise)
    expected = [
        sample(model, sampler, latent=latent["samples"], seed=seed, denoise=denoise, noise_mask=latent["noise_mask"])
        for seed in (5, 6)
    ]
    assert (each(latent, [5, 6], ignore) - torch.cat(expected)).abs().max() < 1e-5


def test_a_sampler_of_unknown_noise_makes_one_candidate_at_a_time(monkeypatch):
    def sample_strange(model, x, sigmas, extra_args=None, callback=None, disable=None, noise_sampler=None):
        return x

    sample_strange.__module__ = "another_pack.samplers"
    monkeypatch.setattr(comfy.k_diffusion.sampling, "sample_strange", sample_strange, raising=False)
    monkeypatch.setattr(comfy.samplers.KSampler, "SAMPLERS", [*comfy.samplers.KSampler.SAMPLERS, "strange"])
    latent = {"samples": torch.zeros(1, 48, 1, 1)}
    assert sampling(analytic_model(CLOUD, True), "strange").at_once(0, latent, 8) == 1
    assert sampling(analytic_model(CLOUD, True), "euler").at_once(0, latent, 8) == 8


def leave_room_for(count, model, shape, monkeypatch):
    """Let ComfyUI find so much memory free that this many samples fit, and half of another."""
    weights, each = model.model_size() - model.loaded_size(), model.model.memory_required([2, *shape[1:]])
    free = weights + comfy.model_management.extra_reserved_memory() + int((count + 0.5) * each)
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *_, **__: free)


@pytest.mark.parametrize(("room", "expected"), [(0, 1), (1, 1), (3, 3), (7, 7), (100, 8)])
def test_as_many_candidates_at_once_as_memory_holds(monkeypatch, room, expected):
    model, latent = analytic_model(CLOUD, True), {"samples": torch.zeros(1, 48, 4, 4)}
    leave_room_for(room, model, latent["samples"].shape, monkeypatch)
    assert largest_batch(model, latent["samples"].shape) == max(1, room)
    assert sampling(model, "euler").at_once(0, latent, 8) == expected
    assert sampling(model, "euler").at_once(5, latent, 8) == 5


class Heard:
    """In place of what tells the page."""

    def __init__(self, hidden, **facts):
        self.history = []

    def __call__(self, progress):
        self.history.append(progress)


def test_more_candidates_than_fit_are_sampled_in_several_turns(monkeypatch):
    """Eight by threes, of each of two latents."""
    model, latent, batches = analytic_model(CLOUD, True), {"samples": torch.zeros(2, 48, 1, 1)}, []
    model.add_wrapper(
        WrappersMP.APPLY_MODEL,
        lambda executor, x, *rest, **options: batches.append(len(x)) or executor(x, *rest, **options),
    )
    leave_room_for(3, model, latent["samples"].shape, monkeypatch)
    monkeypatch.setattr(selection, "Reporter", Heard)
    monkeypatch.setattr(selection, "require_matching_vae", ignore)
    vae = SimpleNamespace(decode=lambda latents: latents[:, :3].movedim(1, -1) / 4 + 0.5)
    node = selection.BestOfN.PREPARE_CLASS_CLONE({"hidden_inputs": {}})
    settings = {
        "seed": 5,
        "steps": 2,
        "cfg": 1.0,
        "sampler_name": "euler",
        "scheduler": "simple",
        "denoise": 1.0,
        "prompt": "",
        "stop_above": 100.0,
    }
    reward = LoadedReward(ImageStatistic("brightness"))
    out = node.execute(
        model,
        positive=CONDITION,
        negative=CONDITION,
        latent_image=latent,
        vae=vae,
        reward=reward,
        n=8,
        keep=8,
        chunk=0,
        **settings,
    )
    assert [len(turn.seeds) for turn in out.ui["reward_guidance"]] == [3, 3, 2] * 2
    assert batches == [3, 3, 3, 3, 2, 2] * 2
    assert sorted(out.args[3]) == list(range(5, 5 + 16))


def test_rows_of_a_latent_stay_together():
    mask = torch.arange(2.0).view(2, 1, 1, 1)
    latent = {
        "samples": torch.arange(4.0).view(4, 1, 1, 1),
        "noise_mask": mask,
        "batch_index": [4, 5, 6, 7],
        SEEDS: [1, 2, 3, 4],
        "type": "x",
    }
    chosen = select_samples(latent, [3, 0])
    assert chosen["samples"].flatten().tolist() == [3, 0]
    assert chosen["noise_mask"].flatten().tolist() == [1, 0]
    assert (chosen["batch_index"], chosen[SEEDS], chosen["type"]) == ([7, 4], [4, 1], "x")
    assert SEEDS not in select_samples(latent | {SEEDS: [1]}, [0]), "seeds of other samples are dropped"
    made = sampled_latent(latent | {"downscale_ratio_spacial": 8}, [0, 0], torch.ones(2, 1, 1, 1), [8, 9])
    assert made[SEEDS] == [8, 9]
    assert made["batch_index"] == [4, 4]
    assert "downscale_ratio_spacial" not in made
    assert join_latents([latent, latent])[SEEDS] == [1, 2, 3, 4] * 2
    alone = join_latents([latent, {"samples": latent["samples"]}])
    assert alone["batch_index"] == [4, 5, 6, 7, 0, 1, 2, 3], "as LatentBatch counts those of which nothing is known"
    assert SEEDS not in alone and "type" not in alone
    assert join_latents([latent, latent])["type"] == "x"
    larger = {"samples": latent["samples"][:1], "noise_mask": torch.full((1, 1, 2, 2), 0.5)}
    together = join_latents([latent, {"samples": latent["samples"][:1]}, larger])
    assert together["noise_mask"].flatten().tolist() == [0, 1, 0, 1, 1, 0.5]
    assert select_samples(together, [5, 0])["noise_mask"].flatten().tolist() == [0.5, 0]


PICTURES, VIDEOS = (2, 3, 4, 4), (2, 4, 3, 2, 2)
MASKS = [
    *(
        (PICTURES, mask)
        for mask in [(4, 4), (8, 8), (2, 4, 4), (1, 1, 4, 4), (2, 1, 4, 4), (2, 3, 4, 4), (3, 1, 2, 2), (2, 1, 2, 4, 4)]
    ),
    *(
        (VIDEOS, mask)
        for mask in [(2, 2), (3, 2, 2), (3, 1, 2, 2), (9, 1, 4, 4), (2, 1, 2, 2), (2, 1, 3, 2, 2), (1, 1, 3, 1, 1)]
    ),
    *((VIDEOS, mask) for mask in [(2, 4, 3, 4, 4), (3, 1, 3, 2, 2), (2, 1, 5, 2, 2)]),
]
"""Latents of 48 numbers, and the masks that a stock KSampler takes beside them."""


def masked(latents, mask):
    """A model of such latents, and a LATENT of them with such a soft mask."""
    model, draw = analytic_model(CLOUD, True), torch.Generator().manual_seed(3)
    model.model.latent_format.latent_channels, model.model.latent_format.latent_dimensions = (
        latents[1],
        len(latents) - 2,
    )
    return model, {"samples": torch.randn(latents, generator=draw), "noise_mask": torch.rand(mask, generator=draw)}


def together(model, latent, seeds, positive=CONDITION):
    """A whole batch by a stock KSampler, but that each sample begins with the noise of its own seed."""
    noise = torch.cat([comfy.sample.prepare_noise(latent["samples"][:1], seed) for seed in seeds])
    arguments = (STEPS, 1.0, "euler", "simple", positive, CONDITION, latent["samples"])
    return comfy.sample.sample(
        model, noise, *arguments, seed=seeds[0], disable_pbar=True, noise_mask=latent["noise_mask"]
    )


@pytest.mark.parametrize(("shape", "mask"), MASKS)
def test_every_sample_keeps_its_own_mask(shape, mask):
    model, latent = masked(shape, mask)
    expected, run = together(model, latent, [5, 6]), sampling(model, "euler")
    alone = [
        own(one, [seed], ignore) for (own, one), seed in zip(run.each(fit_latent(model, latent)), [5, 6], strict=True)
    ]
    assert (torch.cat(alone) - expected).abs().max() < 1e-5
    assert (
        torch.cat([run(select_samples(latent, [i]), [5 + i], ignore) for i in range(2)]) - expected
    ).abs().max() < 1e-5
    twins = torch.cat(
        [
            own(one, [seed, seed], ignore)[1:]
            for (own, one), seed in zip(run.each(fit_latent(model, latent)), [5, 6], strict=True)
        ]
    )
    assert (twins - expected).abs().max() < 1e-5, "sampled together with another seed"


@pytest.mark.parametrize(("shape", "mask"), MASKS)
@pytest.mark.parametrize("other", [None, (1, 1, 6, 6)], ids=["without a mask", "of another size"])
def test_masks_stay_with_samples_that_are_joined(shape, mask, other):
    model, latent = masked(shape, mask)
    second = {"samples": latent["samples"] + 1} | ({"noise_mask": torch.full(other, 0.25)} if other else {})
    both, run = join_latents([latent, second]), sampling(model, "euler")
    expected = together(model, latent, [5, 6])
    whole = together(model, second | {"noise_mask": second.get("noise_mask", torch.ones(1, *shape[1:]))}, [7, 8])
    made = torch.cat([run(select_samples(both, [i]), [5 + i], ignore) for i in range(4)])
    assert (made - torch.cat([expected, whole])).abs().max() < 1e-5


def test_a_batch_of_pictures_for_a_model_of_videos():
    """It reads their masks as the frames of one video."""
    model, latent = masked((2, 48, 1, 1, 1), (2, 1, 1, 1))
    latent["samples"] = latent["samples"].squeeze(2)
    expected = together(model, latent | {"samples": latent["samples"].unsqueeze(2)}, [5, 6])
    run = sampling(model, "euler")
    alone = [
        own(one, [seed], ignore) for (own, one), seed in zip(run.each(fit_latent(model, latent)), [5, 6], strict=True)
    ]
    assert (torch.cat(alone) - expected).abs().max() < 1e-5


def test_conditionings_have_one_row_for_each_sample():
    """Repeated or picked as ComfyUI does it for a batch of 4 latents with frames."""
    numbers = lambda count, *shape: torch.arange(float(count)).view(-1, *[1] * len(shape)).expand(count, *shape)  # noqa: E731
    vision = comfy.clip_vision.Output()
    vision["image_embeds"], vision["image_sizes"] = numbers(4, 2), [(3, 224, 224)] * 4
    options = {
        "pooled_output": numbers(1, 2), "mask": numbers(3, 2, 2), "concat_latent_image": numbers(3, 2, 1, 2, 2), "guidance": 3.5,
        "reference_latents": [numbers(4, 2, 2, 2), numbers(1, 2, 2, 2)], "clip_vision_output": vision, "pooled": None,
    }  # fmt: skip
    [[tokens, taken]] = BatchRow(3, 4, 5)([[numbers(2, 5, 7), options]])
    first = lambda tensor: tensor.flatten(1)[:, 0].tolist()  # noqa: E731
    assert first(tokens) == [1]
    assert first(taken["concat_latent_image"]) == [2]
    assert [first(each) for each in taken["reference_latents"]] == [[3], [0]]
    assert first(taken["clip_vision_output"].image_embeds) == [3] and len(vision.image_embeds) == 4
    assert first(taken["mask"]) == [0, 1, 2], "the frames of one mask"
    assert first(BatchRow(1, 4, 4)([[None, options]])[0][1]["mask"]) == [1], "a mask for each picture"
    assert (taken["guidance"], taken["pooled"], len(taken["pooled_output"])) == (3.5, None, 1)


def test_the_frames_of_one_video_are_not_sampled_one_by_one():
    model, latent = masked(PICTURES, (4, 4))
    model.model.__class__ = type("Video", (comfy.model_base.SVD_img2vid,), {"__init__": ignore})
    with pytest.raises(GuidanceError, match="holds the frames of one video"):
        sampling(model, "euler").each(latent)


def particle_run(
    model,
    sampler,
    n,
    seed=0,
    groups=1,
    every=2,
    reward=nearness,
    threshold=0.5,
    temperature=1.0,
    report=ignore,
    steps=STEPS,
):
    generator = torch.Generator().manual_seed(seed + 99)
    stock_sampler = comfy.samplers.sampler_object(sampler)
    population = Population(n, temperature, generator, threshold)
    stock_sampler.sampler_function = ParticleSampler(stock_sampler.sampler_function, reward, population, every, report)
    latent = torch.zeros(groups * n, model.model.latent_format.latent_channels, 1, 1)
    arguments = (stock_sampler, sampling(model, sampler, steps=steps).sigmas(), CONDITION, CONDITION, latent)
    noise = comfy.sample.prepare_noise(latent, seed)
    return comfy.sample.sample_custom(model, noise, 1.0, *arguments, disable_pbar=True, seed=seed)


@pytest.mark.parametrize("sampler", comfy.samplers.KSampler.SAMPLERS)
@pytest.mark.parametrize("flow", [True, False], ids=["flow", "diffusion"])
def test_one_particle_is_the_stock_sampler(flow, sampler):
    model = analytic_model(CLOUD, flow)
    alone = particle_run(model, sampler, n=1, seed=3, reward=lambda latents: latents.flatten(1).sum(1))
    assert torch.equal(alone, sample(model, sampler, count=1))


def can_be_cut(name):
    """Whether a sampler in segments makes what it makes at once, and not always the same."""
    function = comfy.samplers.sampler_object(name).sampler_function
    if "noise_sampler" not in inspect.signature(function).parameters:
        return False
    model, made = analytic_model(CLOUD, False), []
    for seed, every in ((0, 100), (0, 2), (1, 2)):
        generator = torch.Generator().manual_seed(seed)
        never = Population(3, 1.0, generator, threshold=0.0)
        cut = ParticleSampler(function, lambda latents: torch.zeros(len(latents)), never, every)
        noise, latent = torch.ones(3, 48, 1, 1), torch.zeros(3, 48, 1, 1)
        arguments = (comfy.samplers.KSAMPLER(cut), sampling(model, name).sigmas(), CONDITION, CONDITION, latent)
        try:
            made.append(comfy.sample.sample_custom(model, noise, 1.0, *arguments, disable_pbar=True, seed=0))
        except (RuntimeError, UnboundLocalError, TypeError):
            return False
    whole, segments, other = made
    return torch.equal(whole, segments) and not torch.equal(segments, other)


def test_particles_are_offered_the_samplers_that_can_be_cut():
    draws_overlap = {"dpmpp_sde", "dpmpp_sde_gpu"}
    assert {name for name in comfy.samplers.KSampler.SAMPLERS if can_be_cut(name)} == set(SAMPLERS) | draws_overlap


def test_the_shipped_workflow_names_samplers_that_particles_take():
    advice = re.search(
        "The sampler must add noise.*?[.]", (CHECKOUT / "workflows" / "particles_sd35.json").read_text()
    )[0]
    named = {word for word in re.findall(r"\w+", advice) if word in comfy.samplers.KSampler.SAMPLERS}
    assert named
    assert named <= set(SAMPLERS)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("flow", [True, False], ids=["flow", "diffusion"])
def test_particles_follow_the_reward(flow, sampler):
    model = analytic_model(RING, flow)
    plain = sample(model, sampler, count=256, seed=0)
    followed = particle_run(model, sampler, n=8, groups=32)
    assert followed.isfinite().all()
    assert nearness(followed).mean() > nearness(plain).mean() + 0.5


@pytest.mark.parametrize("every", [1, 2, 5, 99])
def test_looks_cost_no_model_call(every):
    model, looks = analytic_model(RING, True), []
    network = model.model.diffusion_model
    particle_run(model, "euler_ancestral", n=4, every=every, report=looks.append)
    assert network.calls == STEPS
    assert [look.step for look in looks] == [*range(every, STEPS - 1, every), STEPS]
    assert [look.sigma for look in looks] == [
        float(sampling(model, "euler_ancestral").sigmas()[look.step]) for look in looks
    ]
    assert all(
        1 <= look.survivors <= 4 and 1 <= look.series["ess"][0] <= 4 + 1e-9 and len(look.series["reward"]) == 4
        for look in looks
    )


def test_more_particles_come_nearer_to_the_reward_weighted_ring():
    truth = RING.sample(100_000, torch.Generator().manual_seed(50))
    truth = resample(truth, nearness(truth), 1000, torch.Generator().manual_seed(51))
    model, distances = analytic_model(RING, True), {}
    for n in (1, 4, 16):
        followed = particle_run(model, "euler_ancestral", n, groups=1000, steps=20, every=4).flatten(1).view(1000, n, 2)
        distances[n] = energy_distance(followed[:, n // 2].double(), truth)
    assert distances[1] > 0.5
    assert distances[4] < 0.1
    assert distances[16] < 0.02


def test_progress_counts_on_across_segments():
    model, seen = analytic_model(RING, True), []
    latent = {"samples": torch.zeros(1, 2, 1, 1)}
    sampler = comfy.samplers.sampler_object("euler_ancestral")
    generator = torch.Generator().manual_seed(0)
    sampler.sampler_function = ParticleSampler(sampler.sampler_function, nearness, Population(3, 1.0, generator), 2)
    callback = lambda step, x0, x, steps: seen.append((step, steps))  # noqa: E731
    sampling(model, "euler_ancestral").run(sampler, latent, [1, 2, 3], callback)
    assert seen == [(step, STEPS) for step in range(STEPS)]


def test_the_noise_on_the_way_is_not_the_noise_of_a_beginning():
    """Consecutive seeds begin the particles; no segment may draw from any of them."""
    drawn = []

    def spy(model, x, sigmas, extra_args=None, callback=None, disable=None, noise_sampler=None):
        drawn.extend(noise_sampler(None, None).split(1) if noise_sampler else ())
        return x

    each = sampling(analytic_model(CLOUD, True), "euler_ancestral")
    run_particles = ParticleRun(each, lambda latents: latents.flatten(1).sum(1), 1.0, 0.5, 2, 4)
    original = comfy.k_diffusion.sampling.sample_euler_ancestral
    comfy.k_diffusion.sampling.sample_euler_ancestral = spy
    try:
        run_particles({"samples": torch.zeros(1, 48, 1, 1)}, [11, 12, 13, 14], ignore, ignore)
    finally:
        comfy.k_diffusion.sampling.sample_euler_ancestral = original
    begun = [comfy.sample.prepare_noise(torch.zeros(1, 48, 1, 1), seed) for seed in range(8, 20)]
    everything = torch.cat([*drawn, *begun]).flatten(1)
    assert len(drawn) == 4 * 3
    assert (torch.cdist(everything, everything) + 99 * torch.eye(len(everything))).min() > 4


@pytest.mark.parametrize("chunk", [1, 3, 8, 20])
def test_showing_the_model_a_few_at_a_time_changes_nothing(chunk):
    model = analytic_model(CLOUD, True)
    seen = []
    reward = lambda latents: latents.flatten(1).sum(1)  # noqa: E731
    model.add_wrapper_with_key(
        "apply_model", "spy", lambda executor, x, *args, **kw: seen.append(len(x)) or executor(x, *args, **kw)
    )
    whole = particle_run(model, "euler_ancestral", n=8, reward=reward)
    assert max(seen) == 8
    seen.clear()
    parts = particle_run(ScoringHooks(PlainReward(reward), chunk).attach(model), "euler_ancestral", n=8, reward=reward)
    assert max(seen) == min(chunk, 8)
    assert torch.equal(parts, whole)


def test_particles_of_a_guided_model():
    settings = Settings(smoothing=Smoothing(4, 1.0, 0), variance=1.15, cap=8.0, momentum=0.0, strength=0.3)
    guided = RewardGuidance(PlainReward(nearness), "shift", settings).attach(analytic_model(RING, True))
    both, only_particles, only_guidance = (
        particle_run(model, "euler_ancestral", n, groups=256 // n)
        for model, n in ((guided, 4), (analytic_model(RING, True), 4), (guided, 1))
    )
    assert nearness(both).mean() > nearness(only_particles).mean() + 0.05
    assert nearness(both).mean() > nearness(only_guidance).mean() + 0.05


@pytest.mark.parametrize("options", [{}, {"target": -2.0}])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_guidance_keeps_what_it_knows_of_a_particle_with_it(momentum, options):
    """Copies of one particle go on alike where no noise tells them apart."""
    settings = Settings(variance=1.15, cap=8.0, momentum=momentum, **options)
    model = RewardGuidance(PlainReward(nearness), "shift", settings).attach(analytic_model(RING, True))
    copies = SimpleNamespace(
        size=8, generator=None, resample=lambda rewards, final: Resampled(torch.full((8,), 3), torch.ones(1))
    )

    def euler(model, x, sigmas, extra_args, **_):
        for sigma, below in pairwise(sigmas):
            x = x + (x - model(x, sigma * x.new_ones(len(x)), **extra_args)) / sigma * (below - sigma)
        return x

    sampler = comfy.samplers.KSAMPLER(ParticleSampler(euler, nearness, copies, every=4))
    latent = torch.zeros(8, 2, 1, 1)
    arguments = (sampler, sampling(model, "euler", steps=12).sigmas(), CONDITION, CONDITION, latent)
    finished = []
    sampler.sampler_function.on_step = lambda look: finished.append(look.series)
    comfy.sample.sample_custom(model, comfy.sample.prepare_noise(latent, 0), 1.0, *arguments, disable_pbar=True, seed=0)
    assert len(finished) == 3
    for series in finished[1:]:
        rewards = torch.tensor(series["reward"])
        assert torch.equal(rewards, rewards[:1].expand(8))


def test_a_model_that_was_asked_answers_once():
    class Model:
        inner_model = "inner"

        def __call__(self, x, sigma, **options):
            return x + 1

    asked = FirstPredictionKnown(Model(), torch.zeros(1))
    assert [asked(torch.ones(1), None, seed=0).item() for _ in range(3)] == [0, 2, 2]
    assert asked.inner_model == "inner"
