"""Guidance together with everything else that a graph may hold."""

import pytest
from reward_guidance.guidance.rewards import STATISTICS
from reward_guidance.tests.harness.graphs import FAMILIES, LORA, Graph
from reward_guidance.tests.harness.guided import (
    distance,
    guided_model,
    latents,
    mean_reward,
    one_box,
    statistic,
    stock,
    two_nodes,
    under_control,
)

FREE = {"decoder": "latent_rgb"}
"""The decoder that costs nothing."""


def last_reward(result):
    return mean_reward(result.of("reward_guidance.step")[-1])


def assert_follows(bench, family, guide=two_nodes, steps=4, strength=4.0, **options):
    """Against guidance so weak that it only watches. The options of guide as a dict `guidance`, the others of the prompt."""
    guidance = FREE | options.pop("guidance", {})
    results = [
        bench.run(latents(family, guide(strength=value, **guidance), steps=steps, **options))
        for value in (1e-9, strength)
    ]
    watched, followed = map(last_reward, results)
    assert followed > watched + 1e-3
    return bench.latent(results[1])


def custom(node, **guidance):
    """SamplerCustom, or SamplerCustomAdvanced with a guider, in place of the KSampler."""

    def build(graph, inputs):
        model = guided_model(graph, inputs["model"], **FREE, **guidance)
        conditions = {"positive": inputs["positive"], "negative": inputs["negative"]}
        sampler = graph.add("select", "KSamplerSelect", sampler_name=inputs["sampler_name"])
        schedule = {name: inputs[name] for name in ("scheduler", "steps", "denoise")}
        sigmas = graph.add("sigmas", "BasicScheduler", model=inputs["model"], **schedule)
        rest = {"sampler": sampler, "sigmas": sigmas, "latent_image": inputs["latent_image"]}
        if node == "SamplerCustom":
            noise = {"add_noise": True, "noise_seed": inputs["seed"]}
            return graph.add("sampler", node, model=model, cfg=inputs["cfg"], **noise, **conditions, **rest)
        guider = {
            "BasicGuider": {"conditioning": inputs["positive"]},
            "CFGGuider": conditions | {"cfg": inputs["cfg"]},
            "DualCFGGuider": {
                "cond1": inputs["positive"],
                "cond2": inputs["negative"],
                "negative": inputs["negative"],
                "cfg_conds": inputs["cfg"],
                "cfg_cond2_negative": 2.0,
                "style": "regular",
            },
            "DualModelGuider": conditions | {"model_negative": inputs["model"], "cfg": inputs["cfg"]},
            "PerpNegGuider": conditions
            | {"empty_conditioning": inputs["negative"], "cfg": inputs["cfg"], "neg_scale": 1.0},
        }[node]
        noise = graph.add("noise", "RandomNoise", noise_seed=inputs["seed"])
        return graph.add(
            "sampler",
            "SamplerCustomAdvanced",
            noise=noise,
            guider=graph.add("guider", node, model=model, **guider),
            **rest,
        )

    return build


@pytest.mark.parametrize(
    ("node", "cfg"), [("SamplerCustom", 4.0), ("SamplerCustom", 1.0), ("BasicGuider", 1.0), ("CFGGuider", 4.0)]
)
def test_custom_sampling_is_guided_as_the_ksampler_is(bench, node, cfg):
    expected = bench.sample("sd3", two_nodes(**FREE), cfg=cfg)
    assert distance(bench.sample("sd3", custom(node), cfg=cfg), expected) == 0
    assert distance(bench.sample("sd3", stock, cfg=cfg), expected) > 1e-3


@pytest.mark.parametrize("estimator", ["shift", "jacobian"])
@pytest.mark.parametrize("node", ["DualCFGGuider", "DualModelGuider", "PerpNegGuider"])
def test_guiders_that_ask_more_than_twice_or_two_models_are_guided(bench, node, estimator):
    guided, plain = (
        bench.sample("sd3", custom(node, strength=strength, estimator=estimator), cfg=4.0) for strength in (1.0, 0.0)
    )
    assert guided.isfinite().all()
    assert distance(guided, plain) > 1e-3


@pytest.mark.parametrize("cfg", [1.0, 4.0])
@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_every_scale_of_classifier_free_guidance(bench, family, cfg):
    assert_follows(bench, family, cfg=cfg)


@pytest.mark.parametrize("family", ["flux", "wan"])
def test_samples_of_a_batch_do_not_feel_each_other(bench, family):
    batch, alone = (bench.sample(family, one_box(**FREE, smoothing=0), batch=batch) for batch in (3, 1))
    assert len(batch) == 3
    assert distance(batch[:1], alone) < 1e-4
    assert distance(batch[0], batch[1]) > 0.1


def test_pictures_for_a_video_model(bench):
    """A 4-D latent, which ComfyUI makes 5-D."""
    graph_of_pictures = latents("wan", one_box(**FREE))
    graph_of_pictures["latent"] = {
        "class_type": "EmptySD3LatentImage",
        "inputs": {"width": 64, "height": 64, "batch_size": 1},
    }
    assert bench.latent(bench.run(graph_of_pictures)).shape == (1, 16, 1, 8, 8)


