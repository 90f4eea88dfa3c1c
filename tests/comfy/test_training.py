"""Collect, train, save, load and apply, queued as a user's page queues them."""

import dataclasses
import json
import math
import os
import shutil

import pytest
import torch
from reward_guidance.guidance.data.collection import SHARD, Collection
from reward_guidance.guidance.network.file import load_network, save_network
from reward_guidance.guidance.training.loop import fit
from reward_guidance.guidance.training.recipe import plan_for, prepare
from reward_guidance.tests.harness.graphs import FAMILIES, LORA, Graph
from reward_guidance.tests.harness.guided import (
    broken,
    distance,
    guided_model,
    latents,
    seeds_of,
    statistic,
    stock,
    two_nodes,
    under_control,
    with_reward,
)
from safetensors.torch import load_file, save_file

SEEDS = seeds_of(__file__)
PROMPTS = "a red circle\n\n  a blue square \na red circle on a green ground\n"
COUNT = 6
CHECKPOINT = "training-*.checkpoint"


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


def collected(graph, family, folder, batch=6, node="collect", **options):
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


def train(bench, *given, **options):
    return bench.queue(prompt_of_training(*given, **options))


def prompt_of_training(folder, save=None, build=lambda graph: None, **options):
    """From samples on disk, if nothing else is built."""
    graph = Graph()
    data = build(graph) or graph.add("data", "RewardGuidanceLoadData", folder=folder)
    network = trained(graph, data, **options)
    shown(graph, ["train", 1], "report")
    if save:
        graph.add("save_network", "RewardGuidanceSaveNetwork", network=network, filename_prefix=save)
    return graph.prompt


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

    def network_of(family, **options):
        key = f"{family}{''.join(f'_{value}' for value in options.values())}"
        name = f"tests/{key}_00001_.safetensors"
        if not (clean / "models" / "guidance_networks" / name).exists():
            collect(bench, family, key, **options).check()
            train(bench, key, save=f"tests/{key}").check()
        return name

    return network_of


# From a model to guided pictures


@pytest.mark.parametrize("family", ["sd15", "sd2", "sdxl", "sd3", "flux", "wan"])
def test_collect_train_save_load_and_apply(bench, data_folder, network_folder, family):
    seed = next(SEEDS)

    def at_once(graph, inputs):
        network = trained(graph, collected(graph, family, family))
        graph.add("save_network", "RewardGuidanceSaveNetwork", network=network, filename_prefix=f"tests/{family}")
        shown(graph, ["collect", 1], "collected")
        shown(graph, ["train", 1], "trained")
        return stock(
            graph,
            inputs
            | {"model": graph.add("apply", "RewardGuidanceApplyNetwork", model=inputs["model"], network=network)},
        )

    result = bench.run(latents(family, at_once, seed=seed))
    guided = bench.latent(result)
    assert report(result, "collected")[0] == f"{COUNT} samples of 3 prompts in {family}"
    assert report(result, "collected")[1].startswith("brightness: ")
    assert "brightness at temperature 1" in report(result, "trained")[0]
    assert not list(data_folder(family).glob(CHECKPOINT)), "what is done needs no checkpoint"
    _, card = load_network(network_folder / f"tests/{family}_00001_.safetensors")
    assert (card.samples, card.steps, card.form) == (COUNT, 12, "potential")

    assert guided.isfinite().all()
    assert distance(guided, bench.sample(family, stock, seed=seed)) > 1e-4
    for way in (applied, boxed):
        assert distance(guided, bench.sample(family, way(f"tests/{family}_00001_.safetensors"), seed=seed)) < 1e-5


def test_what_is_off_changes_not_one_bit(bench, networks):
    seed = next(SEEDS)
    plain = bench.sample("flux", stock, seed=seed)
    for way in (applied, boxed):
        for off in ({"strength": 0.0}, {"start_percent": 0.4, "end_percent": 0.4}):
            assert distance(bench.sample("flux", way(networks("flux"), **off), seed=seed), plain) == 0


def test_files_are_never_overwritten(bench, networks, network_folder):
    name = networks("flux")
    graph = Graph()
    network = graph.add("network", "RewardGuidanceLoadNetwork", network_name=name)
    shown(graph, ["network", 1], "report")
    for node, prefix in (
        ("one", "tests/flux"),
        ("other", "tests/../tests/flux"),
    ):  # of two equal nodes ComfyUI would run one
        graph.add(node, "RewardGuidanceSaveNetwork", network=network, filename_prefix=prefix)
    result = bench.run(graph.prompt)
    paths = [network_folder / name.replace("00001", number) for number in ("00001", "00002", "00003")]
    (first, card), *others = map(load_network, paths)
    for network, same_card in others:
        assert same_card == card and all(
            torch.equal(value, first.state_dict()[name]) for name, value in network.state_dict().items()
        )
    assert result.outputs["one"]["text"][0].startswith(str(paths[1].parent))
    assert report(result)[0].startswith("potential network for Flux: 1 brightness")


# What is collected


