"""Choosing among candidates and steering particles, queued as a user's page queues them."""

import numpy as np
import pytest
import torch
from reward_guidance.tests.harness.graphs import FAMILIES, Graph
from reward_guidance.tests.harness.guided import (
    broken,
    distance,
    guided_model,
    latents,
    seeds_of,
    statistic,
    stock,
    wired,
    with_reward,
)

SEEDS = seeds_of(__file__)
FLUX_VAE = FAMILIES["flux"].vae
OUTPUTS = {
    "RewardGuidanceKSamplerBestOfN": ("latents", "images", "scores", "seeds", "report"),
    "RewardGuidanceKSamplerParticles": ("latents", "scores", "report"),
    "RewardGuidanceSelectBest": ("images", "latents", "scores", "indices", "seeds"),
}
BT601 = (0.299, 0.587, 0.114)
"""By which brightness is measured."""
LISTS = ("scores", "indices", "seeds", "report")


def best_of(family="flux", **options):
    return lambda graph, inputs: graph.add(
        "sampler",
        "RewardGuidanceKSamplerBestOfN",
        **inputs,
        **with_reward(graph, {"vae": FAMILIES[family].vae} | options),
    )


def particles(**options):
    """Particles sample by euler_ancestral if nothing else is said."""
    return lambda graph, inputs: graph.add(
        "sampler",
        "RewardGuidanceKSamplerParticles",
        **{**inputs, "sampler_name": "euler_ancestral"} | with_reward(graph, {"decoder": "latent_rgb"} | options),
    )


def showing(prompt, node="sampler"):
    """The prompt, with a node for each output of `node` that is text or a list of numbers, and one that saves its pictures."""
    for i, name in enumerate(OUTPUTS[prompt[node]["class_type"]]):
        if name in LISTS:
            prompt[f"{node}_{name}"] = {"class_type": "PreviewAny", "inputs": {"source": [node, i]}}
    return prompt


def numbers(result, name, node="sampler"):
    return [float(text) if name == "scores" else int(text) for text in result.outputs[f"{node}_{name}"]["text"]]


def chosen(bench, family="flux", guide=None, **options):
    """A run of Best of N or particles with everything shown: the result, and its latents (M,...)."""
    result = bench.run(showing(latents(family, guide, **options)))
    return result, bench.latent(result)


# Best of N


def is_reproduced_alone(bench, family, guide, sampler="euler", steps=2, **options):
    result, kept = chosen(bench, family, guide, seed=next(SEEDS), sampler_name=sampler, steps=steps, **options)
    alone = [
        bench.sample(family, stock, seed=seed, sampler_name=sampler, steps=steps) for seed in numbers(result, "seeds")
    ]
    assert len(kept) == len(alone) > 0
    return distance(kept, torch.cat(alone))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_candidate_is_made_again_by_a_stock_ksampler(bench, family):
    assert is_reproduced_alone(bench, family, best_of(family, n=3, keep=3), "euler_ancestral") == 0


@pytest.mark.parametrize(
    "sampler", ["euler", "dpmpp_2m_sde", "dpmpp_sde", "lcm", "uni_pc", "res_multistep_ancestral", "dpm_adaptive"]
)
def test_every_sampler_makes_candidates_again(bench, sampler):
    assert is_reproduced_alone(bench, "flux", best_of(n=2, keep=2), sampler, steps=3) == 0


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral", "dpmpp_2m_sde"])
@pytest.mark.parametrize("family", ["sd15", "flux", "wan"])
def test_candidates_sampled_together_are_the_same_to_rounding(bench, family, sampler):
    assert is_reproduced_alone(bench, family, best_of(family, n=3, keep=3, chunk=2), sampler) < 1e-3
    assert is_reproduced_alone(bench, family, best_of(family, n=2, keep=2, chunk=0), sampler) < 1e-3


