"""ComfyUI's page in a headless Chromium, as a user sees it, on the frontend that ComfyUI pins or on the newest."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright

from . import environment
from .client import Client
from .environment import CHECKOUT, say

CHROMIUM = "CHROMIUM"
NAMES = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
)
PICTURES = CHECKOUT / "output" / "browser"
DAY = 24 * 3600
RENDERERS = {"litegraph": False, "nodes2": True}
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Notification.ShowVersionUpdates": False,
    "Comfy.VersionCompatibility.DisableWarnings": True,
    "Comfy.Workflow.Persist": True,
    "Comfy.Workflow.AutoSave": "off",
    "Comfy.Minimap.Visible": False,
    "Comfy.RightSidePanel.IsOpen": False,
    "Comfy.Window.UnloadConfirmation": False,
    "Comfy.Validation.Workflows": True,
    "Comfy.Locale": "en",
    "Comfy.ColorPalette": "dark",
    "LiteGraph.Canvas.MinFontSizeForLOD": 0,
}
"""Of a user who has been here before, whom nothing pops up at, and who wants to read the smallest letters."""
USUAL = re.compile(
    r"/user\.css|/api/userdata|ComfyApp graph accessed before initialization|api\.comfy\.org|huggingface\.co"
    r"|/docs/\w+/en\.md|Unknown message type probe\."
)
"""Console errors that a ComfyUI without packs has too, that come of English help having no folder of its own, or of the tests' own pack."""


class MissingError(RuntimeError):
    """There is no browser, or no newest frontend, and none could be got. The message says what to do."""


def chromium() -> str:
    """A Chromium or Chrome of this machine; Debian's is installed where that needs no password."""
    if not found():
        with environment.locked():
            install()
    path = found()
    if not path:
        raise MissingError(f"No Chromium or Chrome was found. Install one, or let {CHROMIUM} name its executable.")
    return path


def found() -> str | None:
    return os.environ.get(CHROMIUM) or next(filter(None, map(shutil.which, NAMES)), None)


def install() -> None:
    root = [] if os.geteuid() == 0 else ["sudo", "--non-interactive"]
    if not shutil.which("apt-get") or (root and not os.environ.get("CI")):
        return
    say("installing Chromium")
    for arguments in (
        ["update"],
        ["install", "--yes", "--no-install-recommends", "chromium", "fonts-dejavu-core", "fonts-wqy-microhei"],
    ):
        subprocess.run(
            [*root, "apt-get", "-qq", *arguments],
            env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
            stdout=sys.stderr,
        )


def newest_frontend() -> Path:
    """The newest comfyui-frontend-package's pages, looked for once a day."""
    target = environment.cache() / "frontend"
    pages = target / "comfyui_frontend_package" / "static"
    if pages.is_dir() and time.time() - target.stat().st_mtime < DAY:
        return pages
    options = ["--no-deps", "--upgrade", "--target", str(target)]
    try:
        with environment.locked():
            environment.pip(Path(sys.prefix), "install", *options, "comfyui-frontend-package")
            os.utime(target)
    except environment.UnfitError as unfit:
        if not pages.is_dir():
            raise MissingError(f"The newest comfyui-frontend-package could not be had. {unfit}") from None
    return pages


@contextmanager
def browser() -> Iterator[Browser]:
    options = [
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
    ]
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium(), headless=True, args=options)
        try:
            yield running
        finally:
            running.close()


@contextmanager
def tab(browser: Browser, client: Client, name: str, **settings: Any) -> Iterator["Tab"]:
    """A tab of a new profile. The settings are the server's, so only one tab of a server is in use at a time."""
    context = browser.new_context(viewport={"width": 1600, "height": 1000})
    try:
        opened = Tab(context.new_page(), client, name, SETTINGS | settings)
        opened.open()
        yield opened
    finally:
        context.close()


