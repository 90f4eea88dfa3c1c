"""The diagrams of the example workflows: what they show, and that nothing covers anything else."""

import json
from itertools import combinations

import pytest
from reward_guidance.tests.harness.environment import CHECKOUT
from reward_guidance.tests.tools import diagram
from reward_guidance.tests.tools.diagram import Link, Workflow, essential

WORKFLOWS = sorted((CHECKOUT / "workflows").glob("*.json"))
WIDTH, HEIGHT = 440, 348


def test_a_way_round_makes_a_link_redundant_unless_it_is_named():
    chain = [Link(0, 1, ""), Link(1, 2, "")]
    assert essential([*chain, Link(0, 2, ""), Link(1, 1, "")]) == chain
    assert essential([*chain, Link(0, 2, "REWARD")]) == [chain[0], Link(0, 2, "REWARD"), chain[1]]
    assert essential([Link(0, 1, ""), Link(0, 1, "MODEL"), Link(0, 1, "MODEL")]) == [Link(0, 1, "MODEL")]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_boxes_lie_apart_and_links_lead_down(path):
    flow = Workflow(json.loads(path.read_text(encoding="utf-8")))
    lines = [[(name, diagram.GOLD) for name in flow.own(group)] for group in range(len(flow.titles))]
    size = min(1.0, HEIGHT / diagram.natural(flow, lines))
    boxes = diagram.placed(flow, lines, WIDTH, HEIGHT, size)
    assert size > 0.8, "letters too small to be read"
    assert boxes.keys() == set(range(len(flow.titles)))
    for box in boxes.values():
        assert box.x >= -1e-6 and box.x + box.width <= WIDTH + 1e-6 and box.y + box.height <= HEIGHT + 1e-6
    for one, other in combinations(boxes.values(), 2):
        beside = one.x + one.width <= other.x or other.x + other.width <= one.x
        assert beside or one.y + one.height < other.y or other.y + other.height < one.y
    assert all(boxes[link.origin].y + boxes[link.origin].height < boxes[link.target].y for link in flow.links)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("flow_guidance_flux", {("Flux", "Guidance", "MODEL"), ("Prompt and reward", "Guidance", "REWARD")}),
        (
            "guidance_network_train_sd35",
            {("SD3.5 and reward", "Collect samples", "REWARD"), ("Collect samples", "Train", "GUIDANCE_DATA")},
        ),
        (
            "guidance_network_sd_turbo",
            {("SD-Turbo and reward", "One step", "MODEL"), ("Train", "One step", "GUIDANCE_NETWORK")},
        ),
    ],
)
def test_what_the_pack_works_with_is_shown_on_its_way(name, shown):
    flow = Workflow(json.loads((CHECKOUT / "workflows" / f"{name}.json").read_text(encoding="utf-8")))
    assert shown <= {(flow.titles[link.origin], flow.titles[link.target], link.kind) for link in flow.links}