def test_the_best_are_kept_best_first(bench):
    seed = next(SEEDS)
    everything, latent = chosen(bench, guide=best_of(n=5, keep=5), seed=seed)
    scores, seeds = numbers(everything, "scores"), numbers(everything, "seeds")
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) == 5
    assert sorted(seeds) == list(range(seed, seed + 5))
    two, best = chosen(bench, guide=best_of(n=5, keep=2), seed=seed)
    assert (numbers(two, "scores"), numbers(two, "seeds")) == (scores[:2], seeds[:2])
    assert torch.equal(best, latent[:2])
    (report,) = two.outputs["sampler_report"]["text"]
    lines = report.splitlines()
    assert lines[0] == "2 of 5 candidates kept"
    assert [line.startswith(f"seed {seed + i}: ") for i, line in enumerate(lines[1:])] == [True] * 5
    assert {int(line.split()[1].rstrip(":")) for line in lines[1:] if line.endswith(" kept")} == set(seeds[:2])


def test_scores_and_pictures_are_those_of_the_stock_decoder(bench):
    prompt = showing(latents("flux", best_of(n=3, keep=3), seed=next(SEEDS)))
    prompt["decoded"] = {"class_type": "VAEDecode", "inputs": {"samples": ["sampler", 0], "vae": FLUX_VAE}}
    for node, images in {"again": ["decoded", 0], "given": ["sampler", 1]}.items():
        prompt[node] = {
            "class_type": "RewardGuidanceScoreImages",
            "inputs": {"images": images, "reward": ["reward", 0]},
        }
        prompt[f"{node}_scores"] = {"class_type": "PreviewAny", "inputs": {"source": [node, 1]}}
    result = bench.run(prompt)
    assert numbers(result, "scores", "again") == pytest.approx(numbers(result, "scores"), abs=1e-4)
    assert numbers(result, "scores", "given") == pytest.approx(numbers(result, "scores"), abs=1e-4)


@pytest.mark.parametrize(
    ("guide", "sampler"), [(best_of, "euler"), (best_of, "dpmpp_2m_sde"), (particles, "euler_ancestral")]
)
@pytest.mark.parametrize("family", ["sd15", "flux", "wan"])
def test_one_candidate_is_the_stock_ksamplers(bench, family, guide, sampler):
    options = {"family": family, "n": 1} if guide is best_of else {"particles": 1}
    seed = next(SEEDS)
    made = bench.sample(family, guide(**options), seed=seed, sampler_name=sampler)
    assert distance(made, bench.sample(family, stock, seed=seed, sampler_name=sampler)) == 0


def test_one_particle_by_a_sampler_without_noise(bench):
    def by_euler(graph, inputs):
        return graph.add(
            "sampler",
            "RewardGuidanceKSamplerParticles",
            **inputs,
            **with_reward(graph, {"particles": 1, "decoder": "latent_rgb"}),
        )

    seed = next(SEEDS)
    assert distance(bench.sample("flux", by_euler, seed=seed), bench.sample("flux", stock, seed=seed)) == 0


def test_each_latent_of_a_batch_has_its_own_best(bench):
    seed = next(SEEDS)
    result, kept = chosen(bench, guide=best_of(n=2, keep=1), seed=seed, batch=3)
    seeds = numbers(result, "seeds")
    assert [own in (seed + 2 * i, seed + 2 * i + 1) for i, own in enumerate(seeds)] == [True] * 3
    assert distance(kept, torch.cat([bench.sample("flux", stock, seed=own) for own in seeds])) == 0
    (shown,) = [step for step in result.outputs["sampler"]["reward_guidance"] if step["step"] == 6]
    assert shown["steps"] == 6


def test_it_stops_when_enough_are_good_enough(bench):
    for keep, n, threshold, calls in ((1, 6, -100.0, 1), (2, 6, -100.0, 2), (1, 3, 100.0, 3)):
        guide = best_of(n=n, keep=keep, stop_above=threshold)
        result, kept = chosen(bench, guide=guide, seed=next(SEEDS), count_calls=True, steps=3)
        assert len(kept) == keep
        assert result.model_calls == 3 * calls
        assert [data["seeds"] for data in result.of("reward_guidance.step")] == [
            [data["seeds"][0]] for data in result.outputs["sampler"]["reward_guidance"]
        ]
        assert len(result.outputs["sampler"]["reward_guidance"]) == calls