@pytest.mark.parametrize("family", ["sd15", "flux", "wan"])
def test_image_to_image(bench, family):
    steps = bench.run(latents(family, one_box(**FREE), denoise=0.5, steps=3)).outputs["sampler"]["reward_guidance"]
    assert len(steps) == 3
    full = bench.run(latents(family, one_box(**FREE), steps=3)).outputs["sampler"]["reward_guidance"]
    assert steps[0]["sigma"] < full[0]["sigma"]


def painted(**guidance):
    """Repaints the left half of a latent."""

    def build(graph, inputs):
        base = graph.add("base", "KSampler", **inputs | {"steps": 1, "seed": 77})
        graph.add("base_saved", "SaveLatent", samples=base, filename_prefix="latents/base")
        size = {"height": 64, "value": 0.0}
        ground = graph.add("ground", "SolidMask", width=64, **size)
        left = graph.add("left", "SolidMask", width=32, **size | {"value": 1.0})
        mask = graph.add("mask", "MaskComposite", destination=ground, source=left, x=0, y=0, operation="add")
        masked = graph.add("masked", "SetLatentNoiseMask", samples=base, mask=mask)
        return two_nodes(**FREE, **guidance)(graph, inputs | {"latent_image": masked})

    return build


@pytest.mark.parametrize("family", ["sd15", "flux", "wan"])
def test_inpainting_keeps_what_the_mask_keeps(bench, family):
    result = bench.run(latents(family, painted(strength=4.0), steps=3))
    guided, base = bench.latent(result), bench.latent(result, "base_saved")
    plain = bench.sample(family, painted(strength=0.0), steps=3)
    left, right = guided.split(4, -1)
    assert distance(right, plain[..., 4:]) == 0
    assert distance(right, base[..., 4:]) < 1e-5
    assert distance(left, plain[..., :4]) > 1e-3


@pytest.mark.parametrize("after", [False, True], ids=["before guidance", "after guidance"])
@pytest.mark.parametrize("estimator", ["shift", "jacobian"])
def test_lora(bench, estimator, after):
    def with_lora(graph, inputs):
        options = {"lora_name": LORA, "strength_model": 1.0}
        if after:
            model = guided_model(graph, inputs["model"], estimator=estimator, **FREE)
            return stock(graph, inputs | {"model": graph.add("lora", "LoraLoaderModelOnly", model=model, **options)})
        model = graph.add("lora", "LoraLoaderModelOnly", model=inputs["model"], **options)
        return two_nodes(estimator=estimator, **FREE)(graph, inputs | {"model": model})

    def only_lora(graph, inputs):
        model = graph.add("lora", "LoraLoaderModelOnly", model=inputs["model"], lora_name=LORA, strength_model=1.0)
        return stock(graph, inputs | {"model": model})

    both = bench.sample("flux", with_lora)
    assert both.isfinite().all()
    assert distance(both, bench.sample("flux", only_lora)) > 1e-3
    assert distance(both, bench.sample("flux", two_nodes(estimator=estimator, **FREE))) > 1e-3


@pytest.mark.parametrize("estimator", ["shift", "jacobian"])
def test_controlnet(bench, estimator):
    guide = two_nodes(estimator=estimator, **FREE)
    both, only_control, only_guidance = (
        bench.sample("sd15", way) for way in (under_control(guide), under_control(stock), guide)
    )
    assert both.isfinite().all()
    assert distance(both, only_control) > 1e-3
    assert distance(both, only_guidance) > 1e-3


@pytest.mark.parametrize("estimator", ["shift", "jacobian"])
@pytest.mark.parametrize("family", ["flux", "wan"])
def test_fp8_weights(bench, family, estimator):
    def fp8(guide):
        def build(graph, inputs):
            graph.prompt["model"]["inputs"]["weight_dtype"] = "fp8_e4m3fn"
            return guide(graph, inputs)

        return build

    guided, plain = (bench.sample(family, fp8(guide)) for guide in (two_nodes(estimator=estimator, **FREE), stock))
    assert guided.isfinite().all()
    assert distance(guided, plain) > 1e-3


@pytest.mark.parametrize("estimator", ["shift", "jacobian"])
def test_two_guidances_in_a_chain(bench, estimator):
    def chain(graph, inputs):
        first = guided_model(graph, inputs["model"], "first", estimator=estimator, **FREE)
        second = guided_model(
            graph, first, "second", reward=statistic("contrast", "other"), estimator=estimator, **FREE
        )
        return stock(graph, inputs | {"model": second})

    result = bench.run(latents("flux", chain, count_calls=True))
    assert result.model_calls == 2
    assert [step["node"] for step in result.of("reward_guidance.step")].count("first") == 2
    assert [step["node"] for step in result.of("reward_guidance.step")].count("second") == 2
    for alone in (
        two_nodes(estimator=estimator, **FREE),
        two_nodes(reward=statistic("contrast"), estimator=estimator, **FREE),
    ):
        assert distance(bench.latent(result), bench.sample("flux", alone)) > 1e-3


