"""UI workflows become the prompts that the page would queue."""

import json
import re
import shutil

import av
import pytest
from PIL import Image
from reward_guidance.tests.harness import graphs
from reward_guidance.tests.harness.environment import CHECKOUT
from reward_guidance.tests.harness.graphs import ui_to_api
from reward_guidance.tests.tools import thumbnails

WORKFLOWS = sorted((CHECKOUT / "workflows").glob("*.json"))
MODEL_FILES = (".safetensors", ".pt")


@pytest.fixture(scope="module")
def object_info(client):
    return client.object_info()


def node(number, kind, inputs=(), values=(), outputs=(), **more):
    sockets = [{"name": name, "type": type_, "link": link} for name, type_, link in inputs]
    slots = [{"type": type_} for type_ in outputs]
    return {"id": number, "type": kind, "inputs": sockets, "outputs": slots, "widgets_values": list(values), **more}


def test_values_find_their_widgets(object_info):
    sampler = node(3, "KSampler", [("model", "MODEL", 1)], [7, "randomize", 20, 4.5, "euler", "simple", 0.5])
    loader = node(1, "CheckpointLoaderSimple", (), ["a.ckpt"], ["MODEL", "CLIP", "VAE"])
    picture = node(4, "LoadImage", (), ["x.png", "image"])
    nodes = [loader, sampler, picture, node(9, "Note", (), ["text"])]
    prompt = ui_to_api({"nodes": nodes, "links": [[1, 1, 0, 3, 0, "MODEL"]]}, object_info)
    assert prompt["3"]["inputs"] == {
        "model": ["1", 0], "seed": 7, "steps": 20, "cfg": 4.5, "sampler_name": "euler", "scheduler": "simple", "denoise": 0.5,
    }  # fmt: skip
    assert prompt["4"]["inputs"] == {"image": "x.png"}
    assert set(prompt) == {"1", "3", "4"}