def test_progress_runs_over_all_candidates(bench):
    result = bench.run(latents("flux", best_of(n=3), seed=next(SEEDS), steps=4))
    bars = [(data["value"], data["max"]) for data in result.of("progress") if data["node"] == "sampler"]
    assert {most for _, most in bars} == {12}
    assert [value for value, _ in bars] == sorted(value for value, _ in bars)
    assert bars[-1] == (12, 12)


@pytest.mark.parametrize("guide", [best_of(n=50), particles(particles=3)], ids=["best of n", "particles"])
def test_interrupt_leaves_a_clean_state(bench, guide):
    def stop(kind, data):
        if kind == "progress" and data["value"] > 3:
            bench.client.interrupt()

    seed = next(SEEDS)
    stopped = bench.queue(latents("flux", guide, seed=seed, steps=50), on_event=stop)
    assert stopped.error == "interrupted"
    assert "sampler" not in stopped.outputs
    assert is_reproduced_alone(bench, "flux", best_of(n=2, keep=2)) == 0


def guided(guide):
    """A way of sampling, on a model that Reward Guidance has patched."""
    return lambda graph, inputs: guide(
        graph, inputs | {"model": guided_model(graph, inputs["model"], decoder="latent_rgb", strength=2.0)}
    )


def test_best_of_two_of_a_guided_model(bench):
    result, kept = chosen(bench, guide=guided(best_of(n=2, keep=2)), seed=next(SEEDS), steps=3)
    seeds = numbers(result, "seeds")
    again = torch.cat([bench.sample("flux", guided(stock), seed=seed, steps=3) for seed in seeds])
    assert distance(kept, again) == 0
    assert distance(kept, torch.cat([bench.sample("flux", stock, seed=seed, steps=3) for seed in seeds])) > 1e-3
    nodes = [step["node"] for step in result.of("reward_guidance.step")]
    assert (nodes.count("guidance"), nodes.count("sampler")) == (6, 2)


def masked(guide):
    """Repaints the left half of a latent that is not empty; of a batch, the part that stock nodes cut out."""

    def build(graph, inputs):
        base = graph.add("base", "KSampler", **inputs | {"steps": 1, "seed": 77})
        cut = graph.add("cut", "LatentFromBatch", samples=base, batch_index=1, length=2)
        left = graph.add("left", "SolidMask", width=32, height=64, value=1.0)
        ground = graph.add("ground", "SolidMask", width=64, height=64, value=0.0)
        mask = graph.add("mask", "MaskComposite", destination=ground, source=left, x=0, y=0, operation="add")
        return guide(
            graph,
            inputs
            | {"latent_image": graph.add("masked", "SetLatentNoiseMask", samples=cut, mask=mask), "denoise": 0.5},
        )

    return build


def test_masks_and_batch_indices_stay_with_their_latents(bench):
    """The first latent by a stock KSampler with the reported seed, from a batch of that latent alone."""

    def only_first(guide):
        def build(graph, inputs):
            first = graph.add("first", "LatentFromBatch", samples=inputs["latent_image"], length=1, batch_index=0)
            return guide(graph, inputs | {"latent_image": first})

        return build

    result, kept = chosen(bench, guide=masked(best_of(n=2)), batch=3, seed=next(SEEDS), steps=3)
    seed = numbers(result, "seeds")[0]
    assert len(kept) == 2
    assert distance(kept[:1], bench.sample("flux", masked(only_first(stock)), batch=3, seed=seed, steps=3)) == 0


def test_particles_keep_what_the_mask_keeps(bench):
    prompt = latents(
        "flux", masked(particles(particles=3, every=1, temperature=0.02, keep=3)), batch=3, seed=next(SEEDS), steps=4
    )
    prompt["cut_saved"] = {
        "class_type": "SaveLatent",
        "inputs": {"samples": ["cut", 0], "filename_prefix": "latents/cut"},
    }
    result = bench.run(prompt)
    made, begun = bench.latent(result), bench.latent(result, "cut_saved").repeat_interleave(3, 0)
    assert made.shape == begun.shape
    assert distance(made[..., 4:], begun[..., 4:]) < 1e-5
    assert distance(made[..., :4], begun[..., :4]) > 1e-2