def test_samples_are_those_of_a_stock_ksampler(bench, data_folder):
    collect(bench, "flux", "stock", batch=2, count=5).check()
    loaded = Collection.open(data_folder("stock")).load()
    prompts = [line.strip() for line in PROMPTS.splitlines() if line.strip()]
    assert loaded.description.prompts == tuple(prompts)
    clean, text = loaded.clean[torch.arange(5)].float(), loaded.text[torch.arange(3)]
    for i in (0, 4):
        alone = bench.sample("flux", stock, seed=5 + i, steps=1, text=prompts[i % 3])
        torch.testing.assert_close((alone[0] - 0.1159) * 0.3611, clean[i], rtol=2e-3, atol=2e-3)
    assert loaded.sigma.shape == (5, 2) and (loaded.sigma[:, 0] > loaded.sigma[:, 1]).all()
    assert (
        loaded.denoised[torch.arange(5)].isfinite().all()
        and text.tokens.shape[::2] == (3, 768)
        and text.pooled.shape == (3, 768)
    )


def test_a_larger_count_adds_to_what_is_there(bench, data_folder):
    assert report(collect(bench, "flux", "more", count=4).check())[0].startswith("4 samples")
    first = data_folder("more") / "shard-00000.safetensors"
    written = first.stat().st_mtime_ns
    assert report(collect(bench, "flux", "more", count=3, keep_images=True).check())[0].startswith("4 samples")
    assert first.stat().st_mtime_ns == written and not (data_folder("more") / "images").exists()
    assert report(collect(bench, "flux", "more", count=6, keep_images=True).check())[0].startswith("6 samples")
    assert len(list((data_folder("more") / "images").glob("*.png"))) == 6


def combined(weights):
    def build(graph):
        parts = {f"reward_{i}": statistic(name, name)(graph) for i, name in enumerate(("brightness", "contrast"), 1)}
        return graph.add("combined", "RewardGuidanceCombineRewards", **parts, weight_1=weights[0], weight_2=weights[1])

    return build


def test_parts_of_a_combination_are_kept_and_weighted_later(bench, data_folder):
    options = {"count": 6, "reward": combined((1.0, -1.0))}
    lines = report(collect(bench, "flux", "parts", **options).check())
    assert [line.split(":")[0] for line in lines[1:3]] == ["brightness", "contrast"]
    shard = data_folder("parts") / "shard-00000.safetensors"
    written = shard.stat().st_mtime_ns
    collect(bench, "flux", "parts", **options | {"reward": combined((0.0 + 1, 0.5))}).check()
    assert shard.stat().st_mtime_ns == written
    weights = Collection.open(data_folder("parts")).description.reward_weights
    assert weights[1] == pytest.approx(weights[0] / 2)
    assert "1 brightness + 3 contrast" in report(train(bench, "parts", reward_weights="1, 3").check())[0]


@pytest.mark.parametrize("family", ["wan"])
def test_frames_of_videos_are_kept(bench, data_folder, family):
    collect(bench, family, "frames", count=1, keep_images=True).check()
    assert len(list((data_folder("frames") / "images").glob("000000_*.png"))) == 5


# What is trained


def from_model(folder, **options):
    """Data from Collect Guidance Data, which brings the model."""
    return lambda graph: collected(graph, "flux", folder, **options)


@pytest.mark.parametrize("options", [{"form": "shift"}, {"objective": "potential"}, {"objective": "reward_gradient"}])
def test_every_objective_and_form_makes_a_network_that_guides(bench, networks, options):
    networks("flux")
    name = "_".join(options.values())
    result = train(bench, "flux", save=name, build=from_model("flux"), steps=4, **options).check()
    assert result.outputs["save_network"]
    seed = next(SEEDS)
    guided, plain = (
        bench.sample("flux", way, seed=seed) for way in (applied(f"{name}_00001_.safetensors", strength=5.0), stock)
    )
    assert guided.isfinite().all() and distance(guided, plain) > 1e-5


def test_the_gradient_objective_follows_the_weights(bench, networks, network_folder):
    """Of opposite weights, the first step goes opposite ways."""
    networks("flux")
    heads = []
    for weight in ("1", "-1"):
        options = {"objective": "reward_gradient", "steps": 1, "reward_weights": weight, "seed": 0}
        train(bench, "flux", save=f"weighted{weight}", build=from_model("flux"), **options).check()
        heads.append(load_network(network_folder / f"weighted{weight}_00001_.safetensors")[0].head.bias)
    assert heads[0].any() and torch.equal(heads[0], -heads[1])


def test_the_page_hears_how_a_training_goes(bench, networks):
    networks("flux")
    seed = next(SEEDS)
    result = train(bench, "flux", steps=25, seed=seed).check()
    events = result.of("reward_guidance.step")
    assert [event["step"] for event in events] == list(range(1, 26)) and {event["steps"] for event in events} == {25}
    assert [event["index"] for event in events] == list(range(25)) and {event["node"] for event in events} == {"train"}
    assert len({event["run"] for event in events}) == 1 and {tuple(event["scattered"]) for event in events} == {()}
    assert {len(event["series"]["loss"]) for event in events} == {1} and all(
        0 < event["effective"] <= 1 for event in events
    )
    assert [event["step"] for event in events if "loss/held-out" in event["series"]] == [10, 20, 25]
    again = train(bench, "flux", steps=25, seed=seed).check()
    assert not again.of("reward_guidance.step"), "what is done comes from ComfyUI's cache"
    bars = [data["value"] for data in result.of("progress") if data["node"] == "train"]
    assert bars[-1] == 25 and bars == sorted(bars)


