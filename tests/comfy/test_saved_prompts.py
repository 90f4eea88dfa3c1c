"""Prompts in API format that were saved with an older pack run for ever: saved_prompts.json is added to, and never changed."""

import json
import shutil
from pathlib import Path

import pytest
from reward_guidance.tests.comfy.test_schema import WIDGETS, inputs_of

SAVED = json.loads(Path(__file__).with_name("saved_prompts.json").read_text(encoding="utf-8"))
"""Name -> prompt: together every node of the pack, with all inputs that it had when the prompt was saved, in the order of the page."""
SAMPLER = [
    "model",
    "seed",
    "steps",
    "cfg",
    "sampler_name",
    "scheduler",
    "positive",
    "negative",
    "latent_image",
    "denoise",
]
NECESSARY = {
    "RewardGuidance": ["model"],
    "RewardGuidanceApplyNetwork": ["model", "network"],
    "RewardGuidanceCollect": [
        "model", "clip", "vae", "reward", "latent_image", "prompts", "negative_prompt", "seed", "steps", "cfg", "sampler_name", "scheduler",
    ],
    "RewardGuidanceCombineRewards": ["reward_1"],
    "RewardGuidanceImageSimilarity": ["image", "likeness"],
    "RewardGuidanceImageStatistic": ["statistic"],
    "RewardGuidanceKSampler": SAMPLER,
    "RewardGuidanceKSamplerBestOfN": [*SAMPLER, "vae", "reward"],
    "RewardGuidanceKSamplerNetwork": [*SAMPLER, "network"],
    "RewardGuidanceKSamplerParticles": [*SAMPLER, "reward"],
    "RewardGuidanceLoadData": ["folder"],
    "RewardGuidanceLoadNetwork": ["network_name"],
    "RewardGuidanceLoadReward": ["reward_name"],
    "RewardGuidanceNoise": ["network", "conditioning", "seed"],
    "RewardGuidanceSaveNetwork": ["network"],
    "RewardGuidanceScoreImages": ["images", "reward"],
    "RewardGuidanceSelectBest": [],
    "RewardGuidanceTrain": ["data"],
}  # fmt: skip
"""What no prompt can do without, for ever: whatever is added is optional."""
SET = {
    "RewardGuidanceCollect": ["count", "levels", "target", "folder"],
    "RewardGuidanceImageStatistic": ["lower"],
    "RewardGuidanceSaveNetwork": ["filename_prefix"],
    "RewardGuidanceTrain": ["steps", "size", "batch", "objective"],
}
"""What the saved prompts set to other values than the defaults of that time; and every `prompt`."""


@pytest.fixture(scope="module", autouse=True)
def without_files(server, clip_reward):
    for folder in ("output/guidance_data", "models/guidance_networks"):
        shutil.rmtree(server.base / folder, ignore_errors=True)


def of_the_pack(prompt):
    return {node: content for node, content in prompt.items() if content["class_type"] in NECESSARY}


def minimal(prompt):
    """The same without the inputs that a prompt can do without, where they have the defaults of the time when it was saved."""

    def inputs(kind, given):
        kept = [*NECESSARY[kind], *SET.get(kind, []), "prompt"]
        return {name: value for name, value in given.items() if name in kept or isinstance(value, list)}

    ours = {
        node: content | {"inputs": inputs(content["class_type"], content["inputs"])}
        for node, content in of_the_pack(prompt).items()
    }
    return prompt | ours


def test_every_node_has_a_saved_prompt(nodes):
    saved = {content["class_type"] for prompt in SAVED.values() for content in of_the_pack(prompt).values()}
    assert saved == nodes.keys()


def test_nothing_else_becomes_necessary(nodes):
    assert {name: sorted(info["input"]["required"]) for name, info in nodes.items()} == {
        name: sorted(kept) for name, kept in NECESSARY.items()
    }


def test_widgets_keep_their_order(nodes):
    """Saved workflows know their values by it. ComfyUI lists optional inputs after the required ones."""
    for prompt in SAVED.values():
        for content in of_the_pack(prompt).values():
            specs = inputs_of(nodes[content["class_type"]])
            widgets = [name for name, kind, options, _ in specs if kind in WIDGETS and not options.get("forceInput")]
            saved = [name for name, value in content["inputs"].items() if name in widgets]
            assert widgets[: len(saved)] == saved, content["class_type"]


@pytest.mark.parametrize("name", SAVED)
def test_saved_prompts_run_and_what_they_leave_out_has_its_default(client, name):
    def pictures(prompt):
        result = client.run(prompt).check()
        shown = [node for node, output in result.outputs.items() if "images" in output]
        return {node: [image.tobytes() for image in client.images(result, node)] for node in shown}

    assert pictures(minimal(SAVED[name])) == pictures(SAVED[name])
