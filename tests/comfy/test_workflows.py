"""UI workflows become the prompts that the page would queue."""

import json
import shutil

import pytest
from reward_guidance.tests.harness.environment import CHECKOUT
from reward_guidance.tests.harness.graphs import ui_to_api

WORKFLOWS = sorted((CHECKOUT / "workflows").glob("*.json"))


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
        node(6, "KSampler", [("model", "MODEL", 3), ("seed", "INT", 4), ("latent_image", "LATENT", 5)], [7, "fixed", 20]),
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


SMALL = {
    "EmptyLatentImage": {"width": 64, "height": 64, "batch_size": 4},
    "EmptySD3LatentImage": {"width": 64, "height": 64, "batch_size": 4},
    "RewardGuidanceCollect": {"count": 12, "levels": 2},
    "RewardGuidanceTrain": {"steps": 20, "batch": 4, "size": "small"},
}
"""What makes a workflow quick."""


@pytest.fixture(scope="module")
def run(client, object_info, server):
    """Run a shipped workflow, made small, on stand-ins under the real names; the pictures that it saves."""
    checkpoints = server.base / "models" / "checkpoints"
    (checkpoints / "sd_turbo.safetensors").symlink_to(checkpoints / "sd3.5_medium_incl_clips_t5xxlfp8scaled.safetensors")
    for folder in (server.base / "output" / "guidance_data", server.base / "models" / "guidance_networks"):
        shutil.rmtree(folder, ignore_errors=True)

    def of(name):
        prompt = ui_to_api(json.loads((CHECKOUT / "workflows" / f"{name}.json").read_text()), object_info)
        for content in prompt.values():
            content["inputs"].update(SMALL.get(content["class_type"], {}))
        return client.images(client.run(prompt).check())

    return of


def test_a_network_is_trained_and_then_sampled_with(run):
    assert run("guidance_network_train_sd35") == []
    assert [picture.size for picture in run("guidance_network_sample_sd35")] == [(64, 64)] * 4


def test_one_step_with_a_network(run):
    assert [picture.size for picture in run("guidance_network_sd_turbo")] == [(64, 64)] * 4
