"""Samples per second of what a guidance network learns from, and of learning from them: by resolution, network and number of processes."""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice, pairwise
from pathlib import Path

import torch
from reward_guidance.guidance.data.collection import SHARD, Collection
from reward_guidance.guidance.data.description import Description
from reward_guidance.guidance.data.samples import Sample
from reward_guidance.guidance.network.card import Base
from reward_guidance.guidance.network.unet import Text
from reward_guidance.guidance.training.recipe import plan_for, prepare
from reward_guidance.guidance.training.report import Fitting
from reward_guidance.tests.harness.environment import CHECKOUT

from . import clock
from .clock import Spread, by_turns, seconds
from .report import Report
from .scaling import EXPONENTS, exponent
from .sizes import DEVICE
from .steps import Effort
from .world import World

TABLE = "Training"
BATCH = 16


@dataclass(frozen=True)
class Sizes:
    family: str
    """Whose samples are collected."""
    sides: tuple[int, ...]
    """Of the pictures."""
    latents: tuple[tuple[int, int, int], ...]
    """That are learned from, of growing size."""
    networks: tuple[str, ...]
    processes: tuple[int, ...]
    """That share the work."""
    samples: int
    """That are collected at a time, by each process."""
    effort: Effort
    """Steps of sampling, and of training at a time."""


def rate(
    report: Report,
    what: str,
    of: str,
    pixels: object,
    processes: int,
    rates: Iterator[float] | Sequence[float],
    network: str = "",
) -> None:
    row = {
        "what": what,
        "of": of,
        "pixels": pixels,
        "network": network,
        "processes": processes,
        "samples per second": Spread.of(rates),
    }
    report.add(TABLE, row)


# --- collecting


@torch.inference_mode()
def collected(world: World, side: int, steps: int = 20, levels: int = 8) -> None:
    """A sample is `steps` steps, a score, and the model's answer at some noise levels. None goes backward."""
    latents = world.sample(world.noise(side, 1), steps).to(world.model.load_device)
    world.reward("PickScore", "vae")(latents).tolist()
    for _ in range(levels):
        world.sample(world.noise(side, 1), 1)


def collecting(report: Report, world: World, of: Sizes) -> None:
    turns = by_turns(
        {str(side): partial(seconds, partial(collected, world, side)) for side in of.sides}, of.effort.repeats
    )
    curve = [[turn[str(side)] for turn in turns] for side in of.sides]
    for side, times in zip(of.sides, curve, strict=True):
        rate(report, "collecting", world.name, side, 1, [1 / time for time in times])
    add_exponent(report, f"collecting from {world.name}: pixels a side", of.sides, curve)


def add_exponent(report: Report, along: str, places: Sequence[int], curve: Sequence[Sequence[float]]) -> None:
    row = {"model": "", "along": along, "from": places[0], "to": places[-1], "plain": None, "guided": None}
    report.add(EXPONENTS, row | {"what guidance adds": exponent(places, curve)})


def collectors(report: Report, of: Sizes, reduced: bool) -> None:
    """Processes that share the machine, by the clock on the wall."""
    for processes in of.processes:
        rates = [processes * of.samples / time for time in together(processes, of, reduced)]
        rate(report, "collecting, by the wall's clock", of.family, of.sides[0], processes, rates)


def together(processes: int, of: Sizes, reduced: bool) -> list[float]:
    """Seconds until the last is done."""
    command = [
        sys.executable,
        str(Path(__file__).with_name("collector.py")),
        of.family,
        str(of.sides[0]),
        str(of.samples),
    ]
    with ExitStack() as stack:
        started = [stack.enter_context(running(command + ["--reduced"] * reduced)) for _ in range(processes)]
        for process in started:
            heard(process, "ready")
        return [max(times) for times in (round_of(started) for _ in range(of.effort.repeats))]


def round_of(processes: Sequence[subprocess.Popen]) -> list[float]:
    for process in processes:
        print(file=process.stdin, flush=True)
    return [float(heard(process, "seconds")) for process in processes]