def with_mask(guide, shape):
    """Samples a latent with a soft noise mask of this shape, in part."""

    def build(graph, inputs):
        masked = graph.add("mask", "ProbeNoiseMask", latent=inputs["latent_image"], shape=",".join(map(str, shape)))
        return guide(graph, inputs | {"latent_image": masked, "denoise": 0.7})

    return build


@pytest.mark.parametrize("guide", [best_of, particles], ids=["best of n", "particles"])
@pytest.mark.parametrize(
    ("family", "shape"),
    [
        ("sd15", (64, 64)), ("sd15", (1, 4, 8, 8)), ("flux", (2, 64, 64)), ("flux", (1, 16, 64, 64)),
        ("wan", (64, 64)), ("wan", (2, 1, 8, 8)), ("wan", (5, 1, 64, 64)), ("wan", (1, 1, 2, 1, 1)), ("wan", (1, 16, 2, 8, 8)),
    ],
)  # fmt: skip
def test_one_candidate_keeps_what_a_stock_ksampler_keeps(bench, family, shape, guide):
    options = {"family": family, "n": 1} if guide is best_of else {"particles": 1}
    seed = next(SEEDS)
    made, expected = (
        bench.sample(family, with_mask(way, shape), seed=seed, sampler_name="euler_ancestral", steps=3)
        for way in (guide(**options), stock)
    )
    assert distance(made, expected) == 0


def test_conditionings_of_a_batch_stay_with_their_latents(bench):
    """Each latent has a ControlNet's picture of its own, also where several seeds of it are sampled together."""

    def controlled(guide, *colours):
        def build(graph, inputs):
            control = graph.add("control", "ControlNetLoader", control_net_name="control_v11p_sd15_canny.pth")
            conditions = {name: inputs[name] for name in ("positive", "negative")}
            graph.add(
                "controlled",
                "ControlNetApplyAdvanced",
                control_net=control,
                image=pictures(graph, colours),
                strength=1.0,
                **conditions,
            )
            return guide(graph, inputs | {"positive": ["controlled", 0], "negative": ["controlled", 1]})

        return build

    red, blue, seed = 0xFF0000, 0x0000FF, next(SEEDS)
    for chunk in (1, 2):
        guide = best_of("sd15", n=2, keep=2, chunk=chunk)
        result, kept = chosen(bench, "sd15", controlled(guide, red, blue), seed=seed, batch=2)
        hints = [red, red, blue, blue]
        alone = [
            bench.sample("sd15", controlled(stock, hint), seed=own)
            for hint, own in zip(hints, numbers(result, "seeds"), strict=True)
        ]
        assert distance(kept, torch.cat(alone)) < (1e-3 if chunk > 1 else 1e-6)
    assert distance(alone[0], bench.sample("sd15", controlled(stock, blue), seed=numbers(result, "seeds")[0])) > 1e-2


def test_the_last_seed_is_followed_by_the_first(bench):
    result, _ = chosen(bench, guide=best_of(n=3, keep=3), seed=2**64 - 2)
    assert sorted(numbers(result, "seeds")) == [0, 2**64 - 2, 2**64 - 1]


# Particles


@pytest.mark.parametrize("decoder", ["latent_rgb", "taesd", "vae"])
@pytest.mark.parametrize("family", ["sd15", "flux", "wan"])
def test_particles_report_every_look(bench, family, decoder):
    guide = particles(particles=3, every=1, keep=2, decoder=decoder, vae=FAMILIES[family].vae)
    result, kept = chosen(bench, family, guide, seed=next(SEEDS), steps=4, count_calls=True)
    assert kept.isfinite().all()
    assert len(kept) == len(numbers(result, "scores")) == 2
    shown = result.outputs["sampler"]["reward_guidance"]
    assert result.of("reward_guidance.step") == shown
    assert [(look["step"], look["steps"]) for look in shown] == [(1, 4), (2, 4), (4, 4)]
    assert all(
        len(look["series"]["reward"]) == 3 and 1 <= look["series"]["ess"][0] <= 3.001 and 1 <= look["survivors"] <= 3
        for look in shown
    )
    assert {look["decoder"] for look in shown} == {decoder}
    assert result.model_calls == 4
    (report,) = result.outputs["sampler_report"]["text"]
    assert report.splitlines()[0].startswith("step 1 of 4: ")