def combined(weights, **more):
    """Brightness and contrast."""

    def build(graph):
        parts = {f"reward_{i}": statistic(name, name)(graph) for i, name in enumerate(("brightness", "contrast"), 1)}
        shares = {f"weight_{i}": weight for i, weight in enumerate(weights, 1)}
        return graph.add("combined", "RewardGuidanceCombineRewards", **parts, **shares, **more)

    return build


def test_a_combination_of_rewards(bench):
    assert_follows(bench, "flux", guidance={"reward": combined((1.0, 1.0))})
    only_one = bench.sample("flux", two_nodes(reward=combined((2.0, 0.0)), **FREE))
    assert distance(only_one, bench.sample("flux", two_nodes(**FREE))) < 1e-5


@pytest.mark.parametrize("lower", [False, True], ids=["higher", "lower"])
@pytest.mark.parametrize("name", ["colour", "colour of every pixel", *STATISTICS])
def test_every_image_statistic_is_followed(bench, name, lower):
    """Sharpness is measured at 512 pixels; of a picture 8 pixels wide nothing would be left."""
    detailed = {"decoder": "taesd", "smoothing": 0, "temperature": 0.02} if name == "sharpness" else {}
    assert_follows(bench, "flux", guidance={"reward": statistic(name, lower=lower)} | detailed)


def picture(graph, color=0x3366CC, size=64):
    return graph.add("reference", "EmptyImage", width=size, height=size, batch_size=1, color=color)


def likeness(kind, **more):
    return lambda graph: graph.add(
        "likeness", "RewardGuidanceImageSimilarity", image=picture(graph), likeness=kind, **more
    )


def test_image_similarity_is_followed(bench):
    assert_follows(bench, "flux", guidance={"reward": likeness("colour")})
    assert bench.sample("flux", two_nodes(reward=likeness("structure"), **FREE)).isfinite().all()


def score(build_reward, images=lambda graph: picture(graph), **options):
    """A prompt that scores images and shows both lists of numbers."""

    def build(graph):
        links = {"images": images(graph), "reward": build_reward(graph)}
        graph.add("score", "RewardGuidanceScoreImages", **links, **options)
        for output, node in enumerate(("raw", "standardized", "report")):
            graph.add(node, "PreviewAny", source=["score", output])

    return build


def built(build):
    graph = Graph()
    build(graph)
    return graph.prompt


def two_pictures(graph):
    images = [
        graph.add(f"image_{i}", "EmptyImage", width=32, height=32, batch_size=1, color=c)
        for i, c in enumerate((0x000000, 0xFFFFFF))
    ]
    return graph.add("images", "ImageBatch", image1=images[0], image2=images[1])


def test_score_images(bench):
    result = bench.run(built(score(statistic("brightness"), two_pictures)))
    numbers = [[float(text) for text in result.outputs[node]["text"]] for node in ("raw", "standardized")]
    assert numbers[0] == pytest.approx([0.0, 1.0], abs=1e-5)
    brightness = STATISTICS["brightness"]
    assert numbers[1] == pytest.approx(
        [(value - brightness.reference_mean) / brightness.reference_std for value in (0, 1)], abs=1e-3
    )
    (report,) = result.outputs["report"]["text"]
    assert report.splitlines()[0].split() == ["|", "picture", "|", "brightness", "|"]
    assert len(report.splitlines()) == 4
    assert result.outputs["score"]["text"] == [report]


@pytest.mark.parametrize("decoder", ["latent_rgb", "taesd"])
def test_clip_reward_file_guides(bench, clip_reward, decoder):
    assert_follows(bench, "flux", guidance={"reward": clip_reward, "prompt": "a red circle", "decoder": decoder})


def test_clip_reward_file_scores_by_the_prompt(bench, clip_reward):
    one, other = (
        bench.run(built(score(clip_reward, two_pictures, prompt=text))).outputs["raw"]["text"]
        for text in ("a red circle", "two cats")
    )
    assert len(one) == 2
    assert one != other


def test_likeness_in_meaning(bench, clip_reward):
    def build(graph):
        return likeness("meaning", clip_reward=clip_reward(graph))(graph)

    assert_follows(bench, "flux", guidance={"reward": build})
    same = bench.run(built(score(build)))
    assert float(same.outputs["raw"]["text"][0]) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("decoder", ["latent_rgb", "taesd", "vae"])
def test_unloaded_models_come_back(bench, clip_reward, decoder):
    """/free unloads and forgets between runs, so that each begins with loading."""
    options = {"decoder": decoder, "vae": FAMILIES["flux"].vae, "reward": clip_reward, "prompt": "a red circle"}
    first = bench.sample("flux", one_box(**options))
    bench.client.free()
    assert distance(bench.sample("flux", one_box(**options)), first) == 0
