"""What nodes tell of their runs, and what of it the server keeps."""

import math
from types import SimpleNamespace

import pytest
from reward_guidance.tests.harness.graphs import FAMILIES
from reward_guidance.tests.harness.guided import latents, one_box, seeds_of, statistic, two_nodes, with_reward
from reward_guidance.tests.harness.inprocess import load_comfyui

load_comfyui()

from reward_guidance.nodes.wiring import reporting
from reward_guidance.nodes.wiring.reporting import NodeStep

SEEDS = seeds_of(__file__)
"""No run is like another, which ComfyUI would answer from its cache."""
EVENT = "reward_guidance.step"
HELD_OUT = {"held_out": statistic("contrast", "other")}


def another(kind, **own):
    """A sampler that chooses among samples."""
    return lambda **options: (
        lambda graph, inputs: graph.add("sampler", kind, **inputs | own | with_reward(graph, options))
    )


GUIDES = {
    "one box": lambda **options: one_box(decoder="latent_rgb", **options),
    "two nodes": lambda **options: two_nodes(decoder="latent_rgb", **options),
    "particles": another(
        "RewardGuidanceKSamplerParticles", decoder="latent_rgb", particles=3, every=1, sampler_name="euler_ancestral"
    ),
    "best of n": another("RewardGuidanceKSamplerBestOfN", n=3, vae=FAMILIES["sd3"].vae),
}


@pytest.mark.parametrize("guide", GUIDES.values(), ids=GUIDES)
def test_a_held_out_reward_is_told_and_not_followed(bench, guide):
    seed = next(SEEDS)
    without, beside = (bench.run(latents("sd3", guide(**held_out), seed=seed, steps=3)) for held_out in ({}, HELD_OUT))
    assert (bench.latent(without) == bench.latent(beside)).all()
    for plain, step in zip(without.of(EVENT), beside.of(EVENT), strict=True):
        held_out = step["series"].pop("reward/held-out")
        assert step["series"] == plain["series"]
        assert len(held_out) == len(step["series"]["reward"])
        assert held_out != step["series"]["reward"]


@pytest.mark.parametrize("every", [1, 2])
def test_both_rewards_are_of_the_same_estimate(bench, every):
    """The reward itself, held out, is told to be what it is."""
    guide = one_box(decoder="latent_rgb", held_out=statistic("brightness", "other"), every=every, strength=4.0)
    shown = bench.run(latents("sd3", guide, seed=next(SEEDS), steps=5)).of(EVENT)
    series = [step["series"] for step in shown]
    for step in series:
        assert step["reward/held-out"] == pytest.approx(step["reward"], abs=1e-5)
    assert [step["step"] for step in shown] == list(range(1, 6, every))
    assert len({tuple(step["reward"]) for step in series}) == len(shown)


def test_best_of_n_tells_of_the_best_so_far(bench):
    shown = bench.run(latents("sd3", GUIDES["best of n"](), seed=next(SEEDS))).of(EVENT)
    scores = [step["series"]["reward"][0] for step in shown]
    assert [step["series"]["reward/best"] for step in shown] == [[max(scores[: i + 1])] for i in range(3)]
    assert all("reward" in step["scattered"] for step in shown)


def kept(bench, workflow):
    return bench.client.get(f"/reward_guidance/steps?workflow={workflow}")


@pytest.mark.parametrize("guide, node", [(one_box, "sampler"), (two_nodes, "guidance")], ids=["one box", "two nodes"])
def test_the_last_run_of_a_node_is_kept_under_the_workflow_it_ran_in(bench, guide, node):
    """Also where the node's output comes from the cache."""
    runs = []
    for workflow in ("first", "first", "second"):
        prompt = latents("sd3", guide(decoder="latent_rgb"), seed=next(SEEDS), steps=3)
        runs.append(bench.run(prompt, extra_pnginfo={"workflow": {"id": workflow}}).of(EVENT))
    assert [[step["index"] for step in run] for run in runs] == [[0, 1, 2]] * 3
    assert [[step["workflow"] for step in run] for run in runs] == [["first"] * 3, ["first"] * 3, ["second"] * 3]
    assert runs[0][0]["run"] < runs[1][0]["run"] < runs[2][0]["run"]
    assert kept(bench, "first")[node] == runs[1]
    assert kept(bench, "second")[node] == runs[2]
    assert kept(bench, "third") == {}


def test_nothing_is_kept_of_a_prompt_without_a_workflow(bench):
    shown = bench.run(latents("sd3", one_box(decoder="latent_rgb"), seed=next(SEEDS))).of(EVENT)
    assert shown
    assert {step["workflow"] for step in shown} == {None}
    assert kept(bench, "") == {}


@pytest.fixture
def told(monkeypatch):
    """Events of reporters in this process."""
    events = []
    queue = SimpleNamespace(
        get_current_queue_volatile=lambda: ([(0, "prompt", {}, {"extra_pnginfo": {"workflow": {"id": "w"}}})], [])
    )
    server = SimpleNamespace(
        client_id=None, prompt_queue=queue, send_sync=lambda name, data, client: events.append(data)
    )
    monkeypatch.setattr(reporting, "PromptServer", SimpleNamespace(instance=server))
    return events


def run(reporter, steps, every=1, **options):
    for step in range(every, steps + 1, every):
        reporter(NodeStep(step=step, steps=steps, series={"loss": [1 / step]}, **options))


@pytest.mark.parametrize("steps, every", [(1, 1), (500, 1), (501, 1), (5000, 1), (20_000, 25), (1_000_000, 100)])
def test_of_long_runs_some_steps_are_told(told, steps, every):
    run(reporting.Reporter(SimpleNamespace(unique_id="1")), steps, every)
    assert min(500, steps // every) / 2 <= len(told) <= 501
    assert (told[0]["step"], told[-1]["step"]) == (every, steps)
    assert [event["index"] for event in told] == list(range(len(told)))


def test_a_rare_series_is_not_lost_among_the_steps_that_are_not_told(told):
    reporter = reporting.Reporter(SimpleNamespace(unique_id="1"))
    for step in range(1, 10_001):
        check = {"loss/check": [float(step)]} if step % 250 == 0 else {}
        reporter(NodeStep(step=step, steps=10_000, series={"loss": [1 / step]} | check))
    checks = [event["series"]["loss/check"][0] for event in told if "loss/check" in event["series"]]
    assert checks == list(range(250, 10_001, 250))
    assert all("loss" in event["series"] for event in told)


def test_a_run_that_asks_without_end_is_told_to_a_limit(told):
    reporter = reporting.Reporter(SimpleNamespace(unique_id="1"))
    for _ in range(10_000):
        reporter(NodeStep(step=1, steps=1, series={"reward": [0.0]}))
    assert len(told) == len(reporter.history) == reporting.MOST_EVENTS


def test_the_oldest_nodes_are_forgotten(told):
    for node in range(100):
        run(reporting.Reporter(SimpleNamespace(unique_id=str(node))), 2)
    assert list(reporting.steps_of("w")) == [str(node) for node in range(100 - reporting.MOST_CURVES, 100)]


def test_numbers_that_are_none_do_not_break_the_message(told):
    reporter = reporting.Reporter(SimpleNamespace(unique_id="1"))
    reporter(NodeStep(step=1, steps=1, series={"reward": [math.nan, 1.0, math.inf]}))
    assert told[0]["series"] == {"reward": [None, 1.0, None]}
