"""One ComfyUI for all tests of this folder, with the pack, every format stand-in and ShapesWorld."""

from collections.abc import Iterator

import pytest
from reward_guidance.tests.harness import comfy, environment, models
from reward_guidance.tests.harness.client import Client
from reward_guidance.tests.harness.guided import Bench

SHAPESWORLD = environment.CHECKOUT / "tests" / "standins" / "shapesworld" / "expand.py"


@pytest.fixture(scope="session")
def server() -> Iterator[comfy.Server]:
    base = environment.cache() / "work" / "test"
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
