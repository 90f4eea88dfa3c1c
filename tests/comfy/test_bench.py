"""The benchmark of costs: every line of it, on the CPU, and once more as on a GPU."""

import math
import runpy
import sys
import time
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCH = Path(__file__).parents[1] / "bench"
TABLES = {
    "A guided step beside the plain one": 10,
    "What would bring what": 7,
    "An image, beside what could be used instead": 10,
    "How the cost grows": 10,
    "How fast it grows: e in cost ~ x^e": 7,
    "Training": 6,
}


class Event:
    """Of torch.cuda, in the time of this process."""

    def __init__(self, enable_timing: bool):
        assert enable_timing

    def record(self) -> None:
        self.moment = time.process_time()

    def elapsed_time(self, end: "Event") -> float:
        return (end.moment - self.moment) * 1000


def run_path(monkeypatch, file: Path) -> dict:
    """What a script defines; it takes the first place of sys.path for its own folder."""
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    return runpy.run_path(str(file))


@pytest.fixture
def cost(monkeypatch):
    return run_path(monkeypatch, BENCH / "cost" / "__main__.py")


@pytest.fixture
def bench(cost, tmp_path):
    return lambda **changes: cost["Bench"](
        replace(cost["PROFILES"]["trial"], **changes), cost["Report"](tmp_path, "trial"), time.monotonic()
    )


@pytest.fixture
def as_on_gpu(cost, monkeypatch):
    """With a GPU that has no device: all stays on the CPU, in bfloat16, and is timed by events."""
    from bench.cost import clock, sizes, world

    allocated, world_rewards = count(), world.managed
    world_rewards.cache_clear()
    monkeypatch.setattr(clock, "GPU", True)
    monkeypatch.setattr(sizes, "DTYPE", torch.bfloat16)
    monkeypatch.setattr("comfy.model_management.vae_dtype", lambda *_: torch.bfloat16)
    fakes = {
        "Event": Event,
        "synchronize": lambda: None,
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 0,
        "max_memory_allocated": lambda: next(allocated) << 20,
        "set_sync_debug_mode": lambda mode: None,
        "get_device_name": lambda: "no GPU",
        "device_count": lambda: 1,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    yield
    world_rewards.cache_clear()


def test_every_part_is_measured(bench):
    made = bench(seconds=1200)
    made.run()
    assert made.report.left_out == []
    assert {name: len(rows) for name, rows in made.report.tables.items()} == TABLES
    for row in made.report.tables["A guided step beside the plain one"]:
        assert row["guided / plain"].middle > 0
        assert row["weights, MB"] > 0
    assert all(row["samples per second"].middle > 0 for row in made.report.tables["Training"])
    assert (made.report.folder / "trial.json").is_file() and (made.report.folder / "trial_batch.png").is_file()


def test_every_part_is_measured_as_on_a_gpu(bench, as_on_gpu):
    made = bench(seconds=1200)
    alone = replace(made.profile.training, processes=())
    made.profile = replace(made.profile, training=alone)
    made.run()
    assert made.report.left_out == []
    assert {name: len(rows) for name, rows in made.report.tables.items()} == TABLES | {"Training": 4}
    assert made.world.model.model.diffusion_model.dtype == torch.bfloat16
    assert '"device": "no GPU"' in (made.report.folder / "trial.json").read_text()
    for row in made.report.tables["A guided step beside the plain one"]:
        assert row["guided step, ms"].middle > 0
        assert row["peak over plain, MB"] > 0
        assert row["waits over plain, 2 steps"] == 0


def test_what_fails_is_named_and_the_rest_goes_on(bench, capsys):
    made, seen = bench(), []

    def fail() -> None:
        raise KeyError("weights")

    made.part("one", fail)
    made.part("another", lambda: seen.append(1))
    assert made.report.left_out == ["one: KeyError: 'weights'"] and seen == [1]
    assert "KeyError" in capsys.readouterr().err


def test_what_takes_too_long_is_stopped_and_named(bench):
    made, start = bench(seconds=2, longest=0.25), time.monotonic()
    made.part("an endless part", lambda: time.sleep(30))
    assert time.monotonic() - start < 2
    assert made.report.left_out == ["an endless part, for lack of time: it takes more than 0.5 s"]
    made.end = time.monotonic()
    made.part("the next", lambda: pytest.fail("there was no time left"))
    assert made.report.left_out[1:] == ["the next, for lack of time"]


def test_sizes_are_the_published_ones(cost):
    from bench.cost import sizes

    for name, family in sizes.FAMILIES.items():
        made = sizes.base_model(family, False, torch.device("meta")).diffusion_model
        assert sum(parameter.numel() for parameter in made.parameters()) == family.parameters, name


def test_an_exponent_is_that_of_the_power(cost):
    from bench.cost.scaling import exponent

    assert exponent([1, 2, 5], [[3.0, 1.0], [12.0, 2.0], [75.0, 5.0]]).middle == pytest.approx(1.5)  # of x² and of x
    assert exponent([1, 2], [[1.0], [-0.1]]) is None


def test_the_floor_counts_what_is_left_out(cost, monkeypatch):
    passes = run_path(monkeypatch, BENCH / "passes.py")
    prices, least = passes["published"]("SD1.5"), passes["least"]("SD1.5")
    assert prices["model"] == pytest.approx(0.8e12, rel=0.02)
    floor = passes["floor"]("SD1.5", prices)
    order = ["latent_rgb", "taesd, quarter size", "taesd, half size", "taesd, whole size", "vae"]
    assert sorted(order, key=floor.__getitem__) == order
    assert 1 < floor["guidance network"] < 1.03
    assert all(0 < each.fused < each.seconds < math.inf for each in least.values())


def test_memory_is_what_is_held_at_once(cost):
    """Without a graph, what goes in and comes out of one operation; with one, what each keeps for the way back."""
    from bench.cost.memory import held

    numbers, deep = 100, 50
    assert held(lambda: torch.empty(numbers, device="meta") + 1 + 1 + 1) == 2 * 2 * numbers

    def there_and_back():
        x = torch.empty(numbers, device="meta", requires_grad=True)
        for _ in range(deep):
            x = x.exp()
        x.sum().backward()

    assert deep <= held(there_and_back) / (2 * numbers) <= deep + 4


def test_a_frontier_is_of_what_nothing_cheaper_is_as_near_to_the_truth_as(monkeypatch):
    frontier = run_path(monkeypatch, BENCH / "frontier.py")["frontier"]
    costs = {"slow": 30, "cheap": 10, "worse": 20, "good": 20, "better": 20, "beyond": 40}
    found = {"cheap": 0.1, "worse": 0.05, "good": 0.5, "better": 0.55, "slow": 0.4, "beyond": 0.9}
    value = lambda number: SimpleNamespace(mean=number)  # noqa: E731
    rows = [
        {"method": name, "calls": costs[name], "reward": value(each), "energy": value(-each)}
        for name, each in found.items()
    ]
    assert frontier(rows, "calls", "reward", 0.6) == ["cheap", "better", "beyond"]
    assert frontier(rows, "calls", "reward", 0.5) == ["cheap", "good", "better"]  # what passes the truth gains nothing
    assert frontier(rows, "calls", "energy", 0.0) == ["cheap", "better", "beyond"]
