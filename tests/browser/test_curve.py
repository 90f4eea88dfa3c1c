"""The curve on a node: what it draws, and what it survives."""

import json
import random
import re
import uuid

import pytest
from reward_guidance.tests.browser.curve import ask, legend, shades, steps_of
from reward_guidance.tests.harness.environment import CHECKOUT

WORKFLOW = CHECKOUT / "workflows" / "flow_guidance_sd35.json"
BATCH, STEPS = 3, 12


def kept(tab, client):
    """Node -> the steps that the server has of the workflow on screen."""
    return client.get("/reward_guidance/steps?workflow=" + tab.run("() => app.rootGraph.id"))


def await_drawing(tab):
    """Wait until there is a curve that a person can see."""
    tab.until("document.querySelector('.reward-curve canvas')?.clientHeight > 20")
    tab.await_true(lambda: min(shades(tab).get(name, 0) for name in ("reward", "held-out")) > 100)


def prepare(tab, name="curve", steps=STEPS):
    """The shipped workflow with a held-out reward, small and for the first time."""
    tab.load(json.loads(WORKFLOW.read_text()) | {"id": str(uuid.uuid4())}, name)
    ask(
        tab,
        """(() => {
            const other = LiteGraph.createNode('RewardGuidanceImageStatistic')
            node.graph.add(other)
            other.pos = [0, 660]
            other.connect(0, node, 'held_out')
        })()""",
    )
    quick = {"width": 64, "height": 64, "decoder": "latent_rgb", "smoothing": 0}
    tab.change(**quick, batch_size=BATCH, steps=steps, seed=random.getrandbits(32))


@pytest.fixture(scope="module")
def finished():
    """Tab -> the id of a workflow in it that ran to its end."""
    return {}


@pytest.fixture
def drawn(tab, finished):
    """A tab that shows the curve of a finished run, which the tests of one renderer share as long as they leave it there."""
    shown = tab.run("() => app.rootGraph.id")
    if finished.get(tab) != shown or len(steps_of(tab)) != STEPS:
        prepare(tab)
        tab.queue()
        tab.finish()
        finished[tab] = tab.run("() => app.rootGraph.id")
    return tab


def test_nothing_is_there_before_the_first_run(tab):
    prepare(tab)
    assert ask(tab, "curve === undefined")
    assert not tab.page.query_selector(".reward-curve")


def test_it_draws_what_the_server_knows(drawn, client):
    steps = steps_of(drawn)
    assert [step["step"] for step in steps] == list(range(1, STEPS + 1))
    assert {name: len(values) for name, values in steps[-1]["series"].items()} == {
        "reward": BATCH,
        "reward/held-out": BATCH,
    }
    assert kept(drawn, client) == {"7": steps}
    await_drawing(drawn)
    assert re.fullmatch(rf"step {STEPS}/{STEPS} · σ [\d.]+ reward −?[\d.]+ held-out −?[\d.]+", legend(drawn))
    assert ask(drawn, "curve.canvas.width >= 2 * curve.canvas.clientWidth")
    saved = ask(drawn, "node.serialize().widgets_values")
    assert len(saved) == len(json.loads(WORKFLOW.read_text())["nodes"][6]["widgets_values"])
    drawn.photograph("curve")


def test_hovering_reads_a_value(drawn):
    await_drawing(drawn)
    box = drawn.page.locator(".reward-curve canvas").bounding_box()
    drawn.page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + box["height"] / 2)
    drawn.await_true(lambda: not legend(drawn).startswith(f"step {STEPS}/"))
    step, shown = re.match(r"step (\d+)/.* reward (\S+) ", legend(drawn)).groups()
    assert 4 <= int(step) <= 9
    rewards = steps_of(drawn)[int(step) - 1]["series"]["reward"]
    assert float(shown.replace("−", "-")) == pytest.approx(sum(rewards) / BATCH, rel=0.01)
    drawn.photograph("hover")
    drawn.page.mouse.move(5, 500)
    drawn.await_true(lambda: legend(drawn).startswith(f"step {STEPS}/"))


def test_it_follows_the_theme(drawn):
    colours = "[getComputedStyle(curve.element).color, ...[...curve.legend.querySelectorAll('b')].map(entry => entry.style.color)]"
    await_drawing(drawn)
    dark = ask(drawn, colours)
    drawn.set(ColorPalette="light")
    try:
        drawn.await_true(lambda: all(one != other for one, other in zip(dark, ask(drawn, colours), strict=True)))
        await_drawing(drawn)
        drawn.photograph("light")
    finally:
        drawn.set(ColorPalette="dark")
    drawn.await_true(lambda: ask(drawn, colours) == dark)


