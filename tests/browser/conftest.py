"""Tabs on every frontend and renderer. Without a browser these tests are skipped, but never on GitHub."""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache

import pytest
from reward_guidance.tests.harness import browser, comfy, environment, models
from reward_guidance.tests.harness.client import Client
from xdist.scheduler import LoadScopeScheduling

FRONTENDS = ["pinned", "newest"]


def frontend_of(nodeid: str) -> str:
    """The frontend that a test uses; the first for a test that uses none."""
    return next((frontend for frontend in FRONTENDS if frontend in nodeid), FRONTENDS[0])


class EachFrontend(LoadScopeScheduling):
    """Leaves a frontend's tests to one process, which has a ComfyUI and a browser of its own."""

    def _split_scope(self, nodeid: str) -> str:
        return frontend_of(nodeid)


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
    options = [] if frontend == "pinned" else ["--front-end-root", str(needed(browser.newest_frontend))]
    with comfy.serve(base, options, variables={"OMP_NUM_THREADS": "1"}) as running:
        yield running


@pytest.fixture(scope="session")
def client(server) -> Client:
    return Client(server.url)


@pytest.fixture(scope="session")
def tab_of(chromium, client, frontend) -> Iterator[Callable[[str], browser.Tab]]:
    """The tab of a renderer, opened once. The renderers take turns, so that a prompt which both send alike runs once:
    ComfyUI keeps what the last prompt made."""
    with ExitStack() as opened:

        @cache
        def of(renderer: str) -> browser.Tab:
            settings = {"Comfy.VueNodes.Enabled": browser.RENDERERS[renderer]}
            return opened.enter_context(browser.tab(chromium, client, f"{frontend}-{renderer}", **settings))

        yield of


@pytest.fixture(params=browser.RENDERERS)
def tab(request, tab_of) -> Iterator[browser.Tab]:
    """A tab of which no test may end with a complaint on the page or in its console."""
    shared = tab_of(request.param)
    shared.errors.clear()
    yield shared
    shared.stop()
    assert shared.complaints() == []


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Each test on one renderer after the other, and all of one frontend together."""

    def without_renderer(item: pytest.Item) -> str:
        return re.sub("|".join(browser.RENDERERS), "", item.nodeid)

    places = {name: place for place, name in enumerate(dict.fromkeys(map(without_renderer, items)))}
    items.sort(key=lambda item: (frontend_of(item.nodeid), places[without_renderer(item)]))