def test_particles_follow_a_reward_without_a_gradient(bench):
    def flat(graph):
        return graph.add("broken", "ProbeBrokenReward", reward=statistic()(graph), breakage="no gradient")

    options = {"particles": 8, "every": 1, "keep": 8, "reward": flat}
    result, _ = chosen(bench, guide=particles(temperature=0.02, **options), seed=next(SEEDS), steps=6)
    hot, _ = chosen(bench, guide=particles(temperature=100.0, **options), seed=next(SEEDS), steps=6)
    mean = lambda run: sum(numbers(run, "scores")) / 8  # noqa: E731
    assert mean(result) > mean(hot) + 0.01
    assert max(look["series"]["ess"][0] for look in hot.outputs["sampler"]["reward_guidance"]) > 7.9
    assert min(look["survivors"] for look in result.outputs["sampler"]["reward_guidance"]) < 8


def test_the_seed_decides_what_particles_do(bench):
    one, other = next(SEEDS), next(SEEDS)
    guide = particles(particles=3, every=1, keep=3)
    first = bench.sample("flux", guide, seed=one, steps=3, cfg=1.0)
    assert distance(bench.sample("flux", guide, seed=other, steps=3, cfg=1.0), first) > 0
    # At CFG 1 the negative prompt has no say: the same pictures, which ComfyUI does not know from its cache.
    assert torch.equal(bench.sample("flux", guide, seed=one, steps=3, cfg=1.0, negative=["positive", 0]), first)


def test_particles_of_a_batch_and_of_a_guided_model(bench):
    result, kept = chosen(bench, guide=guided(particles(particles=3, every=1)), seed=next(SEEDS), steps=3, batch=2)
    assert len(kept) == 2
    assert kept.isfinite().all()
    assert [look["step"] for look in result.outputs["sampler"]["reward_guidance"]] == [1, 3, 4, 6]


def test_particles_a_few_at_a_time_are_the_same_to_rounding(bench):
    seed = next(SEEDS)
    one, other = (bench.sample("sd15", particles(particles=4, keep=4, chunk=chunk), seed=seed) for chunk in (0, 1))
    assert distance(one, other) < 1e-3


@pytest.mark.parametrize("guide", [best_of, particles])
def test_a_long_prompt_is_said_to_be_cut(bench, clip_reward, guide):
    """In the last line of the report, once, and not where all of it is read."""

    def report(prompt):
        by = guide(reward=clip_reward, held_out=clip_reward, prompt=prompt)
        return (
            bench.run(showing(latents("flux", by, seed=next(SEEDS)))).outputs["sampler_report"]["text"][0].splitlines()
        )

    short, long = (
        report("a red circle"),
        report("a large red circle on a blue ground, masterpiece, best quality, and the end"),
    )
    assert len(long) == len(short) + 1
    assert long[-1].startswith("tiny_clip reads only the beginning of the prompt; it does not see: ")
    assert long[-1].endswith("and the end")


# Select Best


def pictures(graph, colours=(0x000000, 0xFFFFFF, 0x808080)):
    """Black, white and grey; white is the brightest."""
    links = [
        graph.add(f"image_{i}", "EmptyImage", width=32, height=32, batch_size=1, color=colour)
        for i, colour in enumerate(colours)
    ]
    batch = links[0]
    for i, link in enumerate(links[1:]):
        batch = graph.add(f"batch_{i}", "ImageBatch", image1=batch, image2=link)
    return batch


def selecting(build):
    """A prompt that ends in Select Best, with everything shown; build(graph) returns its inputs."""
    graph = Graph()
    graph.add("select", "RewardGuidanceSelectBest", **build(graph))
    return showing(graph.prompt, "select")


@pytest.mark.parametrize("keep", [1, 2, 3, 99])
def test_pictures_are_chosen_by_a_reward(bench, keep):
    result = bench.run(selecting(lambda graph: {"images": pictures(graph), "reward": statistic()(graph), "keep": keep}))
    assert numbers(result, "indices", "select") == [1, 2, 0][:keep]
    assert numbers(result, "seeds", "select") == [-1] * min(keep, 3)
    scores = numbers(result, "scores", "select")
    assert scores == sorted(scores, reverse=True)
    assert scores[0] == pytest.approx((1 - 0.40) / 0.12, abs=1e-3)


