"""Starts and stops a headless ComfyUI that has the pack the way a user has it: as a folder in custom_nodes."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from .environment import CHECKOUT, comfyui, say

PACK = "reward-guidance"
"""The pack's folder: no identifier, as most folders in custom_nodes are not."""
TESTS = CHECKOUT / "tests"
PACKS = {"another-pack": TESTS / "packs" / "redness", PACK: CHECKOUT, "probe": TESTS / "harness" / "probe"}
"""Folder in custom_nodes -> what it holds: the pack, one of somebody else that uses it, and one that watches."""
EXAMPLE = 128
"""Pixels of a side of the picture that every ComfyUI has."""
FOLDERS = ("models", "custom_nodes", "input", "output", "temp", "user")


class ServerError(RuntimeError):
    """ComfyUI did not start. The message ends with the last lines of its log."""


@dataclass(frozen=True)
class Server:
    url: str
    base: Path
    """Holds models, input, output, temp, user and custom_nodes of this server alone."""
    log: Path


@contextmanager
def serve(
    base: Path,
    options: Sequence[str] = (),
    port: int | None = None,
    variables: Mapping[str, str] = {},
    packs: Mapping[str, Path] = PACKS,
    timeout: float = 300,
) -> Iterator[Server]:
    """A running server over the folder `base`; ComfyUI's own folder stays as it is."""
    install(base, packs)
    port = port or free_port()
    server = Server(f"http://127.0.0.1:{port}", base, base / "server.log")
    with open(server.log, "w") as log:
        process = subprocess.Popen(
            command(base, port, packs, options),
            cwd=comfyui(),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**isolated(), **variables},
        )
    try:
        with interrupt_on_terminate():
            wait_until_ready(server, process, timeout)
            yield server
    finally:
        stop(process)


def install(base: Path, packs: Mapping[str, Path]) -> None:
    for name in FOLDERS:
        (base / name).mkdir(parents=True, exist_ok=True)
    with Image.open(comfyui() / "input" / "example.png") as picture:  # a large one takes the node Canny a minute
        picture.resize((EXAMPLE, EXAMPLE)).save(base / "input" / "example.png")
    for name, source in packs.items():
        add_pack(source, base / "custom_nodes" / name)


def add_pack(source: Path, target: Path) -> None:
    """A link for speed; a copy of the files that git knows where links cannot be made."""
    if target.is_symlink():
        target.unlink()
    shutil.rmtree(target, ignore_errors=True)
    try:
        target.symlink_to(source, target_is_directory=True)
    except OSError:
        listing = subprocess.run(["git", "ls-files"], cwd=source, check=True, capture_output=True, text=True).stdout
        for name in listing.splitlines():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / name, target / name)


def command(base: Path, port: int, packs: Iterable[str], options: Sequence[str]) -> list[str]:
    fixed = [
        "--base-directory",
        str(base),
        "--listen",
        "127.0.0.1",
        "--port",
        str(port),
        "--disable-auto-launch",
        "--disable-api-nodes",
    ]
    only = ["--disable-all-custom-nodes", "--whitelist-custom-nodes", *packs]
    database = ["--database-url", "sqlite:///:memory:"]
    device = [] if torch.cuda.is_available() or torch.backends.mps.is_available() else ["--cpu"]
    return [sys.executable, "main.py", *fixed, *only, *database, *device, *options]


def isolated() -> dict[str, str]:
    """The server needs no network; without this, libraries look for updates of models."""
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
        "PYTHONUNBUFFERED": "1",
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until_ready(server: Server, process: subprocess.Popen, timeout: float) -> None:
    started = time.monotonic()
    say("starting ComfyUI")
    while not answers(server.url):
        if process.poll() is not None:
            raise ServerError(f"ComfyUI ended with code {process.returncode} while starting.\n{tail(server.log)}")
        if time.monotonic() - started > timeout:
            raise ServerError(f"ComfyUI did not answer within {timeout:.0f} s.\n{tail(server.log)}")
        time.sleep(0.2)
    say(f"ComfyUI answers at {server.url} after {time.monotonic() - started:.0f} s")


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/system_stats", timeout=10):
            return True
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def tail(log: Path, lines: int = 40) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def stop(process: subprocess.Popen) -> None:
    """End the server and whatever it started."""
    for sign, patience in ((signal.SIGTERM, 10), (signal.SIGKILL, 10)):
        try:
            os.killpg(process.pid, sign)
            process.wait(patience)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


@contextmanager
def interrupt_on_terminate() -> Iterator[None]:
    """Let a terminated run still stop its server, as an interrupted one does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
