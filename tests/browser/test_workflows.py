"""Every shipped workflow in the real page: it loads without complaint, is accepted, and runs to its end on stand-ins."""

import json
import random
import re

import pytest
from reward_guidance.tests.browser.curve import TRAINER, legend, shades, steps_of
from reward_guidance.tests.harness.client import Result
from reward_guidance.tests.harness.environment import CHECKOUT
from reward_guidance.tests.harness.graphs import CHECKPOINTS, SMALL, TEXT_ENCODER, TEXT_TYPES
from reward_guidance.tests.standins.shapesworld.expand import CHECKPOINT

WORKFLOWS = sorted((CHECKOUT / "workflows").glob("*.json"), key=lambda path: ("_sample_" in path.stem, path.stem))
"""What samples with a network comes after what trains it."""

BATCH = SMALL["batch_size"]
SEED = 7
"""The same on both renderers, so that the server runs again only what a renderer sends otherwise, and what draws a curve."""
SAVED = {
    "diffusion_guidance_sdxl": BATCH,
    "everything_combined_flux": BATCH,
    "flow_guidance_flux": BATCH,
    "flow_guidance_sd35": BATCH,
    "flow_guidance_z_image": BATCH,
    "guidance_network_sample_sd35": BATCH,
    "guidance_network_sd_turbo": BATCH,
    "guidance_network_train_sd35": 0,
    "particles_sd35": 2 * BATCH,
    "score_and_select_sd35": 2,
    "video_guidance_wan": 1,
}
"""Workflow -> how many pictures or videos it saves. The one that saves none saves a network."""

STAND_IN = """([checkpoints, types, encoder]) => {
    for (const node of [...app.graph.nodes]) {
        const widget = name => node.widgets?.find(widget => widget.name === name)
        if (widget('ckpt_name')?.value in checkpoints) widget('ckpt_name').value = checkpoints[widget('ckpt_name').value]
        if (!(widget('type')?.value in types)) continue
        const loader = LiteGraph.createNode('CLIPLoader')
        app.graph.add(loader)
        loader.pos = [...node.pos]
        loader.widgets[0].value = encoder
        loader.widgets[1].value = types[widget('type').value]
        for (const id of [...node.outputs[0].links]) {
            const link = app.graph.links.get(id)
            loader.connect(0, app.graph.getNodeById(link.target_id), link.target_slot)
        }
        app.graph.remove(node)
    }
}"""
"""Puts stand-ins in the place of what has none under its own name."""

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


def pictures(client):
    """Of the last run."""
    (run,) = client.get("/history?max_items=1").values()
    return Result(run["outputs"]).saved


def test_it_is_known_what_every_workflow_saves():
    assert set(SAVED) == {path.stem for path in WORKFLOWS}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_shipped_workflow(tab, client, path):
    workflow = json.loads(path.read_text())
    if "_sample_" in path.stem:
        tab.refresh()
    tab.load(workflow, path.stem)
    assert tab.complaints() == []
    tab.photograph(path.stem)
    assert tab.overlaps() == []
    tab.run(STAND_IN, [CHECKPOINTS, TEXT_TYPES, TEXT_ENCODER])
    tab.change(**SMALL, seed=SEED)
    tab.change(TRAINER, seed=random.getrandbits(32))
    tab.queue()
    tab.finish()
    assert tab.complaints() == []
    assert len(pictures(client)) == SAVED[path.stem]
    tab.photograph(f"{path.stem}-done")
    assert tab.overlaps() == []
    if any(node["type"] == TRAINER for node in workflow["nodes"]):
        check_the_curve_of_a_training(tab)


def check_the_curve_of_a_training(tab):
    """The loss, also of samples kept apart, the rewards of the previews and the share of samples that count."""
    steps = steps_of(tab, TRAINER)
    assert [step["step"] for step in steps] == list(range(1, SMALL["steps"] + 1))
    assert len(steps[-1]["series"].pop("reward")) == 4
    assert set(steps[-1]["series"]) == {"loss", "loss/held-out"}
    assert re.fullmatch(
        r"step 4/4 · ESS [1-9]\d*% loss [−\d.e]+ held-out [−\d.e]+ reward [−\d.e]+", legend(tab, TRAINER)
    )
    assert all(count > 20 for count in shades(tab, TRAINER).values())


@pytest.mark.parametrize("name", BLUEPRINTS)
def test_blueprint(tab, client, name):
    """Found by the search, placed by a click, and run between a loader and a saver."""
    tab.command("Comfy.NewBlankWorkflow")
    tab.until("app.graph.nodes.length === 0")
    tab.refresh()  # for the network that a workflow above has trained
    tab.command("Workspace.SearchBox.Toggle")
    search = tab.page.get_by_role("dialog")
    search.locator("input").first.fill(name)
    search.get_by_text(name, exact=True).first.wait_for()
    tab.page.keyboard.press("Enter")
    search.wait_for(state="hidden")
    tab.page.mouse.move(*PLACE, steps=5)
    tab.page.mouse.click(*PLACE)
    tab.until("app.graph.nodes.length === 1 && !app.graph.nodes[0].flags.ghost")
    tab.run(SURROUND, {"CheckpointLoaderSimple": CHECKPOINT, "RewardGuidanceLoadReward": "PickScore_v1.safetensors"})
    tab.change(**SMALL, seed=SEED, prompt="a small blue heart on a yellow ground")
    tab.queue()
    tab.finish()
    tab.command("Comfy.Canvas.FitView")
    tab.settle()
    tab.photograph(name.lower().replace(" ", "_"))
    assert tab.complaints() == []
    assert len(pictures(client)) == BATCH
