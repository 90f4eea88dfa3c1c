"""Tabs on every frontend and renderer. Without a browser these tests are skipped, but never on GitHub."""

import os
from collections.abc import Iterator

import pytest
from reward_guidance.tests.harness import browser, comfy, environment, models
from reward_guidance.tests.harness.client import Client


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


@pytest.fixture(scope="session", params=["pinned", "newest"])
def frontend(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def server(frontend) -> Iterator[comfy.Server]:
    base = environment.cache() / "work" / f"browser-{frontend}"
    models.link_every(base / "models")
    options = [] if frontend == "pinned" else ["--front-end-root", str(needed(browser.newest_frontend))]
    with comfy.serve(base, options, variables={"OMP_NUM_THREADS": "1"}) as running:
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
