"""Tabs on every frontend and renderer. Without a browser these tests are skipped, but never on GitHub."""

import os
import shutil
from collections.abc import Iterator

import pytest
from reward_guidance.tests.harness import browser, comfy, environment, models
from reward_guidance.tests.harness.client import Client
from xdist.scheduler import LoadScopeScheduling

FRONTENDS = ["pinned", "newest"]
KEEP_RESULTS = ["--cache-lru", "200"]
"""A prompt that both renderers send alike runs once, and one that they send otherwise runs again."""


class EachFrontend(LoadScopeScheduling):
    """Leaves a frontend's tests to one process, which has a ComfyUI and a browser of its own."""

    def _split_scope(self, nodeid: str) -> str:
        return next((frontend for frontend in FRONTENDS if frontend in nodeid), FRONTENDS[0])


def pytest_xdist_make_scheduler(config, log) -> EachFrontend:
    return EachFrontend(config, log)


def needed(get):
    try:
        return get()
    except browser.MissingError as missing:
        if os.environ.get("GITHUB_ACTIONS"):
            raise
        pytest.skip(str(missing))


@pytest.fixture(scope="session")
def chromium() -> Iterator[browser.Browser]:
    needed(browser.chromium)
    with browser.browser() as running:
        yield running


@pytest.fixture(scope="session", params=FRONTENDS)
def frontend(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def server(frontend) -> Iterator[comfy.Server]:
    base = environment.cache() / "work" / f"browser-{frontend}"
    models.link_every(base / "models")
    shutil.rmtree(base / "output", ignore_errors=True)
    pages = [] if frontend == "pinned" else ["--front-end-root", str(needed(browser.newest_frontend))]
    with comfy.serve(base, [*pages, *KEEP_RESULTS], variables={"OMP_NUM_THREADS": "1"}) as running:
        yield running


@pytest.fixture(scope="session")
def client(server) -> Client:
    return Client(server.url)


@pytest.fixture(scope="session", params=browser.RENDERERS)
def session_tab(request, chromium, client, frontend) -> Iterator[browser.Tab]:
    settings = {"Comfy.VueNodes.Enabled": browser.RENDERERS[request.param]}
    with browser.tab(chromium, client, f"{frontend}-{request.param}", **settings) as opened:
        yield opened


@pytest.fixture
def tab(session_tab) -> Iterator[browser.Tab]:
    """Of which no test may end with a complaint on the page or in its console."""
    session_tab.errors.clear()
    yield session_tab
    session_tab.stop()
    assert session_tab.complaints() == []