def heard(process: subprocess.Popen, word: str) -> str:
    """What it says behind the word."""
    for line in process.stdout or ():
        if line.startswith(word):
            return line.removeprefix(word)
    raise RuntimeError(f"{' '.join(process.args)} ended before it was {word}")


@contextmanager
def running(command: Sequence[str]) -> Iterator[subprocess.Popen]:
    """A process on one thread, gone at the end."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(list(command), cwd=CHECKOUT, text=True, env=environment, **pipes) as process:
        try:
            yield process
        finally:
            process.terminate()


# --- fitting


def fitting(report: Report, of: Sizes) -> None:
    """In this process: every network on latents of every size."""
    curves: dict[str, list[list[float]]] = {network: [] for network in of.networks}
    for shape in of.latents:
        with tempfile.TemporaryDirectory() as folder:
            collect(Path(folder), shape)
            for network, curve in curves.items():
                curve.append(times(Path(folder), network, of.effort))
                rate(report, "fitting", f"latents {shape}", 8 * shape[-1], 1, [1 / time for time in curve[-1]], network)
    for network, curve in curves.items():
        add_exponent(
            report, f"fitting a {network} network: pixels a side", [8 * shape[-1] for shape in of.latents], curve
        )


def times(folder: Path, network: str, effort: Effort) -> list[float]:
    """Seconds a sample, of so many steps at a time."""
    made = begun(folder, network, effort.steps * (effort.repeats + 1))
    learn = iter(made.training)
    turns = by_turns({"": lambda: seconds(lambda: list(islice(learn, effort.steps)))}, effort.repeats)
    return [turn[""] / effort.steps / BATCH for turn in turns]


def begun(folder: Path, network: str, steps: int) -> Fitting:
    samples = Collection.open(folder).load()
    plan = plan_for(samples.description, steps=steps, batch=BATCH, check_every=steps)
    return prepare(samples, plan, network, device=DEVICE)


def launched(report: Report, of: Sizes) -> None:
    """By the command line, as on a cluster, each process on a GPU of its own where there are any; by the clock on the wall."""
    shape, network = of.latents[0], of.networks[0]
    with tempfile.TemporaryDirectory() as folder:
        collect(Path(folder, "data"), shape)
        for count in of.processes:
            if clock.GPU and count > torch.cuda.device_count():
                continue
            rates = [BATCH * steps for steps in trained(Path(folder), network, count)]
            rate(report, "fitting, by the wall's clock", f"latents {shape}", 8 * shape[-1], count, rates, network)


def collect(folder: Path, shape: tuple[int, ...]) -> None:
    description = Description(
        Base("SD3", "SD3", shape[0], "Flow"), shape, 2, ("a cat", "a dog"), ("likes",), (0.0,), (1.0,), seed=0
    )
    collection = Collection.create(folder, description, Text(torch.randn(2, 77, 768), torch.randn(2, 768)))
    for numbers in collection.missing(2 * SHARD):
        collection.add(numbers, [sample(shape) for _ in numbers])


def sample(shape: tuple[int, ...]) -> Sample:
    clean = torch.randn(shape)
    return Sample(clean, clean.mean()[None], torch.rand(2) * 0.9 + 0.05, torch.zeros(2, *shape))


def trained(folder: Path, network: str, count: int, steps: int = 60) -> list[float]:
    """Steps per second, between those that are told of."""
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(count)] if count > 1 else []
    options = [
        "--steps",
        str(steps),
        "--batch",
        str(BATCH),
        "--size",
        network,
        "--out",
        str(folder / f"{count}.safetensors"),
    ]
    told = []
    with running([sys.executable, *launch, "-m", "guidance", str(folder / "data"), *options]) as process:
        for line in process.stdout or ():
            if step := re.match(r"step (\d+):", line):
                told.append((int(step[1]), time.monotonic()))
    return [(last - first) / (end - start) for (first, start), (last, end) in pairwise(told)]
