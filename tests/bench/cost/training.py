"""Samples per second of what a guidance network learns from, and of learning from them in one process and in two."""

import os
import re
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from reward_guidance.guidance.files import Base
from reward_guidance.guidance.network import Text
from reward_guidance.guidance.samples import SHARD, Collection, Description, Sample
from reward_guidance.tests.harness.environment import CHECKOUT

from .clock import GPU, Spread, by_turns, seconds
from .report import Report
from .world import World

BATCH = 16


def collecting(report: Report, world: World, side: int, steps: int = 20, levels: int = 8) -> None:
    """A sample is `steps` steps, a score, and the model's answer at some noise levels. None goes backward."""
    reward = world.reward("PickScore", "vae")

    @torch.inference_mode()
    def one() -> None:
        latents = world.sample(world.noise(side, 1), steps).to(world.model.load_device)
        reward(latents).tolist()
        for _ in range(levels):
            world.sample(world.noise(side, 1), 1)

    found = Spread.of([turn["one"] for turn in by_turns({"one": partial(seconds, one)}, 1)])
    row = {"what": "collecting", "of": world.name, "pixels": side, "processes": 1, "samples per second": 1 / found.middle}
    report.add("Training", row)


def fitting(report: Report, steps: int, reduced: bool) -> None:
    """By the command line, as on a cluster."""
    shape = (4, 16, 16) if reduced else (16, 128, 128)
    with tempfile.TemporaryDirectory() as folder:
        collect(Path(folder, "data"), shape)
        for processes in (1, 2) if not GPU or torch.cuda.device_count() > 1 else (1,):
            rate = BATCH * trained(Path(folder), processes, steps)
            report.add("Training", {"what": "fitting", "of": f"latents {shape}", "pixels": "", "processes": processes, "samples per second": rate})


def collect(folder: Path, shape: tuple[int, ...]) -> None:
    description = Description(Base("SD3", "SD3", shape[0], "Flow"), shape, 2, ("a cat", "a dog"), ("likes",), (0.0,), (1.0,), seed=0)
    collection = Collection.create(folder, description, Text(torch.randn(2, 77, 768), torch.randn(2, 768)))
    for numbers in collection.missing(2 * SHARD):
        collection.add(numbers, [sample(shape) for _ in numbers])


def sample(shape: tuple[int, ...]) -> Sample:
    clean = torch.randn(shape)
    return Sample(clean, clean.mean()[None], torch.rand(2) * 0.9 + 0.05, torch.zeros(2, *shape))


def trained(folder: Path, processes: int, steps: int) -> float:
    """Steps per second, from the first that is told of to the last."""
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    options = ["--steps", str(steps), "--batch", str(BATCH), "--size", "small", "--out", str(folder / "net.safetensors")]
    command = [sys.executable, *launch, "-m", "guidance", str(folder / "data"), *options]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **os.environ}
    told = []
    with subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment) as process:
        for line in process.stdout or ():
            if step := re.match(r"step (\d+):", line):
                told.append((int(step[1]), time.monotonic()))
    (first, start), (last, end) = told[0], told[-1]
    return (last - first) / (end - start)