@pytest.mark.parametrize(("family", "form"), [("flux", "correction"), ("sd15", "shift")])
def test_previews_show_what_has_been_learned(bench, networks, family, form):
    """Also between steps that go back through the model, some of whose own work is in place."""
    networks(family)
    options = {"build": lambda graph: collected(graph, family, family), "steps": 12, "seed": next(SEEDS), "form": form}
    told = [train(bench, family, **options, preview_every=every).check() for every in (5, 0)]
    assert [len(result.of("preview")) for result in told] == [1, 0], "there is one only after the first look"
    rewards = [
        [event["series"]["reward"] for event in result.of("reward_guidance.step") if "reward" in event["series"]]
        for result in told
    ]
    assert (
        [len(each) for each in rewards] == [1, 0] and len(rewards[0][0]) == 4 and all(map(math.isfinite, rewards[0][0]))
    )
    assert report(told[0]) == report(told[1])


# Whatever stops it


def begin(folder, seed, checkpoints=None, steps=20):
    """The training of a node with otherwise the defaults of `trained`, outside of ComfyUI."""
    samples = Collection.open(folder).load()
    return prepare(
        samples, plan_for(samples.description, steps=steps, batch=4, seed=seed), "small", checkpoints=checkpoints
    )


LONG = SHARD + 8


def test_an_interrupted_collection_keeps_whole_shards_and_goes_on(bench, data_folder):
    def stop(kind, data):
        if kind == "progress" and data["node"] == "collect" and data["value"] > 3 * SHARD + 4:
            bench.client.interrupt()

    options = {"count": LONG, "batch": 16}
    graph = Graph()
    collected(graph, "flux", "stopped", **options)
    stopped = bench.queue(graph.prompt, on_event=stop)
    assert stopped.error == "interrupted"
    assert stopped.of("text")[-1] == {
        "node": "collect",
        "text": f"{SHARD} of {LONG} samples are on disk; queue again to continue",
    }
    assert [path.name for path in data_folder("stopped").glob("shard-*")] == ["shard-00000.safetensors"]
    written = (data_folder("stopped") / "shard-00000.safetensors").stat().st_mtime_ns
    assert report(collect(bench, "flux", "stopped", **options).check())[0].startswith(f"{LONG} samples")
    assert (data_folder("stopped") / "shard-00000.safetensors").stat().st_mtime_ns == written


TAKEN = {
    "the description": (lambda folder: (folder / "collection.json").unlink(), None),
    "all": (shutil.rmtree, "taken was deleted or moved while its samples were collected: queue again"),
    "the text": (
        lambda folder: (folder / "prompts.safetensors").unlink(),
        "prompts.safetensors in taken is missing or damaged: collect again",
    ),
    "samples": (
        lambda folder: (folder / "shard-00000.safetensors").unlink(),
        "Samples in taken were deleted while more were collected: queue again",
    ),
}


@pytest.mark.parametrize(("take", "said"), TAKEN.values(), ids=TAKEN)
def test_what_is_taken_away_while_it_is_collected_is_no_success(bench, data_folder, take, said):
    """Or is put back. Queued again, all is there."""
    folder, left = data_folder("taken"), [take]
    shutil.rmtree(folder, ignore_errors=True)

    def act(kind, data):
        if kind == "progress" and data["node"] == "collect" and data["value"] > 3 * SHARD + 4 and left:
            left.pop()(folder)

    graph = Graph()
    collected(graph, "flux", "taken", count=LONG, batch=16, seed=next(SEEDS))
    result = bench.queue(graph.prompt, on_event=act)
    assert result.error is None if said is None else said in result.error
    bench.queue(graph.prompt).check()
    assert len(Collection.open(folder).load()) == LONG