def test_pictures_are_chosen_by_a_threshold(bench):
    options = {"choose": "above threshold", "threshold": 0.5}
    result = bench.run(selecting(lambda graph: {"images": pictures(graph), "reward": statistic()(graph), **options}))
    assert numbers(result, "indices", "select") == [1, 2]


def test_chosen_pictures_come_out_in_order(bench):
    def build(graph):
        graph.add("saved", "SaveImage", images=["select", 0], filename_prefix="test")
        return {"images": pictures(graph), "reward": statistic()(graph), "keep": 2}

    result = bench.run(selecting(build))
    assert [image.getpixel((0, 0))[0] for image in bench.client.images(result, "saved")] == [255, 128]


def test_pictures_are_chosen_by_scores_that_are_given(bench):
    def build(graph):
        images = pictures(graph)
        dark = statistic("brightness", "dark", lower=True)(graph)
        return {
            "images": images,
            "scores": [graph.add("score", "RewardGuidanceScoreImages", images=images, reward=dark)[0], 1],
            "keep": 2,
        }

    assert numbers(bench.run(selecting(build)), "indices", "select") == [0, 2]


def test_one_picture_is_the_best(bench):
    result = bench.run(
        selecting(lambda graph: {"images": pictures(graph, [0x404040]), "reward": statistic()(graph), "keep": 4})
    )
    assert numbers(result, "indices", "select") == [0]


@pytest.mark.parametrize("connected", [("images", "latents"), ("latents",)])
def test_latents_are_chosen_with_their_seeds(bench, connected):
    """Best of 4 by brightness, then the darkest two of them: by the pictures, or through the VAE."""
    prompt = showing(latents("flux", best_of(n=4, keep=4), seed=next(SEEDS)))
    links = {"images": ["sampler", 1], "latents": ["sampler", 0]}
    prompt["dark"] = {
        "class_type": "RewardGuidanceImageStatistic",
        "inputs": {"statistic": "brightness", "lower": True},
    }
    inputs = {name: links[name] for name in connected} | {"reward": ["dark", 0], "vae": FLUX_VAE, "keep": 2}
    prompt["select"] = {"class_type": "RewardGuidanceSelectBest", "inputs": inputs}
    prompt["kept"] = {
        "class_type": "SaveLatent",
        "inputs": {"samples": ["select", 1], "filename_prefix": "latents/kept"},
    }
    result = bench.run(showing(prompt, "select"))
    assert numbers(result, "indices", "select") == [3, 2]
    assert numbers(result, "seeds", "select") == numbers(result, "seeds")[:1:-1]
    assert torch.equal(bench.latent(result, "kept"), bench.latent(result)[[3, 2]])


def test_a_stock_batch_has_no_seeds(bench):
    prompt = latents("flux", stock, batch=3, seed=next(SEEDS))
    prompt["reward"] = {"class_type": "RewardGuidanceImageStatistic", "inputs": {"statistic": "brightness"}}
    inputs = {"latents": ["sampler", 0], "vae": FLUX_VAE, "reward": ["reward", 0], "keep": 2}
    prompt["select"] = {"class_type": "RewardGuidanceSelectBest", "inputs": inputs}
    result = bench.run(showing(prompt, "select"))
    assert numbers(result, "seeds", "select") == [-1, -1]
    assert set(numbers(result, "indices", "select")) < {0, 1, 2}