def test_it_comes_back_to_its_tab_and_goes_into_no_other(drawn):
    steps = steps_of(drawn)
    mine = drawn.run("() => app.rootGraph.id")
    name = drawn.run("() => app.extensionManager.workflow.activeWorkflow.filename")
    prepare(drawn, "another")
    assert steps_of(drawn) == []
    drawn.page.locator(".workflow-tabs").get_by_text(name, exact=True).click()
    drawn.page.mouse.move(5, 500)
    drawn.until(f"app.rootGraph.id === '{mine}' && document.querySelector('.reward-curve')")
    drawn.until(
        "![...document.querySelectorAll('[role=dialog]')].some(each => each.offsetParent)"
    )  # what a tab says of itself
    assert steps_of(drawn) == steps


def test_it_shows_the_run_that_made_the_result(drawn):
    """Also where ComfyUI has the result in its cache."""
    first, seed = steps_of(drawn), ask(drawn, "node.widgets.find(widget => widget.name === 'seed').value")
    for other in (seed + 1, seed):
        drawn.change(seed=other)
        drawn.queue()
        drawn.finish()
    assert [step["series"] for step in steps_of(drawn)] == [step["series"] for step in first]


def test_it_survives_a_reload_in_the_middle_of_a_run(tab, client):
    prepare(tab, steps=400)
    ask(
        tab,
        """(() => {
            const slow = LiteGraph.createNode('ProbeModelCalls')
            node.graph.add(slow)
            slow.pos = [800, -150]
            slow.widgets[0].value = 0.1
            node.getInputNode(0).connect(0, slow, 'model')
            slow.connect(0, node, 'model')
        })()""",
    )
    tab.queue()
    tab.until("document.querySelector('.reward-curve')")
    before = len(steps_of(tab))
    tab.open()
    tab.until("document.querySelector('.reward-curve canvas')")
    reloaded = len(steps_of(tab))
    tab.await_true(lambda: len(steps_of(tab)) > reloaded)
    tab.stop()
    tab.await_true(lambda: kept(tab, client) == {"7": steps_of(tab)})
    steps = steps_of(tab)
    assert before < reloaded < len(steps) < 400
    tab.photograph("reloaded")
    # A page that loads hears of steps before any pack can listen to them.
    tab.errors[:] = [error for error in tab.errors if not error.startswith("Unknown message type reward_guidance.step")]


def test_it_finds_nodes_within_subgraphs(tab, client):
    prepare(tab)
    ask(tab, "node.graph.convertToSubgraph(new Set([node])) && 0")
    tab.queue()
    tab.finish()
    ((path, steps),) = kept(tab, client).items()
    assert re.fullmatch(r"\d+:\d+", path)
    assert len(steps) == STEPS
    assert steps_of(tab) == steps
    ask(tab, "app.canvas.setGraph(node.graph)")
    await_drawing(tab)
    tab.photograph("subgraph")


SEND = """([runs, steps]) => {
    const sampler = app.rootGraph.nodes.find(node => node.type === 'RewardGuidanceKSampler')
    for (let run = 1; run <= runs; run++) for (let i = 0; i < steps; i++) app.api.dispatchEvent(new CustomEvent('reward_guidance.step', { detail: {
        node: String(sampler.id), workflow: app.rootGraph.id, run, index: i, step: i + 1, steps: 2 * steps, scattered: [],
        series: { reward: [Math.sqrt(i) / 9, null], 'reward/held-out': [Math.sqrt(i) / 12], loss: [40 / (20 + i)], ess: [40 + 9 * Math.sin(i / 5)] },
    } }))
}"""


def test_any_series_have_axes_of_their_own_and_old_runs_are_forgotten(tab):
    prepare(tab)
    tab.run(SEND, [50, 200])
    await_drawing(tab)
    assert shades(tab)["loss"] > 100
    assert ask(tab, "[curve.steps.length, node.widgets.filter(widget => widget.curve).length]") == [200, 1]
    assert legend(tab) == "step 200/400 reward 1.57 held-out 1.18 loss 0.183 ess 47.8"
    tab.photograph("training")
    ask(tab, "node.graph.remove(node)")
    tab.await_true(lambda: not tab.page.query_selector(".reward-curve"))