def test_a_shard_that_was_exchanged_is_seen_although_its_time_is_the_same(bench, networks, data_folder):
    networks("flux")
    shutil.copytree(data_folder("flux"), data_folder("exchanged"))
    graph = Graph()
    graph.add("data", "RewardGuidanceLoadData", folder="exchanged")
    shown(graph, ["data", 1], "report")
    before = report(bench.queue(graph.prompt).check())
    path = data_folder("exchanged") / "shard-00000.safetensors"
    status, parts = path.stat(), load_file(path)
    save_file(parts | {"scores": parts["scores"] + 1}, path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert report(bench.queue(graph.prompt).check())[1] != before[1]


def test_an_interrupted_training_returns_its_best_and_goes_on(bench, networks, data_folder, network_folder):
    networks("flux")
    prompt = prompt_of_training("flux", "best", steps=5000, seed=next(SEEDS))
    steps = []
    for number in (1, 2):
        stopped = bench.queue(prompt, on_event=once(bench.client.interrupt))
        assert stopped.error is None and stopped.outputs["save_network"], "what comes after it runs"
        (line,) = (line for line in report(stopped) if line.startswith("stopped at step"))
        steps.append(int(line.split()[3]))
        assert load_network(network_folder / f"best_0000{number}_.safetensors")[1].steps == steps[-1] < 5000
        assert len(list(data_folder("flux").glob(CHECKPOINT))) == 1
    assert stopped.of("reward_guidance.step")[0]["step"] > steps[0] and steps[1] > steps[0]
    without = prompt_of_training("flux", steps=5000, seed=next(SEEDS), checkpoint=False)
    for _ in range(2):
        again = bench.queue(without, on_event=once(bench.client.interrupt))
        assert any(line.startswith("stopped") for line in report(again))
        assert again.of("reward_guidance.step")[0]["step"] == 1, "it begins anew"
    assert len(list(data_folder("flux").glob(CHECKPOINT))) == 1
    for left in data_folder("flux").glob(CHECKPOINT):
        left.unlink()


def once(act):
    """Something to do when a training is under way."""
    done = []

    def on_event(kind, data):
        if kind == "progress" and data["node"] == "train" and not done:
            done.append(act())

    return on_event


def test_a_training_whose_process_was_killed_goes_on_bit_for_bit(bench, networks, data_folder, network_folder):
    """Killed after its first checkpoint, in another process; the node's settings are those of the command line."""
    networks("flux")
    seed = next(SEEDS)
    begun = begin(data_folder("flux"), seed, data_folder("flux")).training
    for progress in begun:
        if progress.step == 13:
            break
    assert begun.checkpoint.exists()
    result = train(bench, "flux", save="killed", steps=20, seed=seed).check()
    assert result.of("reward_guidance.step")[0]["step"] == 11
    expected = fit(begin(data_folder("flux"), seed).training).state_dict()
    resumed = load_network(network_folder / "killed_00001_.safetensors")[0].state_dict()
    assert all(torch.equal(value, resumed[name]) for name, value in expected.items())


# Noise, for one-step generators


@pytest.fixture(scope="module")
def noise_network(networks):
    return networks("flux", target="noise")


def from_noise(name, **options):
    """SamplerCustomAdvanced with Guided Noise, or with RandomNoise if there is no network."""

    def build(graph, inputs):
        seed = {"noise_seed": inputs["seed"]}
        noise = graph.add("noise", "RandomNoise", **seed)
        if name:
            network = graph.add("network", "RewardGuidanceLoadNetwork", network_name=name)
            noise = graph.add(
                "noise",
                "RewardGuidanceNoise",
                network=network,
                conditioning=inputs["positive"],
                seed=inputs["seed"],
                **{"steps": 4} | options,
            )
        guider = graph.add("guider", "BasicGuider", model=inputs["model"], conditioning=inputs["positive"])
        sampler = graph.add("select", "KSamplerSelect", sampler_name=inputs["sampler_name"])
        sigmas = graph.add(
            "sigmas",
            "BasicScheduler",
            model=inputs["model"],
            **{key: inputs[key] for key in ("scheduler", "steps", "denoise")},
        )
        links = {
            "noise": noise,
            "guider": guider,
            "sampler": sampler,
            "sigmas": sigmas,
            "latent_image": inputs["latent_image"],
        }
        return graph.add("sampler", "SamplerCustomAdvanced", **links)

    return build


def test_noise_is_what_a_stock_ksampler_begins_with(noise_network, data_folder):
    loaded = Collection.open(data_folder("flux_noise")).load()
    assert loaded.description.base.target == "noise" and loaded.sigma.shape == (COUNT, 0)
    for i in (0, COUNT - 1):
        expected = torch.randn((1, 16, 8, 8), generator=torch.Generator().manual_seed(5 + i))[0]
        torch.testing.assert_close(loaded.clean[torch.tensor([i])][0].float(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("family", "batch"), [("flux", 1), ("flux", 3), ("sd2", 1)])
def test_one_box_and_guided_noise_are_alike(bench, networks, family, batch):
    """SD2's format is that of SD-Turbo."""
    network, options = networks(family, target="noise"), {"seed": next(SEEDS), "steps": 1, "batch": batch, "cfg": 1.0}
    box, parts, plain = (bench.sample(family, way, **options) for way in (boxed(network), from_noise(network), stock))
    assert distance(box, parts) == 0 and box.shape[0] == batch
    assert distance(box, plain) > 1e-4
    for off in (boxed(network, strength=0.0), from_noise(network, strength=0.0), from_noise(None)):
        assert distance(bench.sample(family, off, **options), plain) == 0


def test_noise_follows_a_gradient_through_the_generator(bench, noise_network, network_folder):
    """By itself, where there is one; 4 pictures of a step in parts of 3."""
    data = lambda graph: collected(graph, "flux", "flux_noise", batch=3, target="noise")  # noqa: E731
    train(bench, "flux_noise", save="leap", build=data, temperature=0.05).check()
    forms = [load_network(network_folder / name)[1].form for name in ("leap_00001_.safetensors", noise_network)]
    assert forms == ["leap", "noise"]
    seed = next(SEEDS)
    ways = boxed("leap_00001_.safetensors"), from_noise("leap_00001_.safetensors", steps=9), stock
    box, parts, plain = (bench.sample("flux", way, seed=seed, steps=1) for way in ways)
    assert distance(box, parts) == 0 and distance(box, plain) > 1e-4


# Together with everything else


@pytest.mark.parametrize(("family", "cfg"), [("sd15", 1.0), ("sd3", 1.0), ("flux", 4.0)])
def test_other_scales_of_classifier_free_guidance(bench, networks, family, cfg):
    seed = next(SEEDS)
    guided, plain = (
        bench.sample(family, way, seed=seed, cfg=cfg) for way in (applied(networks(family), strength=5.0), stock)
    )
    assert guided.isfinite().all() and distance(guided, plain) > 1e-4


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_reward_guidance_beside_it(bench, networks, first):
    name, by_reward = networks("flux"), {"decoder": "latent_rgb"}

    def both(graph, inputs):
        network = graph.add("network", "RewardGuidanceLoadNetwork", network_name=name)
        model = inputs["model"] if first else guided_model(graph, inputs["model"], **by_reward)
        model = graph.add("apply", "RewardGuidanceApplyNetwork", model=model, network=network, strength=5.0)
        return stock(graph, inputs | {"model": guided_model(graph, model, **by_reward) if first else model})

    options = {"seed": next(SEEDS), "steps": 3}
    result = bench.run(latents("flux", both, count_calls=True, **options))
    assert result.model_calls == 3 and len(result.of("reward_guidance.step")) == 3
    for alone in (applied(name, strength=5.0), two_nodes(**by_reward)):
        assert distance(bench.latent(result), bench.sample("flux", alone, **options)) > 1e-4


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_a_lora_beside_it(bench, networks, first):
    name = networks("flux")

    def both(graph, inputs):
        load = lambda model: graph.add("lora", "LoraLoaderModelOnly", model=model, lora_name=LORA, strength_model=1.0)  # noqa: E731
        if first:
            return applied(name, strength=5.0)(graph, inputs | {"model": load(inputs["model"])})
        network = graph.add("network", "RewardGuidanceLoadNetwork", network_name=name)
        model = graph.add("apply", "RewardGuidanceApplyNetwork", model=inputs["model"], network=network, strength=5.0)
        return stock(graph, inputs | {"model": load(model)})

    seed = next(SEEDS)
    together, alone = (
        bench.sample("flux", both, seed=seed),
        bench.sample("flux", applied(name, strength=5.0), seed=seed),
    )
    assert together.isfinite().all() and distance(together, alone) > 1e-3


def test_a_controlnet_beside_it(bench, networks):
    name, seed = networks("sd15"), next(SEEDS)
    controlled, alone = (
        bench.sample("sd15", way, seed=seed)
        for way in (under_control(applied(name, strength=5.0)), under_control(stock))
    )
    assert controlled.isfinite().all() and distance(controlled, alone) > 1e-4
    assert distance(controlled, bench.sample("sd15", applied(name, strength=5.0), seed=seed)) > 1e-4


# What goes wrong


def prompt_of_collecting(folder, family="flux", build=collected, **options):
    graph = Graph()
    build(graph, family, folder, **options)
    return graph.prompt


@pytest.fixture(scope="module")
def few(bench, clean):
    """A folder with a few samples."""
    collect(bench, "flux", "few", count=6).check()
    return "few"


OTHERS = {
    "another model's": ({"family": "sd3"}, "few holds other samples: model was Flux and is now SD3"),
    "another shape": (
        {"size": 128},
        "shape was (16, 8, 8) and is now (16, 8, 16). Choose another folder, or restore that setting",
    ),
    "other prompts": ({"prompts": "a cat"}, "prompts was a red circle and is now a cat"),
    "another seed": ({"seed": 6}, "few holds other samples: seed was 5 and is now 6. Choose another folder"),
    "another way of sampling": ({"steps": 2}, "settings was 1 steps and is now 2 steps"),
    "another reward": ({"reward": statistic("contrast")}, "rewards was brightness and is now contrast"),
    "other levels": ({"levels": 3}, "levels was 2 and is now 3"),
    "another use": ({"target": "noise"}, "target was data and is now noise"),
}


@pytest.mark.parametrize(("change", "words"), OTHERS.values(), ids=OTHERS)
def test_samples_of_two_kinds_are_not_mixed(refused, few, data_folder, change, words):
    before = sorted(path.name for path in data_folder(few).iterdir())
    options = {"family": "flux"} | change
    size = options.pop("size", 64)
    prompt = prompt_of_collecting(few, **options)
    prompt["sizes"]["inputs"]["width"] = size
    refused(prompt, words)
    assert sorted(path.name for path in data_folder(few).iterdir()) == before


def test_a_patched_model_is_another_model(refused, few):
    refused(
        prompt_of_collecting(few, build=lora(LORA)),
        "flux1-dev.safetensors and is now flux1-dev.safetensors with 1 patches of strength 1",
    )


def likeness(colour):
    def build(graph):
        picture = graph.add("ref", "EmptyImage", width=64, height=64, batch_size=1, color=colour)
        return graph.add("reward", "RewardGuidanceImageSimilarity", image=picture, likeness="colour")

    return build


def between(node, **options):
    """Collects from a model that goes through a node."""

    def build(graph, *given, **others):
        data = collected(graph, *given, **others)
        inputs = graph.prompt["collect"]["inputs"]
        inputs["model"] = graph.add("between", node, model=inputs["model"], **options)
        return data

    return build


def lora(name):
    return between("LoraLoaderModelOnly", lora_name=name, strength_model=1.0)


def decoded_by(name):
    def build(graph, *given, **options):
        data = collected(graph, *given, **options)
        graph.prompt["collect"]["inputs"]["vae"] = graph.add("decoder", "VAELoader", vae_name=name)
        return data

    return build


OTHER = "other.safetensors"


@pytest.fixture
def other_files(server):
    """A LoRA and a decoder like those that are there, with some weights turned round."""
    made = []
    for folder, name in (("loras", LORA), ("vae", "ae.safetensors")):
        path = server.base / "models" / folder / name
        turned = {
            part: -value if "up" in part or "conv_out" in part else value for part, value in load_file(path).items()
        }
        made.append(path.with_name(OTHER))
        save_file({part: value.contiguous() for part, value in turned.items()}, made[-1])
    yield
    for path in made:
        path.unlink()


SAME_NAMES = {
    "another colour": (
        {"reward": statistic("colour", colour="#ff0000")},
        {"reward": statistic("colour", colour="#0000ff")},
        "mean colour #ff0000 and is now mean colour #0000ff",
    ),
    "another picture": ({"reward": likeness(0xFF0000)}, {"reward": likeness(0x0000FF)}, "settings was colour likeness"),
    "another decoder": ({}, {"build": decoded_by(OTHER)}, "the score of sample"),
    "another LoRA": ({"build": lora(LORA)}, {"build": lora(OTHER)}, "predictions differ by"),
    "other noise levels": (
        {"build": between("ModelSamplingFlux", max_shift=1.15, base_shift=0.5, width=64, height=64)},
        {"build": between("ModelSamplingFlux", max_shift=4.0, base_shift=0.5, width=64, height=64)},
        "the model's noise levels have changed",
    ),
}


@pytest.mark.parametrize(("first", "then", "words"), SAME_NAMES.values(), ids=SAME_NAMES)
def test_what_has_the_same_name_and_makes_other_samples_is_refused(
    bench, refused, data_folder, other_files, request, first, then, words
):
    """Whatever the settings say: what is there already is looked at again, when it is complete and when more is to come."""
    folder = request.node.callspec.id.replace(" ", "-")
    bench.queue(prompt_of_collecting(folder, **first)).check()
    scores = Collection.open(data_folder(folder)).load().scores
    bench.queue(prompt_of_collecting(folder, **first, count=COUNT + 2)).check()
    for count in (COUNT + 2, COUNT + 4):
        refused(prompt_of_collecting(folder, **then, count=count), words)
    assert torch.equal(Collection.open(data_folder(folder)).load().scores[:COUNT], scores)


def test_a_truncated_shard_is_named_and_collected_again(bench, refused, data_folder):
    collect(bench, "flux", "truncated", count=5).check()
    shard = data_folder("truncated") / "shard-00000.safetensors"
    whole = shard.read_bytes()
    os.truncate(shard, 3000)
    refused(
        prompt_of_training("truncated", seed=next(SEEDS)),
        "shard-00000.safetensors in truncated is damaged: collect again, which replaces only that shard",
    )
    collect(bench, "flux", "truncated", count=5).check()
    assert shard.read_bytes() == whole


def test_a_shard_of_another_collection_is_named(refused, few, data_folder, tmp_path):
    shard = data_folder(few) / "shard-00000.safetensors"
    kept = shard.read_bytes()
    parts = load_file(shard)
    save_file(parts | {"clean": parts["clean"][..., :4].contiguous()}, shard)
    refused(
        prompt_of_training(few, seed=next(SEEDS)),
        "shard-00000.safetensors in few belongs to another collection: move it away",
    )
    shard.write_bytes(kept)


def test_samples_that_are_all_liked_alike(refused, bench, data_folder):
    text = report(collect(bench, "flux", "alike", count=4, reward=broken("flat")).check())
    assert "have the same reward for their prompt: there is nothing to learn from them" in text[-1]
    refused(prompt_of_training("alike"), "All 4 samples have the same reward for their prompt")


def test_rewards_that_are_no_numbers(refused, data_folder):
    refused(
        prompt_of_collecting("nan", reward=broken("nan")),
        "returned a score that is not a finite number",
        "seed 5 of the prompt 'a red circle'",
    )
    assert not list(data_folder("nan").glob("shard-*"))


def test_a_picture_that_cannot_be_scored_is_left_out(bench, data_folder):
    """It does not end a collection, however often that is queued."""
    lines = report(collect(bench, "flux", "one", reward=broken("nan now and then")).check())
    loaded = Collection.open(data_folder("one")).load()
    assert 0 < loaded.unscored < COUNT and len(loaded.scores) + loaded.unscored == COUNT
    assert (
        lines[0]
        == f"{len(loaded.scores)} samples of 3 prompts in one; {loaded.unscored} more could not be scored and are left out"
    )
    assert report(train(bench, "one").check())[1].startswith(f"{len(loaded.scores)} samples")


@pytest.mark.parametrize("gone", ["shard-00000.safetensors", "prompts.safetensors", ""])
def test_what_was_deleted_is_collected_again_although_nothing_was_changed(bench, data_folder, gone):
    """ComfyUI would take the node from its cache."""
    collect(bench, "flux", "gone").check()
    path = data_folder("gone") / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    collect(bench, "flux", "gone").check()
    assert len(Collection.open(data_folder("gone")).load().numbers) == COUNT


def test_a_finished_training_is_not_repeated(bench):
    """Collecting leaves the folder changed, and the second run finds all in ComfyUI's cache nevertheless."""
    prompt = prompt_of_training("again", build=lambda graph: collected(graph, "flux", "again"), seed=next(SEEDS))
    assert [bool(bench.queue(prompt).check().of("reward_guidance.step")) for _ in range(2)] == [True, False]


def test_rewards_read_plain_prompts_which_are_kept_as_they_are_typed(bench, data_folder, clip_reward):
    typed = {"plain": "a red circle", "weighted": "a (red:1.0) circle <lora:none:1>"}
    options = {"reward": clip_reward, "target": "noise", "count": 2, "batch": 2}
    reports = {
        name: report(collect(bench, "flux", name, prompts=text, **options).check()) for name, text in typed.items()
    }
    assert reports["weighted"][-2:] == [
        "The reward does not read ComfyUI's syntax in 1 of 1 prompts. For example:", "The reward reads 'a red circle'."
    ]  # fmt: skip
    assert not any("The reward reads" in line for line in reports["plain"])
    assert [Collection.open(data_folder(name)).description.prompts for name in typed] == [
        (text,) for text in typed.values()
    ]


def test_an_empty_batch_has_no_size_to_collect(refused):
    def empty(graph, *given, **options):
        data = collected(graph, *given, **options)
        graph.prompt["collect"]["inputs"]["latent_image"] = [graph.add("empty", "ProbeEmptyBatch")[0], 1]
        return data

    refused(prompt_of_collecting("nothing", build=empty), "There is no latent: the batch is empty")


def test_a_gradient_objective_needs_a_gradient(refused, few):
    data = lambda graph: collected(graph, "flux", few, count=6, reward=broken("no gradient"))  # noqa: E731
    refused(prompt_of_training(few, build=data, objective="reward_gradient"), "has no gradient")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_full_disk_loses_nothing(refused, few, data_folder, bench):
    """What is about to be written leads to a device without space."""
    images = data_folder(few) / "images"
    (images / "000001.png.partial").mkdir(parents=True)
    (images / "000001.png.partial" / "whole").symlink_to("/dev/full")
    refused(
        prompt_of_collecting(few, count=7, keep_images=True),
        "000001.png could not be written",
        "No space left on device",
        "continues from here",
    )
    assert report(collect(bench, "flux", few, count=6, keep_images=True).check())[0].startswith("6 samples")
    seed = next(SEEDS)
    checkpoint = begin(data_folder(few), seed, data_folder(few), steps=5000).training.checkpoint
    prompt = prompt_of_training(few, steps=5000, seed=seed)
    full = checkpoint.with_name(f"{checkpoint.name}.partial")
    full.write_bytes(b"")
    stopped = bench.queue(prompt, on_event=once(bench.client.interrupt))
    assert stopped.error is None and any(
        line.startswith("stopped") and "continues from there" not in line for line in report(stopped)
    )
    assert f"There is no checkpoint to continue from: {checkpoint.name} could not be written" in report(stopped)[-1]
    full.unlink()


@pytest.mark.parametrize("way", [applied, boxed])
def test_a_network_of_another_family(refused, networks, way):
    refused(
        latents("sd3", way(networks("flux")), seed=next(SEEDS)),
        "made for Flux, but the model is SD3: use one that was made for it",
    )


def test_a_network_of_the_same_latents_and_another_text_encoder(refused, networks):
    refused(latents("sd2", applied(networks("sd15")), seed=next(SEEDS)), "made for SD15, but the model is SD20")


def test_a_file_that_only_looks_like_a_network(refused, networks, network_folder):
    networks("flux")
    save_file({"weight": torch.ones(3)}, network_folder / "renamed.safetensors")
    refused(
        latents("flux", applied("renamed.safetensors"), seed=next(SEEDS)),
        "renamed.safetensors is not a guidance network",
    )


def test_a_network_for_another_use(refused, networks, noise_network):
    refused(latents("flux", applied(noise_network), seed=next(SEEDS)), "tilts noise, not data: use Guided Noise")
    refused(
        latents("flux", from_noise(networks("flux")), seed=next(SEEDS)),
        "tilts data, not noise: use Apply Guidance Network",
    )


WRONG = {
    "no prompt": ({"prompts": " \n "}, "There is no prompt: write one on each line"),
    "no folder": ({"folder": " "}, "is not a name for a folder in output/guidance_data"),
    "a long name": ({"folder": "x" * 300}, "is not a name for a folder in output/guidance_data: write a short one"),
    "no path at all": ({"folder": "a\0b"}, "is not a name for a folder in output/guidance_data"),
    "a folder outside": (
        {"folder": "../elsewhere"},
        "'../elsewhere' is not a name for a folder in output/guidance_data",
    ),
}


@pytest.mark.parametrize(("change", "words"), WRONG.values(), ids=WRONG)
def test_collections_that_make_no_sense(refused, change, words):
    options = {"folder": "nothing"} | change
    refused(prompt_of_collecting(options.pop("folder"), **options), words)


TRAININGS = {
    "weights": ({"reward_weights": "1, 2"}, "scores of brightness: give one weight for each reward, not 2 in all"),
    "no weights": ({"reward_weights": "one"}, "Weights are numbers separated by commas"),
    "weights that are no numbers": ({"reward_weights": "nan"}, "Weights must be finite numbers and not all 0, not nan"),
    "no weight": ({"reward_weights": "0"}, "Weights must be finite numbers and not all 0, not 0"),
    "two forms": (
        {"form": "shift", "objective": "potential"},
        "The objective potential has a form of its own: leave the form at correction",
    ),
    "a form without its model": ({"form": "shift"}, "The form shift needs the model that made the samples"),
    "a preview without its model": ({"preview_every": 1}, "A preview needs the model that made the samples"),
    "an objective without its reward": (
        {"objective": "reward_gradient"},
        "reward_gradient needs the model that made the samples",
    ),
}


@pytest.mark.parametrize(("change", "words"), TRAININGS.values(), ids=TRAININGS)
def test_trainings_that_make_no_sense(refused, few, change, words):
    refused(prompt_of_training(few, seed=next(SEEDS), **change), words)


@pytest.mark.parametrize("name", ["../stolen", "/tmp/stolen", "", "."])
def test_names_that_lead_out_of_the_folder(refused, networks, name):
    graph = Graph()
    network = graph.add("network", "RewardGuidanceLoadNetwork", network_name=networks("flux"))
    graph.add("save", "RewardGuidanceSaveNetwork", network=network, filename_prefix=name)
    refused(graph.prompt, "is not a name for a file in models/guidance_networks")


def test_a_network_whose_name_comes_from_another_node_is_remembered(bench, networks):
    graph = Graph()
    graph.add("name", "ProbeName", name=networks("flux"))
    graph.add("network", "RewardGuidanceLoadNetwork", network_name=["name", 0])
    graph.add("show", "PreviewAny", source=["network", 1])
    assert "network" in bench.run(graph.prompt).node_seconds
    assert set(bench.run(graph.prompt).node_seconds) == set()


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "replaced"])
def test_a_network_is_read_again_when_it_is_another(bench, networks, network_folder, in_place):
    """One of the same size and time."""
    file = network_folder / "same.safetensors"
    graph = Graph()
    graph.add("network", "RewardGuidanceLoadNetwork", network_name=file.name)
    graph.add("show", "PreviewAny", source=["network", 1])
    for samples in (111, 222):
        network, card = load_network(network_folder / networks("flux"))
        other = file.with_suffix(".new")
        save_network(other, network, dataclasses.replace(card, samples=samples))
        os.utime(other, ns=(10**18, 10**18))
        if in_place and file.exists():
            file.write_bytes(other.read_bytes())
            os.utime(file, ns=(10**18, 10**18))
        else:
            other.replace(file)
        (report,) = bench.run(graph.prompt).outputs["show"]["text"]
        assert f"{samples} samples" in report
    assert set(bench.run(graph.prompt).node_seconds) == set()


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "y" * 10**5], ids=["long", "null", "longer"])
def test_names_that_no_file_can_have(refused, networks, name):
    graph = Graph()
    network = graph.add("network", "RewardGuidanceLoadNetwork", network_name=networks("flux"))
    graph.add("save", "RewardGuidanceSaveNetwork", network=network, filename_prefix=name)
    refused(graph.prompt, "is not a name for a file in models/guidance_networks: write a short one")


