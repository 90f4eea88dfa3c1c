"""What nodes tell the page while they run; web/curve.js draws it.

Every step is one event, `reward_guidance.step`, of one format for all nodes:

    node      whose curve it is: an execution id, "5:3" for node 3 within subgraph 5
    workflow  the id of the workflow that was queued, or null
    run       when the run began, in seconds; a later run of a node replaces the one before
    index     the place of the step among those told of its run, from 0
    step      how far the run is, from 1 to `steps`
    series    name -> a number for each sample, null for one that is not finite. What stands before a slash names the axis: "reward" and
              "reward/held-out" share one, "loss" and "ess" have their own.
    scattered the series whose i-th numbers are not of one sample throughout, so that no line may join them
    ...       facts of the node's own: sigma, model_calls, decoder, seeds, survivors

A page may be reloaded while a node runs: the last runs are kept, and GET /reward_guidance/steps?workflow=ID answers {node: [event, ...]} of
one workflow. It changes nothing and reads nothing else.
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
    """What is reported while a node runs: how far it is, and numbers for every sample. See reporting.py."""

    step: int
    steps: int
    series: Mapping[str, Sequence[float]]
    scattered: tuple[str, ...] = ()
    """The series whose i-th numbers are not of one sample throughout the run."""
    run: int = 0
    """Tells apart the runs that one reporter hears of."""


EVENT = "reward_guidance.step"
MOST_STEPS = 500
"""About so many are told of a long run, evenly spaced; each with the latest numbers of every series since the one before."""
MOST_EVENTS = 4 * MOST_STEPS
MOST_CURVES = 32
_kept: OrderedDict[tuple[str, str], list[dict]] = OrderedDict()
"""(workflow, node) -> the events of its last run."""


class Reporter:
    """Tells the page of the steps of one node. `history` has those of the last run."""

    def __init__(self, hidden, **facts: Any):
        self.node = hidden.unique_id
        self.facts = facts
        self.history: list[dict] = []
        self.run: Any = None

    def __call__(self, progress: NodeStep) -> bool:
        """Whether the page was told of this step: of a long run it hears of some."""
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
        # Not of the hidden inputs: the node may have been cached under another workflow.
        workflow = running_workflow()
        self.origin = {"node": self.node, "workflow": workflow, "run": time.time()}
        if workflow is not None:
            _kept[workflow, self.node] = self.history
            _kept.move_to_end((workflow, self.node))
            while len(_kept) > MOST_CURVES:
                _kept.popitem(last=False)

    def is_next(self, progress: NodeStep) -> bool:
        """Whether to tell of it. A step may be told several times: samplers of higher order ask the model more than once."""
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
    """The item of ComfyUI's queue that is being executed: its number, its id, the prompt, extra data, and more."""
    items, _ = PromptServer.instance.prompt_queue.get_current_queue_volatile()
    return items[0] if items else None


def running_workflow() -> str | None:
    """The id of the workflow whose prompt is being executed."""
    item = running()
    found = item[3] if item else None
    for name in ("extra_pnginfo", "workflow", "id"):
        found = found.get(name) if isinstance(found, dict) else None
    return found if isinstance(found, str) else None


def steps_of(workflow: str | None) -> dict[str, list[dict]]:
    """Node -> the events of its last run in this workflow, oldest run first."""
    return {node: list(events) for (owner, node), events in list(_kept.items()) if owner == workflow}


def serve_steps() -> None:
    @PromptServer.instance.routes.get("/reward_guidance/steps")
    async def steps(request: web.Request) -> web.Response:
        return web.json_response(steps_of(request.query.get("workflow")))
