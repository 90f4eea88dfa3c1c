"""One ComfyUI for all tests of this folder that a process runs, with the pack, every format stand-in and ShapesWorld."""

import os
from collections.abc import Iterator

import pytest
import torch
from reward_guidance.tests.harness import comfy, environment, models
from reward_guidance.tests.harness.client import Client
from reward_guidance.tests.harness.guided import Bench, latents, one_box, reward_file, seeds_of

SHAPESWORLD = environment.CHECKOUT / "tests" / "standins" / "shapesworld" / "expand.py"
SEEDS = seeds_of(__file__)


@pytest.fixture(scope="session")
def server() -> Iterator[comfy.Server]:
    base = environment.cache() / "work" / os.environ.get("PYTEST_XDIST_WORKER", "test")
    sources = [models.format_standins()]
    if SHAPESWORLD.exists():
        sources.append(models.shapesworld())
    models.link_models(base / "models", *sources)
    one_thread = {"OMP_NUM_THREADS": "1"}  # the stand-ins are so small that threads mostly wait for each other
    with comfy.serve(base, variables=one_thread) as running:
        yield running


@pytest.fixture(scope="session")
def client(server) -> Client:
    return Client(server.url)


@pytest.fixture(scope="session")
def bench(client) -> Bench:
    return Bench(client)


@pytest.fixture(scope="session")
def nodes(bench) -> dict[str, dict]:
    """The pack's nodes by id, as ComfyUI describes them; never none, so that a test of all of them tests some."""
    own = f"custom_nodes.{comfy.PACK}"
    found = {name: info for name, info in sorted(bench.object_info.items()) if info["python_module"] == own}
    assert found
    return found


@pytest.fixture(scope="session")
def clip_reward(server):
    """A random CLIP of open_clip's layout in models/reward_models."""
    from reward_guidance.tests.standins.rewards import save_open_clip  # slow to import, and few tests need it

    folder = server.base / "models" / "reward_models"
    folder.mkdir(exist_ok=True)
    save_open_clip(folder / "tiny_clip.safetensors")
    return reward_file("tiny_clip.safetensors")


@pytest.fixture
def like_a_node():
    """ComfyUI runs nodes in inference mode."""
    with torch.inference_mode():
        yield


@pytest.fixture
def refused(bench):
    """Queue a prompt that must fail with these words in one short line, and then a guided one that must not fail."""

    def queue(prompt, *words):
        error = bench.queue(prompt).error
        assert error is not None, "the prompt succeeded"
        assert [some for some in words if some not in error] == [], error
        assert "\n" not in error and "Traceback" not in error and len(error) < 300
        assert bench.queue(latents("flux", one_box(decoder="latent_rgb"), seed=next(SEEDS))).error is None

    return queue