def test_a_network_that_is_not_there(refused):
    graph = Graph()
    graph.add("name", "ProbeName", name="gone.safetensors")
    graph.add("network", "RewardGuidanceLoadNetwork", network_name=["name", 0])
    graph.add("show", "PreviewAny", source=["network", 1])
    refused(graph.prompt, "There is no guidance network 'gone.safetensors' in ")


@pytest.mark.parametrize(
    ("content", "words"), [(b"", "not a safetensors file"), (None, "an incomplete one")], ids=["empty", "truncated"]
)
def test_damaged_networks(refused, networks, network_folder, content, words):
    whole = (network_folder / networks("flux")).read_bytes()
    (network_folder / "damaged.safetensors").write_bytes(whole[:5000] if content is None else content)
    refused(latents("flux", applied("damaged.safetensors"), seed=next(SEEDS)), words)


def test_a_gradient_through_a_generator_of_several_steps(refused):
    data = lambda graph: collected(graph, "flux", "two_steps", target="noise", steps=2)  # noqa: E731
    prompt = prompt_of_training("two_steps", build=data, objective="reward_gradient")
    refused(prompt, "takes the gradient through one model call, and these samples were made with 2")


def test_samples_of_a_model_that_reward_guidance_patched(refused):
    def guided(graph, *given, **options):
        data = collected(graph, *given, **options)
        inputs = graph.prompt["collect"]["inputs"]
        inputs["model"] = guided_model(graph, inputs["model"], decoder="latent_rgb")
        return data

    refused(prompt_of_collecting("guided", build=guided), "connect it before Reward Guidance")


def test_a_folder_that_has_no_samples_yet(refused, data_folder):
    """As after an interrupt in the first shard."""
    data_folder("begun").mkdir(parents=True, exist_ok=True)
    shutil.copy(data_folder("few") / "collection.json", data_folder("begun"))
    refused(prompt_of_training("begun"), "begun holds no samples yet: collect some first")
    (data_folder("begun") / "collection.json").write_text(json.dumps({}))
    refused(prompt_of_training("begun", seed=next(SEEDS)), "collection.json in begun is damaged")
