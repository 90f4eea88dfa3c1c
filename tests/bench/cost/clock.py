"""Where the time of a sampling step goes, and how much memory it takes."""

import json
import signal
import statistics
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import torch
from comfy.patcher_extension import WrappersMP
from reward_guidance.nodes.wiring.latent_reward import LatentReward
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from .sizes import DEVICE

GPU = DEVICE.type == "cuda"
T = TypeVar("T")


def now() -> Any:
    """A moment in the device's own time; of a CPU in that of this process, whatever else the machine does."""
    if not GPU:
        return time.process_time()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(start: Any, end: Any) -> float:
    """Seconds."""
    return start.elapsed_time(end) / 1000 if GPU else end - start


def wait() -> None:
    if GPU:
        torch.cuda.synchronize()


@dataclass
class Timeline:
    """Moments of one sampling run; each says what the time since the one before was spent on."""

    moments: list[tuple[int, str, Any]] = field(default_factory=list)
    step: int = 0

    def mark(self, part: str) -> None:
        self.moments.append((self.step, part, now()))

    def next_step(self, *_) -> None:
        """A sampler's callback."""
        self.mark("sampler")
        self.step += 1

    def steps(self) -> list[Counter[str]]:
        """Seconds spent on each part, of every step but the first, which also sets things up."""
        wait()
        spent: list[Counter[str]] = [Counter() for _ in range(self.step)]
        for (_, _, start), (step, part, end) in zip(self.moments, self.moments[1:], strict=False):
            if step < self.step:
                spent[step][part] += between(start, end)
        return spent[1:]


@contextmanager
def watched(reward: LatentReward, timeline: Timeline) -> Iterator[None]:
    """Inside, the timeline hears of decoding and scoring, forward and backward."""
    decode, score = reward.decoder.pixels, reward.loaded.reward.forward

    def pixels(latents: Tensor) -> Tensor:
        timeline.mark("ours")
        when_backward(latents, "decode backward")
        made = decode(latents)
        timeline.mark("decode")
        when_backward(made, "reward backward")
        return made

    def forward(*arguments) -> Tensor:
        timeline.mark("ours")
        scores = score(*arguments)
        timeline.mark("reward")
        return scores

    def when_backward(tensor: Tensor, part: str) -> None:
        if tensor.requires_grad:
            tensor.register_hook(lambda gradient: timeline.mark(part))

    with patch.object(reward.decoder, "pixels", pixels), patch.object(reward.loaded.reward, "forward", forward):
        yield


def clocked(model, timeline: Timeline, attach: Callable = lambda model: model):
    """A clone of the model whose calls the timeline hears of, patched by `attach` in between: what is not the model's is that one's."""
    outer = model.clone()
    outer.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "clock.outer", around(timeline, "sampler", "ours"))
    inner = attach(outer).clone()
    inner.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "clock.inner", around(timeline, "ours", "model"))
    return inner


def around(timeline: Timeline, before: str, after: str) -> Callable:
    def wrapper(executor, *arguments, **options):
        timeline.mark(before)
        out = executor(*arguments, **options)
        timeline.mark(after)
        return out

    return wrapper


# --- memory


def peak_bytes(run: Callable[[], object]) -> int:
    """The most memory that a run holds beyond what was held before it, of the device it runs on."""
    if not GPU:
        return traced_peak(run)
    wait()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    run()
    wait()
    return torch.cuda.max_memory_allocated() - held


def traced_peak(run: Callable[[], object]) -> int:
    """The same of PyTorch's allocator for the CPU, whose every allocation a trace of the profiler has."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        run()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "trace.json")
        trace.export_chrome_trace(str(file))
        events = [event for event in json.loads(file.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    events.sort(key=lambda event: event["ts"])
    held, most = 0, 0
    for event in events:
        held += event["args"]["Bytes"]
        most = max(most, held)
    return most


def synchronisations(run: Callable[[], object]) -> int | None:
    """How often a run makes the host wait for the GPU; None where there is none."""
    if not GPU:
        return None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


# --- repeats


@dataclass(frozen=True)
class Spread:
    """The median of repeats, and their standard deviation."""

    middle: float
    std: float

    @staticmethod
    def of(values: Iterable[float]) -> "Spread":
        values = list(values)
        return Spread(statistics.median(values), statistics.stdev(values) if len(values) > 1 else 0.0)

    def __str__(self) -> str:
        return f"{self.middle:.3g} ± {self.std:.1g}" if self.std else f"{self.middle:.3g}"


def by_turns(runs: Mapping[str, Callable[[], T]], repeats: int) -> list[dict[str, T]]:
    """What each run returns, one after the other, so that whatever slows the machine slows all of them; after a run of each to warm up."""
    for run in runs.values():
        run()
    return [{name: run() for name, run in runs.items()} for _ in range(repeats)]


def seconds(run: Callable[[], object]) -> float:
    """Of a whole run, the device's work done."""
    wait()
    start = now()
    run()
    end = now()
    wait()
    return between(start, end)


# --- time that is left


class OutOfTime(Exception):
    """A measurement takes longer than there is time for."""


@contextmanager
def within(limit: float) -> Iterator[None]:
    """Raises OutOfTime once so many seconds are over, wherever that is; and again every few, should something have caught it."""

    def ring(*_) -> None:
        raise OutOfTime(f"takes more than {limit:g} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, limit, 5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
