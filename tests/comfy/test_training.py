"""Collect, train, save, load and apply, queued as a user's page queues them."""

import itertools
import shutil

import pytest
from reward_guidance.guidance.files import load_network
from reward_guidance.tests.harness.graphs import FAMILIES, Graph
from reward_guidance.tests.harness.guided import latents, stock, with_reward

SEEDS = itertools.count(70_000, 100)
"""Each prompt has its own, so that ComfyUI runs it and does not remember it."""
PROMPTS = "a red circle\n\n  a blue square \na red circle on a green ground\n"
COUNT = 12
CHECKPOINT = "training-*.checkpoint"


def distance(one, other):
    return float((one - other).abs().max())


@pytest.fixture(scope="module", autouse=True)
def clean(server):
    for folder in (server.base / "output" / "guidance_data", server.base / "models" / "guidance_networks"):
        shutil.rmtree(folder, ignore_errors=True)
    return server.base


@pytest.fixture
def data_folder(server):
    return lambda name: server.base / "output" / "guidance_data" / name


@pytest.fixture
def network_folder(server):
    return server.base / "models" / "guidance_networks"


def collected(graph, family, folder, batch=4, node="collect", **options):
    """Adds the loaders, a reward and Collect Guidance Data; the link to its data."""
    one = FAMILIES[family]
    for name, (kind, inputs) in one.loaders.items():
        graph.add(name, kind, **inputs)
    latent = graph.add("sizes", one.latent, width=64, height=64, batch_size=batch, **one.latent_options)
    sampling = {"seed": 5, "steps": 1, "cfg": one.cfg, "sampler_name": "euler", "scheduler": "simple"}
    links = {"model": one.model, "clip": one.clip, "vae": one.vae, "latent_image": latent}
    asked = {"prompts": PROMPTS, "count": COUNT, "levels": 2, "folder": folder} | with_reward(graph, options)
    return graph.add(node, "RewardGuidanceCollect", **links | sampling | asked)


def trained(graph, data, node="train", **options):
    return graph.add(node, "RewardGuidanceTrain", data=data, **{"steps": 12, "batch": 4, "size": "small"} | options)


def shown(graph, link, node):
    graph.add(node, "PreviewAny", source=link)


def collect(bench, family, folder, **options):
    graph = Graph()
    collected(graph, family, folder, **options)
    shown(graph, ["collect", 1], "report")
    return bench.queue(graph.prompt)


def report(result, node="report"):
    return result.outputs[node]["text"][0].splitlines()


def train(bench, folder, save=None, build=lambda graph: None, **options):
    """From samples on disk."""
    graph = Graph()
    data = build(graph) or graph.add("data", "RewardGuidanceLoadData", folder=folder)
    network = trained(graph, data, **options)
    shown(graph, ["train", 1], "report")
    if save:
        graph.add("save_network", "RewardGuidanceSaveNetwork", network=network, filename_prefix=save)
    return bench.queue(graph.prompt)


def applied(name, node="apply", **options):
    """A way of sampling: the stock KSampler on a model to which a network from disk is applied."""

    def build(graph, inputs):
        network = graph.add(f"{node}_network", "RewardGuidanceLoadNetwork", network_name=name)
        model = graph.add(node, "RewardGuidanceApplyNetwork", model=inputs["model"], network=network, **options)
        return stock(graph, inputs | {"model": model})

    return build


def boxed(name, **options):
    """The same in one box."""

    def build(graph, inputs):
        network = graph.add("network", "RewardGuidanceLoadNetwork", network_name=name)
        return graph.add("sampler", "RewardGuidanceKSamplerNetwork", network=network, **inputs, **options)

    return build


@pytest.fixture(scope="module")
def networks(bench, clean):
    """Trained networks of the families that a test asks for: the name of the file."""
    made = {}

    def network_of(family, **options):
        key = f"{family}{''.join(f'_{value}' for value in options.values())}"
        if key not in made:
            assert collect(bench, family, key, **options).check()
            assert train(bench, key, save=f"tests/{key}").check()
            made[key] = f"tests/{key}_00001_.safetensors"
        return made[key]

    return network_of


# From a model to guided pictures


@pytest.mark.parametrize("family", ["sd15", "sd3", "flux", "wan"])
def test_collect_train_save_load_and_apply(bench, data_folder, network_folder, family):
    folder, seed = f"whole_{family}", next(SEEDS)

    def at_once(graph, inputs):
        network = trained(graph, collected(graph, family, folder))
        graph.add("save_network", "RewardGuidanceSaveNetwork", network=network, filename_prefix=folder)
        shown(graph, ["collect", 1], "collected")
        shown(graph, ["train", 1], "trained")
        return stock(graph, inputs | {"model": graph.add("apply", "RewardGuidanceApplyNetwork", model=inputs["model"], network=network)})

    result = bench.run(latents(family, at_once, seed=seed))
    guided = bench.latent(result)
    assert report(result, "collected")[0] == f"{COUNT} samples of 3 prompts in {folder}"
    assert report(result, "collected")[1].startswith("brightness: ")
    assert "brightness at temperature 1" in report(result, "trained")[0]
    assert not list(data_folder(folder).glob("training-*")), "what is done needs no checkpoint"
    _, card = load_network(network_folder / f"{folder}_00001_.safetensors")
    assert (card.samples, card.steps, card.form) == (COUNT, 12, "correction")

    assert guided.isfinite().all()
    assert distance(guided, bench.sample(family, stock, seed=seed)) > 1e-4
    for way in (applied, boxed):
        assert distance(guided, bench.sample(family, way(f"{folder}_00001_.safetensors"), seed=seed)) < 1e-5