def test_links_pass_reroutes_and_bypassed_nodes_and_end_at_muted_ones(object_info):
    nodes = [
        node(1, "CheckpointLoaderSimple", (), ["a.ckpt"], ["MODEL", "CLIP", "VAE"]),
        node(2, "Reroute", [("", "*", 1)], (), ["MODEL"]),
        node(3, "ModelSamplingSD3", [("model", "MODEL", 2)], [3.0], ["MODEL"], mode=4),
        node(4, "PrimitiveNode", (), [11, "fixed"], ["INT"]),
        node(5, "EmptyLatentImage", (), [64, 64, 1], ["LATENT"], mode=2),
        node(
            6, "KSampler", [("model", "MODEL", 3), ("seed", "INT", 4), ("latent_image", "LATENT", 5)], [7, "fixed", 20]
        ),
    ]
    ends = [(1, 2), (2, 3), (3, 6), (4, 6), (5, 6)]
    links = [[number, origin, 0, target, 0, "*"] for number, (origin, target) in enumerate(ends, 1)]
    prompt = ui_to_api({"nodes": nodes, "links": links}, object_info)
    assert set(prompt) == {"1", "6"}
    assert prompt["6"]["inputs"]["model"] == ["1", 0]
    assert prompt["6"]["inputs"]["seed"] == 11
    assert "latent_image" not in prompt["6"]["inputs"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_shipped_workflow_is_sound(path, object_info):
    """Links agree at both ends, and every value has its widget."""
    workflow = json.loads(path.read_text())
    assert workflow["version"] == 0.4
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for link, origin, slot, target, socket, _ in workflow["links"]:
        assert link in nodes[origin]["outputs"][slot]["links"]
        assert nodes[target]["inputs"][socket]["link"] == link
    for node_ in ui_to_api(workflow, object_info).values():
        info = object_info[node_["class_type"]]
        assert set(node_["inputs"]) <= {name for group in info["input_order"].values() for name in group}
        assert set(info["input_order"].get("required", [])) <= set(node_["inputs"])


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_shipped_workflow_names_its_models(path):
    """Whatever file a loader has chosen comes with where to get it; networks come from another workflow."""
    for node_ in json.loads(path.read_text())["nodes"]:
        files = {value for value in node_["widgets_values"] if str(value).endswith(MODEL_FILES)}
        links = {model["name"]: model["url"] for model in node_["properties"].get("models", [])}
        assert files == set(links) or node_["type"] == "RewardGuidanceLoadNetwork"
        assert all(
            re.fullmatch(r"https://huggingface\.co/[\w.-]+/[\w.-]+/resolve/main/[\w./-]+", url)
            for url in links.values()
        )


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_shipped_workflow_says_in_five_lines_what_to_change_first(path):
    nodes = json.loads(path.read_text())["nodes"]
    (note,) = [node_ for node_ in nodes if node_["type"] in graphs.COMMENTS]
    assert note["title"] == "What to change first"
    assert [bool(line.strip()) for line in note["widgets_values"][0].split("\n")] == [True] * 5


def test_the_strength_to_compare_is_the_one_that_is_set(object_info):
    told, chosen = {}, {}
    for path in WORKFLOWS:
        found = re.search(r"ompare strength 0 \(.+?\) with strength (\d+)", path.read_text())
        if found:
            told[path.stem] = float(found[1])
            inputs = [node_["inputs"] for node_ in ui_to_api(json.loads(path.read_text()), object_info).values()]
            chosen[path.stem] = next(each["strength"] for each in inputs if "strength" in each)
    assert len(told) == 7
    assert told == chosen


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_shipped_workflow_has_a_small_thumbnail(path):
    picture = path.with_suffix(".jpg")
    assert picture.stat().st_size < 60_000
    with Image.open(picture) as opened:
        assert opened.size == (thumbnails.SIDE, thumbnails.SIDE)


@pytest.fixture(scope="module")
def run(client, object_info, server):
    """Run a shipped workflow, made small, on stand-ins, most of them under the real names."""
    for folder in (server.base / "output" / "guidance_data", server.base / "models" / "guidance_networks"):
        shutil.rmtree(folder, ignore_errors=True)

    def of(name):
        prompt = ui_to_api(json.loads((CHECKOUT / "workflows" / f"{name}.json").read_text()), object_info)
        return client.run(graphs.changed(graphs.stood_in(prompt), graphs.SMALL), extra_pnginfo={}).check()

    return of


def sizes(client, result):
    return [client.image(file).size for file in result.saved]


def series(result):
    """What the curve drew in each step."""
    return [set(step["series"]) for step in result.of("reward_guidance.step")]


BATCH, STEPS = graphs.SMALL["batch_size"], graphs.SMALL["steps"]
SIZE = graphs.SMALL["width"], graphs.SMALL["height"]


def test_a_network_is_trained_and_then_sampled_with(run, client):
    assert sizes(client, run("guidance_network_train_sd35")) == []
    assert sizes(client, run("guidance_network_sample_sd35")) == [SIZE] * BATCH


def test_one_step_with_a_network(run, client):
    assert sizes(client, run("guidance_network_sd_turbo")) == [SIZE] * BATCH


@pytest.mark.parametrize(
    "name", ["flow_guidance_sd35", "flow_guidance_flux", "flow_guidance_z_image", "diffusion_guidance_sdxl"]
)
def test_pictures_are_guided(run, client, name):
    result = run(name)
    assert sizes(client, result) == [SIZE] * BATCH
    assert series(result) == [{"reward"}] * STEPS


def test_a_video_is_guided(run, client):
    result = run("video_guidance_wan")
    for file in result.saved:
        with av.open(client.open(file)) as video:
            assert [(frame.width, frame.height) for frame in video.decode(video=0)] == [SIZE] * graphs.SMALL[
                "length"
            ] * BATCH
    assert len(result.saved) == 1
    assert series(result) == [{"reward"}] * STEPS


def test_the_best_are_saved_with_their_scores(run, client):
    files = run("score_and_select_sd35").saved
    for file in files:
        records = json.loads(Image.open(client.open(file)).text["reward_guidance"]).values()
        candidates, again = sorted(
            (entry["standardized"] for entry in records if "indices" not in entry), key=len, reverse=True
        )
        [kept] = [entry for entry in records if "indices" in entry]
        assert len(candidates) == BATCH and kept["scores"] == [candidates[i] for i in kept["indices"]]
        assert kept["scores"] == sorted(candidates, reverse=True)[: len(files)] == pytest.approx(again, abs=1e-4)
    assert len(files) == 2


def test_particles_are_kept(run, client):
    result = run("particles_sd35")
    assert sizes(client, result) == [SIZE] * 2 * BATCH
    assert all("ess" in names for names in series(result))


def test_everything_together(run, client):
    """A reward of two parts is followed and another watched, under a LoRA and a ControlNet."""
    result = run("everything_combined_flux")
    assert sizes(client, result) == [SIZE] * BATCH
    assert series(result) == [{"reward", "reward/held-out"}] * STEPS