class Tab:
    def __init__(self, page: Page, client: Client, name: str, settings: dict[str, Any]):
        self.page = page
        self.client = client
        self.name = name
        self.settings = settings
        self.errors: list[str] = []
        page.on("console", self.hear)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.route(lambda url: not url.startswith((client.url, "blob:", "data:")), lambda route: route.abort())

    def hear(self, message: ConsoleMessage) -> None:
        text = f"{message.text} {message.location.get('url', '')}"
        if message.type == "error" and not USUAL.search(text):
            self.errors.append(text)

    def open(self) -> None:
        """Also reloads the page."""
        self.client.post("/api/settings", self.settings)
        self.page.goto(self.client.url, wait_until="domcontentloaded")
        self.until("window.app?.extensionManager && app.vueAppReady && app.graph && app.canvas", seconds=90)
        self.until("Object.keys(LiteGraph.registered_node_types).length > 200", seconds=90)
        self.until(
            "!document.querySelector('#splash-loader') && ![...document.querySelectorAll('.p-blockui-mask')].some(e => e.offsetParent)",
            90,
        )

    def set(self, **settings: Any) -> None:
        """Settings by the last part of their names after Comfy, with _ for dots."""
        for name, value in settings.items():
            self.run(
                "([name, value]) => app.extensionManager.setting.set(name, value)",
                ["Comfy." + name.replace("_", "."), value],
            )

    def run(self, script: str, argument: Any = None) -> Any:
        return self.page.evaluate(script, argument)

    def command(self, name: str) -> None:
        self.run("name => app.extensionManager.command.execute(name)", name)

    def until(self, condition: str, seconds: float = 60) -> None:
        self.page.wait_for_function(f"() => {condition}", timeout=seconds * 1000)

    def refresh(self) -> None:
        """Learn of model files that are newer than the page."""
        self.run("() => app.refreshComboInNodes()")
        self.until("!document.querySelector('.p-toast-message')")  # it says that it did

    def await_true(self, found: Callable[[], bool], seconds: float = 20) -> None:
        """Like `until`, for what is not to be said in the page's language."""
        end = time.monotonic() + seconds
        while not found():
            assert time.monotonic() < end, "it did not come true"
            self.page.wait_for_timeout(50)

    def load(self, workflow: dict, name: str = "test") -> None:
        """Into a workflow tab of its own, whole on the screen."""
        self.run(
            """async ([workflow, name]) => {
                const probe = 'probe' + Math.random()
                app.registerExtension({ name: probe, afterConfigureGraph(missing) { window.missing = missing } })
                await app.loadGraphData(workflow, true, true, name)
            }""",
            [workflow, name],
        )
        self.command("Comfy.Canvas.FitView")

    def change(self, kind: str | None = None, /, **values: Any) -> None:
        """Every widget of these names, on every node or on those of a kind, within subgraphs too. A single step stays one."""
        self.run(
            """([kind, values]) => {
                for (const graph of [app.rootGraph, ...app.rootGraph.subgraphs.values()])
                    for (const node of graph.nodes.filter(node => !kind || node.type === kind))
                        for (const widget of node.widgets ?? [])
                            if (widget.name in values && !(widget.name === "steps" && widget.value === 1))
                                widget.value = values[widget.name]
            }""",
            [kind, values],
        )

    def settle(self) -> None:
        """Wait until the canvas has not moved for three frames, in which the page draws what has changed."""
        self.run(
            """async () => {
                const frame = () => new Promise(requestAnimationFrame)
                const view = () => [app.canvas.ds.scale, ...app.canvas.ds.offset].join()
                for (let before, still = 0; still < 3;) {
                    await frame()
                    still = view() === before ? still + 1 : 0
                    before = view()
                }
            }"""
        )

    def overlaps(self) -> list[list[str]]:
        """Titles of nodes that lie on each other."""
        return self.run(
            """() => {
                const nodes = app.graph.nodes.map(node => [node.title, ...node.boundingRect])
                return nodes.flatMap(([title, x, y, w, h], i) => nodes.slice(i + 1)
                    .filter(other => x < other[1] + other[3] && other[1] < x + w && y < other[2] + other[4] && other[2] < y + h)
                    .map(other => [title, other[0]]))
            }"""
        )

    def complaints(self) -> list[str]:
        """What the page has to say against a workflow, in any of the ways it has."""
        shown = self.run(
            """() => [...document.querySelectorAll('.p-toast-message, [data-testid=error-overlay], [role=dialog]')]
                .filter(element => element.offsetParent).map(element => element.innerText)"""
        )
        missing = self.run("() => (window.missing ?? []).map(kind => 'missing ' + (kind.type ?? kind))")
        return [*missing, *shown, *self.errors]

    def queue(self) -> None:
        self.run(
            """() => {
                window.ended = null
                const kinds = ['execution_success', 'execution_error', 'execution_interrupted']
                for (const kind of kinds) app.api.addEventListener(kind, ({ detail }) => { window.ended = [kind, detail] }, { once: true })
            }"""
        )
        accepted = self.run("() => app.queuePrompt(0, 1)")
        assert accepted, json.dumps(self.run("() => app.extensionManager.lastNodeErrors"))

    def stop(self) -> None:
        """Whatever still runs or waits, so that its end is not taken for that of another run."""
        while any(self.client.get("/queue").values()):
            self.client.post("/queue", {"clear": True})
            self.client.interrupt()
            time.sleep(0.2)

    def finish(self, seconds: float = 300) -> None:
        """Wait for the end of what was queued, which must be a good one."""
        self.until("window.ended", seconds)
        kind, detail = self.run("() => window.ended")
        assert kind == "execution_success", detail

    def photograph(self, what: str) -> None:
        PICTURES.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=PICTURES / f"{self.name}-{what}.png")
