"""What saved workflows rely on: the nodes' ids, inputs, defaults and outputs, held against node_schemas.json."""

import json
import os
from pathlib import Path

SNAPSHOT = Path(__file__).with_name("node_schemas.json")
RENEW = "RENEW_SCHEMAS"
ADVICE = (
    f"The nodes are no longer those of {SNAPSHOT.name}, and workflows saved with them may break. If that is meant, write the file anew with "
    "make schemas and commit it. A node or an input that was renamed after a release also needs an io.NodeReplace, which "
    "the extension's on_load registers."
)
MOST_WIDGETS = 8
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COLOR"}
KEPT = ("default", "min", "max", "step", "options", "advanced", "multiline")
COMFYUIS_OWN = {"sampler_name", "scheduler", "reward_name", "image_tower", "text_tower", "network_name", "folder"}
"""Choices that come from ComfyUI or from what is on disk."""


def inputs_of(info):
    return [
        (name, *spec, group == "optional")
        for group in ("required", "optional")
        for name, spec in info["input"].get(group, {}).items()
    ]


def schema(info):
    inputs = {}
    for name, kind, options, optional in inputs_of(info):
        kept = {key: options[key] for key in KEPT if key in options and not (key == "options" and name in COMFYUIS_OWN)}
        inputs[name] = {"type": kind} | kept | ({"optional": True} if optional else {})
    outputs = zip(info["output_name"], info["output"], info["output_is_list"], strict=True)
    return {
        "name": info["display_name"],
        "category": info["category"],
        "inputs": inputs,
        "outputs": [{"name": name, "type": kind, "list": is_list} for name, kind, is_list in outputs],
    }


def test_nodes_are_what_saved_workflows_know(nodes):
    now = {name: schema(info) for name, info in nodes.items()}
    if os.environ.get(RENEW):
        SNAPSHOT.write_text(json.dumps(now, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    known = json.loads(SNAPSHOT.read_text(encoding="utf-8"))
    different = [name for name in sorted(known.keys() | now.keys()) if known.get(name) != now.get(name)]
    changes = [f"{name}\n  was {json.dumps(known.get(name))}\n  is  {json.dumps(now.get(name))}" for name in different]
    assert not different, "\n".join([ADVICE, *changes])


def test_no_node_is_a_wall_of_knobs(nodes):
    for info in nodes.values():
        widgets = [
            (name, options)
            for name, kind, options, _ in inputs_of(info)
            if kind in WIDGETS and not options.get("forceInput")
        ]
        shown = [name for name, options in widgets if not options.get("advanced")]
        assert len(shown) <= MOST_WIDGETS, f"{info['display_name']} shows {', '.join(shown)}"


def test_ids_are_prefixed(nodes):
    assert nodes
    assert all(name.startswith("RewardGuidance") for name in nodes)
