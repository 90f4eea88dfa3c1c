"""Sends the steps of running nodes to the page, where web/curve.js draws them.

Each step is one event `reward_guidance.step`. All nodes use one format:

    node      the execution id of the node, such as "5:3" for node 3 in subgraph 5
    workflow  the id of the queued workflow, or null
    run       start time of the run in seconds; a later run of a node replaces the earlier one
    index     number of the event in its run, from 0
    step      progress of the run, from 1 to `steps`
    series    name -> one number for each sample, null if it is not finite. The part before a slash names the axis:
              "reward" and "reward/held-out" share one axis, "loss" and "ess" have their own
    scattered names of the series whose i-th number does not always belong to the same sample: drawn without lines
    ...       facts of single nodes: sigma, model_calls, decoder, seeds, survivors

A page may be reloaded while a node runs. So the last runs are kept, and GET /reward_guidance/steps?workflow=ID returns
{node: [event, ...]} for one workflow. It reads and changes nothing else.
"""

import math
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aiohttp import web
from server import PromptServer


@dataclass(frozen=True, kw_only=True)
class NodeStep:
    """Progress of a running node, and numbers for every sample. See the event format in reporting.py."""

    step: int
    steps: int
    series: Mapping[str, Sequence[float]]
    scattered: tuple[str, ...] = ()
    """Names of the series whose i-th number does not always belong to the same sample."""
    run: int = 0
    """Identifies the run, if one reporter reports several."""


EVENT = "reward_guidance.step"
MOST_STEPS = 500
"""Events of a long run, about, evenly spaced. An event has the latest numbers of all series since the last event."""
MOST_EVENTS = 4 * MOST_STEPS
MOST_CURVES = 32
_kept: OrderedDict[tuple[str, str], list[dict]] = OrderedDict()
"""(workflow, node) -> the events of its last run."""


class Reporter:
    """Sends the steps of one node to the page. `history` holds the events of the last run."""

    def __init__(self, hidden, **facts: Any):
        self.node = hidden.unique_id
        self.facts = facts
        self.history: list[dict] = []
        self.run: Any = None

    def __call__(self, progress: NodeStep) -> bool:
        """Send an event for this step, or skip it in a long run. Returns whether an event was sent."""
        if not self.history or progress.run != self.run:
            self.begin(progress.run)
        self.series |= progress.series
        if not self.is_next(progress):
            return False
        self.history.append(self.event(progress))
        server = PromptServer.instance
        server.send_sync(EVENT, self.history[-1], server.client_id)
        return True

    def begin(self, run: Any) -> None:
        self.run = run
        self.history = []
        self.series: dict = {}
        # The hidden inputs may name another workflow, under which the node was cached.
        workflow = running_workflow()
        self.origin = {"node": self.node, "workflow": workflow, "run": time.time()}
        if workflow is not None:
            _kept[workflow, self.node] = self.history
            _kept.move_to_end((workflow, self.node))
            while len(_kept) > MOST_CURVES:
                _kept.popitem(last=False)

    def is_next(self, progress: NodeStep) -> bool:
        """Whether to send an event. Higher-order samplers call the model, and so report, several times in one step."""
        if not self.history or progress.steps <= MOST_STEPS:
            return len(self.history) < MOST_EVENTS
        return progress.step * MOST_STEPS // progress.steps > self.history[-1]["step"] * MOST_STEPS // progress.steps

    def event(self, progress: NodeStep) -> dict:
        series = {
            name: [value if math.isfinite(value) else None for value in values] for name, values in self.series.items()
        }
        self.series = {}
        return {**self.facts, **vars(progress), **self.origin, "index": len(self.history), "series": series}


def running() -> tuple | None:
    """The running item of ComfyUI's queue: number, id, prompt, extra data, and more. None if nothing runs."""
    items, _ = PromptServer.instance.prompt_queue.get_current_queue_volatile()
    return items[0] if items else None


def running_workflow() -> str | None:
    """The id of the running workflow, if it has one."""
    item = running()
    found = item[3] if item else None
    for name in ("extra_pnginfo", "workflow", "id"):
        found = found.get(name) if isinstance(found, dict) else None
    return found if isinstance(found, str) else None


def steps_of(workflow: str | None) -> dict[str, list[dict]]:
    """Node -> the events of its last run in this workflow, oldest run first."""
    return {node: list(events) for (owner, node), events in list(_kept.items()) if owner == workflow}


def serve_steps() -> None:
    """Add the route GET /reward_guidance/steps to ComfyUI's server."""

    @PromptServer.instance.routes.get("/reward_guidance/steps")
    async def steps(request: web.Request) -> web.Response:
        return web.json_response(steps_of(request.query.get("workflow")))
