"""Every shipped workflow in the real page: it loads without complaint, is accepted, and draws where its models have stand-ins."""

import json
import random
import shutil

import pytest
from reward_guidance.tests.harness import models
from reward_guidance.tests.harness.environment import CHECKOUT
from reward_guidance.tests.harness.graphs import SMALL

WORKFLOWS = sorted((CHECKOUT / "workflows").glob("*.json"), key=lambda path: ("_sample_" in path.stem, path.stem))
"""What samples with a network comes after what trains it."""


@pytest.fixture(autouse=True)
def new_samples(server):
    shutil.rmtree(server.base / "output" / "guidance_data", ignore_errors=True)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_shipped_workflow(tab, server, client, path):
    workflow = json.loads(path.read_text())
    tab.load(workflow, path.stem)
    assert tab.complaints() == []
    tab.photograph(path.stem)
    tab.change(**SMALL, seed=random.getrandbits(32))
    tab.queue()
    if not all(file.stat().st_size for file in models.asked_for(server.base / "models", workflow)):
        tab.until("window.ended")  # badly: an empty file cannot be loaded
        return
    tab.finish()
    assert tab.complaints() == []
    (run,) = client.get("/history?max_items=1").values()
    saved = [file for output in run["outputs"].values() for file in output.get("images", [])]
    assert saved or not any(node["type"] == "SaveImage" for node in workflow["nodes"])
    tab.photograph(f"{path.stem}-done")
