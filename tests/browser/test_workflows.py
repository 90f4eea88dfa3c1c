"""Every shipped workflow in the real page: it loads without complaint, is accepted, and draws where its models have stand-ins."""

import json
import random
import shutil

import pytest
from reward_guidance.tests.harness import models
from reward_guidance.tests.harness.client import Result
from reward_guidance.tests.harness.environment import CHECKOUT
from reward_guidance.tests.harness.graphs import SMALL
from reward_guidance.tests.standins.shapesworld.expand import CHECKPOINT

WORKFLOWS = sorted((CHECKOUT / "workflows").glob("*.json"), key=lambda path: ("_sample_" in path.stem, path.stem))
"""What samples with a network comes after what trains it."""

BLUEPRINTS = sorted(path.stem for path in (CHECKOUT / "subgraphs").glob("*.json"))
PLACE = 1000, 300
SURROUND = """chosen => {
    const [box] = app.graph.nodes
    const kinds = ['CheckpointLoaderSimple', 'RewardGuidanceLoadReward', 'RewardGuidanceLoadNetwork', 'EmptySD3LatentImage']
    kinds.forEach((kind, i) => {
        const node = LiteGraph.createNode(kind)
        app.graph.add(node)
        node.pos = [box.pos[0] - 500, box.pos[1] + 170 * i]
        if (kind in chosen) node.widgets[0].value = chosen[kind]
        for (const [slot, output] of node.outputs.entries()) {
            const socket = box.inputs.findIndex(input => input.type === output.type && !input.widget)
            if (socket >= 0) node.connect(slot, box, socket)
        }
        if (!node.outputs.some(output => output.links?.length)) app.graph.remove(node)
    })
    const save = LiteGraph.createNode('SaveImage')
    app.graph.add(save)
    save.pos = [box.pos[0] + 500, box.pos[1]]
    box.connect(0, save, 0)
}"""
"""Joins the one node on the canvas to whatever gives what it takes, and its pictures to a saver."""


@pytest.fixture(autouse=True)
def new_samples(server):
    shutil.rmtree(server.base / "output" / "guidance_data", ignore_errors=True)


def pictures(client):
    """Of the last run."""
    (run,) = client.get("/history?max_items=1").values()
    return Result(run["outputs"]).saved


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_shipped_workflow(tab, server, client, path):
    workflow = json.loads(path.read_text())
    if "_sample_" in path.stem:
        tab.refresh()
    tab.load(workflow, path.stem)
    assert tab.complaints() == []
    tab.photograph(path.stem)
    assert tab.overlaps() == []
    tab.change(**SMALL, seed=random.getrandbits(32))
    tab.queue()
    if not all(file.stat().st_size for file in models.asked_for(server.base / "models", workflow)):
        tab.until("window.ended")  # badly: an empty file cannot be loaded
        return
    tab.finish()
    assert tab.complaints() == []
    assert pictures(client) or not any(node["type"] == "SaveImage" for node in workflow["nodes"])
    tab.photograph(f"{path.stem}-done")
    assert tab.overlaps() == []


@pytest.mark.parametrize("name", BLUEPRINTS)
def test_blueprint(tab, client, name):
    """Found by the search, placed by a click, and run between a loader and a saver."""
    tab.run("() => app.extensionManager.command.execute('Comfy.NewBlankWorkflow')")
    tab.until("app.graph.nodes.length === 0")
    tab.refresh()  # for the network that a workflow above has trained
    tab.run("() => app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    search = tab.page.get_by_role("dialog")
    search.locator("input").first.fill(name)
    search.get_by_text(name, exact=True).first.wait_for()
    tab.page.keyboard.press("Enter")
    search.wait_for(state="hidden")
    tab.page.mouse.move(*PLACE, steps=5)
    tab.page.mouse.click(*PLACE)
    tab.until("app.graph.nodes.length === 1 && !app.graph.nodes[0].flags.ghost")
    tab.run(SURROUND, {"CheckpointLoaderSimple": CHECKPOINT, "RewardGuidanceLoadReward": "PickScore_v1.safetensors"})
    tab.change(**SMALL, seed=random.getrandbits(32), prompt="a small blue heart on a yellow ground")
    tab.queue()
    tab.finish()
    tab.photograph(name.lower().replace(" ", "_"))
    assert tab.complaints() == []
    assert len(pictures(client)) == SMALL["batch_size"]