def test_videos_are_chosen_whole(bench):
    """Each is one candidate, scored by the mean over its frames, and comes out as all of them."""
    prompt = latents("wan", stock, batch=3, seed=next(SEEDS))
    prompt["reward"] = {"class_type": "RewardGuidanceImageStatistic", "inputs": {"statistic": "brightness"}}
    inputs = {"latents": ["sampler", 0], "vae": FAMILIES["wan"].vae, "reward": ["reward", 0], "keep": 2}
    prompt["select"] = {"class_type": "RewardGuidanceSelectBest", "inputs": inputs}
    for name, link in (("decoded", {"samples": ["sampler", 0]}), ("expected", {"samples": ["select", 1]})):
        prompt[name] = {"class_type": "VAEDecode", "inputs": {**link, "vae": FAMILIES["wan"].vae}}
    for name, link in (("all", ["decoded", 0]), ("shown", ["select", 0]), ("again", ["expected", 0])):
        prompt[name] = {"class_type": "SaveImage", "inputs": {"images": link, "filename_prefix": "test"}}
    result = bench.run(showing(prompt, "select"))
    every, shown, again = (
        [np.asarray(image, float) for image in bench.client.images(result, name)] for name in ("all", "shown", "again")
    )
    means = (np.array(every) @ BT601).reshape(3, -1).mean(1)
    assert numbers(result, "indices", "select") == np.argsort(-means)[:2].tolist()
    assert len(shown) == len(every) * 2 // 3
    assert np.array_equal(shown, again)


# Bad input


def flux(guide, **options):
    return latents("flux", guide, seed=next(SEEDS), **options)


@pytest.mark.parametrize("name", ["n", "keep", "chunk"])
def test_numbers_of_candidates_that_make_no_sense(refused, name):
    refused(flux(best_of(**{name: -1})), "smaller than min")
    refused(flux(best_of(**{name: wired(-1)})), f"{name} must be a whole number from")


@pytest.mark.parametrize("name", ["particles", "keep", "every", "chunk"])
def test_numbers_of_particles_that_make_no_sense(refused, name):
    refused(flux(particles(**{name: -1})), "smaller than min")
    refused(flux(particles(**{name: wired(-1)})), f"{name} must be a whole number from ")


def test_nothing_to_keep(refused):
    refused(
        selecting(lambda graph: {"images": pictures(graph), "reward": statistic()(graph), "keep": 0}),
        "smaller than min",
    )
    linked = selecting(lambda graph: {"images": pictures(graph), "reward": statistic()(graph), "keep": wired(0)(graph)})
    refused(linked, "keep must be a whole number from 1 ")


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "dpmpp_2m_sde", "res_multistep"])
def test_samplers_that_particles_cannot_use(refused, sampler):
    def by(graph, inputs):
        options = with_reward(graph, {"decoder": "latent_rgb"})
        return graph.add("sampler", "RewardGuidanceKSamplerParticles", **inputs | {"sampler_name": sampler}, **options)

    refused(flux(by), f"{sampler} cannot sample particles", "Choose one of euler_ancestral, ")


@pytest.mark.parametrize("guide", [best_of, particles])
def test_rewards_that_are_no_numbers(refused, guide):
    refused(flux(guide(reward=broken("nan"))), "returned a score that is not a finite number")


def test_scores_that_are_no_numbers(refused):
    """The reward's own nodes refuse them; a list of scores may come from anywhere."""

    def build(graph):
        return {"images": pictures(graph, [0, 1]), "scores": graph.add("nan", "ProbeNumbers", numbers="0.5, nan")}

    refused(selecting(build), "Score 1 is not a number")


def test_scores_that_are_missing(refused):
    def build(graph):
        return {"images": pictures(graph, [0, 1]), "scores": graph.add("some", "ProbeNumbers", numbers="0.5, none")}

    refused(selecting(build), "Select Best got scores that are not numbers: [0.5, None]")


@pytest.mark.parametrize("by", ["reward", "scores"])
def test_a_list_of_no_pictures(refused, by):
    def build(graph):
        links = {"reward": statistic()(graph), "scores": graph.add("given", "ProbeNumbers", numbers="1, 2")}
        return {"images": [empty(graph)[0], 2], by: links[by]}

    refused(selecting(build), "There is nothing to choose from: the list of pictures is empty")


