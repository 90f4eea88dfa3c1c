"""One ComfyUI for all tests of this folder that a process runs, with the pack, every format stand-in and ShapesWorld."""

import os
from collections.abc import Iterator

import pytest
import torch
from reward_guidance.tests.harness import comfy, environment, models
from reward_guidance.tests.harness.client import Client
from reward_guidance.tests.harness.guided import Bench
from safetensors.torch import save_file

SHAPESWORLD = environment.CHECKOUT / "tests" / "standins" / "shapesworld" / "expand.py"


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
    """What ComfyUI says of the pack's nodes."""
    return {
        name: info
        for name, info in sorted(bench.object_info.items())
        if info["python_module"] == f"custom_nodes.{comfy.PACK}"
    }


@pytest.fixture(scope="session")
def clip_reward(server):
    """A random CLIP of open_clip's layout in models/reward_models."""
    import open_clip  # slow, and few need it

    torch.manual_seed(0)
    vision = open_clip.model.CLIPVisionCfg(
        layers=2, width=32, head_width=16, patch_size=8, image_size=24, mlp_ratio=2.0
    )
    text = open_clip.model.CLIPTextCfg(context_length=12, width=24, heads=3, layers=2)
    weights = open_clip.model.CLIP(16, vision, text).state_dict()
    folder = server.base / "models" / "reward_models"
    folder.mkdir(exist_ok=True)
    hints = {"vision_heads": "2", "text_heads": "3"}
    save_file({key: tensor.contiguous() for key, tensor in weights.items()}, folder / "tiny_clip.safetensors", hints)
    return lambda graph: graph.add("clip_reward", "RewardGuidanceLoadReward", reward_name="tiny_clip.safetensors")
