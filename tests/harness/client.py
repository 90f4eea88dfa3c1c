"""Talks to a running ComfyUI: queue a prompt, follow it, fetch what it made."""

import asyncio
import io
import json
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from PIL import Image

Prompt = dict[str, dict[str, Any]]
"""A graph in API format: node id -> class_type and inputs."""
Event = tuple[str, dict[str, Any]]
TEXT_UNDER_NODE = 3
"""ComfyUI's number for messages of this kind."""


@dataclass(frozen=True)
class Result:
    outputs: dict[str, dict] = field(default_factory=dict)
    """Node id -> what the node shows."""
    events: list[Event] = field(default_factory=list)
    error: str | None = None
    seconds: float = 0.0
    node_seconds: dict[str, float] = field(default_factory=dict)

    def of(self, kind: str) -> list[dict]:
        """The data of all events of one kind."""
        return [data for name, data in self.events if name == kind]

    @property
    def saved(self) -> list[dict]:
        """The pictures and videos that went into the output folder."""
        return [
            file for output in self.outputs.values() for file in output.get("images", []) if file["type"] == "output"
        ]

    @property
    def model_calls(self) -> int:
        """Of a model that went through a ProbeModelCalls node."""
        return len(self.of("probe.model_call"))

    def check(self) -> "Result":
        if self.error:
            raise RuntimeError(self.error)
        return self


class Client:
    def __init__(self, url: str):
        self.url = url

    def run(
        self, prompt: Prompt, on_event: Callable[[str, dict], None] | None = None, timeout: float = 600, **extra_data
    ) -> Result:
        """Queue a prompt and wait for its end, good or bad."""
        return asyncio.run(asyncio.wait_for(self._run(prompt, on_event or (lambda *_: None), extra_data), timeout))

    async def _run(self, prompt: Prompt, on_event: Callable[[str, dict], None], extra_data: dict) -> Result:
        name = uuid.uuid4().hex
        body = {"prompt": prompt, "client_id": name, "extra_data": extra_data}
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(f"{self.url}/ws?clientId={name}", max_msg_size=0) as socket,
        ):
            started = time.monotonic()
            async with session.post(f"{self.url}/prompt", json=body) as answer:
                queued = await answer.json()
            if answer.status != 200:
                return Result(error=refusal(queued))
            events, node_seconds = await follow(socket, queued["prompt_id"], on_event)
        seconds = time.monotonic() - started
        outputs = self.get(f"/history/{queued['prompt_id']}")[queued["prompt_id"]]["outputs"]
        return Result(outputs, events, failure(events), seconds, node_seconds)

    def get(self, path: str) -> Any:
        return json.loads(self.fetch(path))

    def fetch(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return answer.read()

    def post(self, path: str, data: dict | None = None) -> bytes:
        body = json.dumps(data or {}).encode()
        request = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"}, method="POST")
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()

    def object_info(self) -> dict[str, dict]:
        return self.get("/object_info")

    def interrupt(self) -> None:
        self.post("/interrupt")

    def free(self) -> None:
        """Unload the models and forget every node's output."""
        self.post("/free", {"unload_models": True, "free_memory": True})

    def images(self, result: Result, node: str | None = None) -> list[Image.Image]:
        """The pictures of one node, or of all."""
        chosen = [result.outputs[node]] if node else result.outputs.values()
        return [self.image(file) for output in chosen for file in output.get("images", [])]

    def image(self, file: dict) -> Image.Image:
        return Image.open(self.open(file)).convert("RGB")

    def open(self, file: dict) -> io.BytesIO:
        """A file that a node shows."""
        return io.BytesIO(self.fetch("/view?" + urllib.parse.urlencode(file)))


async def follow(socket, prompt_id: str, on_event: Callable[[str, dict], None]) -> tuple[list[Event], dict[str, float]]:
    """All events up to the end of a prompt, and the time that each node took."""
    events: list[Event] = []
    node_seconds: dict[str, float] = {}
    node, since = None, time.monotonic()
    async for message in socket:
        if message.type not in (aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY):
            continue
        kind, data = read(message.data)
        events.append((kind, data))
        on_event(kind, data)
        if kind == "executing" and data.get("prompt_id") == prompt_id:
            now = time.monotonic()
            if node:
                node_seconds[node] = node_seconds.get(node, 0) + now - since
            node, since = data["node"], now
            if node is None:
                return events, node_seconds
    raise ConnectionError("ComfyUI went away while it ran the prompt.")


def read(message: str | bytes) -> Event:
    """One message of the server. Previews carry their size, lines of text the node under which they stand."""
    if isinstance(message, str):
        event = json.loads(message)
        return event["type"], event.get("data") or {}
    kind, start = (int.from_bytes(message[i : i + 4], "big") for i in (0, 4))
    if kind == TEXT_UNDER_NODE:
        return "text", {"node": message[8 : 8 + start].decode(), "text": message[8 + start :].decode()}
    return "preview", {"bytes": len(message)}


def failure(events: list[Event]) -> str | None:
    for kind, data in events:
        if kind == "execution_error":
            return data["exception_message"].strip()
        if kind == "execution_interrupted":
            return "interrupted"
    return None


def refusal(answer: dict) -> str:
    """Why a prompt was not even queued."""
    nodes = answer.get("node_errors") or {}
    details = [
        f"{node['class_type']}: {error['message']} ({error['details']})"
        for node in nodes.values()
        for error in node["errors"]
    ]
    return "; ".join(details) or answer["error"]["message"]