def test_pictures_that_are_not_alike(refused):
    """A list of pictures, of which one is transparent, or larger."""

    def build(graph, other):
        links = [other(graph), pictures(graph, [0x808080])]
        return {"images": graph.add("list", "ProbeList", first=links[0], second=links[1]), "reward": statistic()(graph)}

    def transparent(graph):
        mask = graph.add("mask", "SolidMask", value=0.5, width=32, height=32)
        image = graph.add("opaque", "EmptyImage", width=32, height=32, batch_size=1, color=0)
        return graph.add("transparent", "JoinImageWithAlpha", image=image, alpha=mask)

    def larger(graph):
        return graph.add("larger", "EmptyImage", width=64, height=32, batch_size=1, color=0)

    for other, found in (
        (transparent, "32 x 32 with 3 channels, 32 x 32 with 4 channels"),
        (larger, "32 x 32 with 3 channels, 64 x 32 with 3"),
    ):
        refused(
            selecting(lambda graph, other=other: build(graph, other)),
            f"different sizes or channels cannot be compared: {found}",
        )


@pytest.mark.parametrize("guide", [best_of, particles])
def test_a_reward_that_needs_a_prompt_without_one(refused, clip_reward, guide):
    refused(flux(guide(reward=clip_reward)), "the prompt is empty; write one into the prompt field")


def test_a_chosen_picture_needs_its_prompt_too(refused, clip_reward):
    refused(selecting(lambda graph: {"images": pictures(graph), "reward": clip_reward(graph)}), "the prompt is empty")


def test_nothing_to_choose_from_or_by(refused):
    refused(selecting(lambda graph: {"reward": statistic()(graph)}), "nothing to score: connect images")
    refused(selecting(lambda graph: {"images": pictures(graph)}), "nothing to choose by: connect a reward or scores")


def empty(graph):
    return graph.add("empty", "ProbeEmptyBatch")


def test_an_empty_batch(refused):
    refused(selecting(lambda graph: {"images": empty(graph), "reward": statistic()(graph)}), "the batch is empty")
    for guide in (best_of, particles):
        refused(
            flux(lambda graph, inputs, guide=guide: guide()(graph, inputs | {"latent_image": [empty(graph)[0], 1]})),
            "the batch is empty",
        )


def test_counts_that_do_not_match(refused):
    def build(graph, latents=4, scores="1, 2, 3"):
        graph.add("latent", "EmptyLatentImage", width=64, height=64, batch_size=latents)
        return {
            "images": pictures(graph),
            "latents": ["latent", 0],
            "scores": graph.add("given", "ProbeNumbers", numbers=scores),
        }

    refused(selecting(build), "Select Best got 3 scores, 3 pictures, 4 latents; it needs one of each")
    refused(selecting(lambda graph: build(graph, 3, "1, 2")), "Select Best got 2 scores, 3 pictures, 3 latents")


def test_frames_beside_the_latents_of_videos(refused):
    def build(graph):
        graph.add("latent", "EmptyHunyuanLatentVideo", width=64, height=64, length=5, batch_size=2)
        return {"images": pictures(graph), "latents": ["latent", 0], "reward": statistic()(graph)}

    refused(
        selecting(build),
        "3 pictures, 2 latents; it needs one of each for every candidate. For videos, connect the vae in place of the images",
    )


def test_latents_beside_a_vae_of_another_family(refused):
    def build(graph):
        graph.add("latent", "EmptyLatentImage", width=64, height=64, batch_size=2)
        return {
            "latents": ["latent", 0],
            "vae": graph.add("other", "VAELoader", vae_name="ae.safetensors"),
            "reward": statistic()(graph),
        }

    refused(
        selecting(build),
        "decodes 16 latent channels, but the latents have 4. Connect the VAE of the model that made them",
    )


def test_an_output_without_an_input(refused):
    prompt = selecting(lambda graph: {"images": pictures(graph), "reward": statistic()(graph)})
    prompt["kept"] = {
        "class_type": "SaveLatent",
        "inputs": {"samples": ["select", 1], "filename_prefix": "latents/kept"},
    }
    refused(prompt, "Select Best has no output latents")


def test_a_threshold_that_none_reaches(refused):
    options = {"choose": "above threshold", "threshold": 50.0}
    refused(
        selecting(lambda graph: {"images": pictures(graph), "reward": statistic()(graph), **options}),
        "Lower the threshold",
    )


def test_a_vae_of_another_family(refused):
    other = lambda graph: graph.add("other", "VAELoader", vae_name="vae-ft-mse-840000-ema-pruned.ckpt")  # noqa: E731
    refused(flux(best_of(vae=other)), "decodes 4 latent channels, but this model has 16")
