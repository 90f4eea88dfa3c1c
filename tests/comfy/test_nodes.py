"""The two guided nodes on every family of models, queued as a user's page queues them."""

import pytest
import torch
from reward_guidance.guidance.estimators import ESTIMATORS
from reward_guidance.tests.harness.graphs import FAMILIES
from reward_guidance.tests.harness.guided import distance, latents, one_box, stock, two_nodes

DECODERS = ("latent_rgb", "taesd", "vae")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    """Of the whole module, so that one family's tests follow each other and its model is loaded once."""
    return request.param


@pytest.fixture(scope="module")
def plain(bench, family):
    """What the stock KSampler makes."""
    return bench.sample(family)


@pytest.mark.parametrize("decoder", DECODERS)
def test_both_nodes_guide_alike_and_report_every_step(bench, family, plain, decoder):
    options = {"decoder": decoder, "vae": FAMILIES[family].vae}
    box, pair = (bench.run(latents(family, guide(**options))) for guide in (one_box, two_nodes))
    guided = bench.latent(box)
    assert guided.isfinite().all()
    assert guided.shape == plain.shape
    assert distance(guided, plain) > 1e-3
    assert distance(guided, bench.latent(pair)) == 0

    shown = box.outputs["sampler"]["reward_guidance"]
    assert [(step["step"], step["steps"], step["model_calls"]) for step in shown] == [(1, 2, 1), (2, 2, 2)]
    assert {step["decoder"] for step in shown} == {decoder}
    assert box.of("reward_guidance.step") == shown
    assert [step["series"] for step in pair.of("reward_guidance.step")] == [step["series"] for step in shown]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_estimator_guides(bench, family, plain, estimator):
    guided = bench.sample(family, one_box(estimator=estimator, decoder="latent_rgb"))
    assert guided.isfinite().all()
    assert distance(guided, plain) > 0


OFF = {
    "strength 0": {"strength": 0.0},
    "empty interval": {"start_percent": 0.4, "end_percent": 0.4},
    "no reward": {"reward": None},
}


@pytest.mark.parametrize("options", OFF.values(), ids=OFF)
@pytest.mark.parametrize("guide", [one_box, two_nodes], ids=["one box", "two nodes"])
def test_guidance_that_is_off_changes_not_one_bit(bench, family, plain, guide, options):
    result = bench.run(latents(family, guide(**options)))
    assert distance(bench.latent(result), plain) == 0
    assert not result.of("reward_guidance.step")


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "euler_ancestral"])
def test_guidance_makes_no_additional_model_call(bench, family, sampler):
    guides = stock, one_box(decoder="latent_rgb")
    plain, guided = (
        bench.run(latents(family, guide, count_calls=True, steps=3, sampler_name=sampler)) for guide in guides
    )
    assert plain.model_calls == guided.model_calls == (5 if sampler == "heun" else 3)


@pytest.mark.parametrize("family", ["sd15", "wan"], indirect=True)
def test_batch_and_steps_do_not_mix_up_rewards(bench, family):
    shown = bench.run(latents(family, one_box(decoder="latent_rgb"), batch=2, steps=3)).outputs["sampler"][
        "reward_guidance"
    ]
    assert [len(step["series"]["reward"]) for step in shown] == [2, 2, 2]


def test_a_second_queue_starts_from_clean_state(bench, family):
    """The node's output is cached, so the same guided model samples all three times."""
    same = {"cfg": 1.0, "sampler_name": "euler_ancestral"}
    guide = two_nodes(decoder="latent_rgb", momentum=0.5)
    first = bench.sample(family, guide, seed=1, **same)
    other = bench.sample(family, guide, seed=2, **same)
    # At CFG 1 the negative prompt has no say: the same picture, which ComfyUI does not know from its cache.
    again = bench.run(latents(family, guide, seed=1, **same, negative=["positive", 0]))
    cached = {node for data in again.of("execution_cached") for node in data["nodes"]}
    assert "guidance" in cached
    assert "sampler" not in cached
    assert torch.equal(bench.latent(again), first)
    assert distance(other, first) > 0
