"""Inputs that do not fit a node's schema are refused by name, also where they come over a link, of which ComfyUI checks nothing."""

import math

import pytest
from reward_guidance.tests.harness.inprocess import load_comfyui

load_comfyui()

from comfy_api.internal import make_locked_method_func
from comfy_api.v0_0_2 import io
from reward_guidance.guidance.errors import SHOWN, GuidanceError
from reward_guidance.nodes import (
    guidance_data,
    guidance_network,
    particles,
    reward_guidance,
    rewards,
    scores,
    selection,
    training,
)
from reward_guidance.nodes.wiring import folders

for folder in (folders.REWARDS, folders.NETWORKS):
    folders.register_folder(folder)
GROUPS = (rewards, scores, reward_guidance, guidance_network, guidance_data, training, selection, particles)
NODES = [node for group in GROUPS for node in group.NODES]
INPUTS = [(node, entry) for node in NODES for entry in node.GET_SCHEMA().inputs]
NUMBERS = [
    (node, entry)
    for node, entry in INPUTS
    if isinstance(entry, (io.Int.Input, io.Float.Input)) and entry.id != "scores"
]
TEXTS = [(node, entry) for node, entry in INPUTS if isinstance(entry, (io.String.Input, io.Color.Input))]
NO_NUMBERS = (math.nan, math.inf, -math.inf, "1", None, [1], 10**400, "x" * 10**6)


def names(value):
    return value.id if isinstance(value, io.Input) else value.__name__


def run(node, **inputs):
    """As ComfyUI's executor does, which copies and locks the class."""
    if node.GET_SCHEMA().is_input_list:
        inputs = {name: [value] for name, value in inputs.items()}
    return make_locked_method_func(node, node.FUNCTION, node.PREPARE_CLASS_CLONE(None))(**inputs)


@pytest.mark.parametrize(("node", "entry"), NUMBERS, ids=names)
def test_numbers_that_are_none_or_beyond_their_limits(node, entry):
    whole = isinstance(entry, io.Int.Input)
    step = 1 if whole else 1e-6 * max(1, abs(entry.min), abs(entry.max))
    for value in (*NO_NUMBERS, entry.min - step, entry.max + step, *((0.5 + entry.min,) if whole else ())):
        kind = "whole number" if whole else "number"
        with pytest.raises(
            GuidanceError, match=f"^{entry.id} must be a {kind} from {entry.min} to {entry.max}, not "
        ) as refusal:
            run(node, **{entry.id: value})
        assert len(str(refusal.value)) < 100 + SHOWN


@pytest.mark.parametrize(("node", "entry"), NUMBERS, ids=names)
def test_numbers_at_their_limits(node, entry):
    """The node goes on, and lacks its other inputs."""
    for value in (entry.min, entry.max, entry.default):
        with pytest.raises(Exception, match="missing|tuning|reward|nothing to score") as refusal:
            run(node, **{entry.id: value})
        assert not str(refusal.value).startswith(f"{entry.id} must be")


@pytest.mark.parametrize(("node", "entry"), TEXTS, ids=names)
@pytest.mark.parametrize("value", [None, 3, 1.5, ["#ffffff"], {}])
def test_texts_that_are_none(node, entry, value):
    with pytest.raises(GuidanceError, match=f"^{entry.id} must be a text, not "):
        run(node, **{entry.id: value})
