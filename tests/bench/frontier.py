"""Everything that follows a reward, on one figure of each world: what is reached, against what it costs.

On ShapesWorld, as in shapesworld.py, on the ring of ring.py, and on a cloud of sixteen Gaussians in 64 dimensions of which the ring's reward
sees two; with the samplers of those. Peers follow their papers (peers/), over a range of strengths. Ours have the nodes' default settings and
others that shapesworld.py measures, or on the mixtures those of ring.py and a range of caps; and there is a guidance network. Best of n keeps the
sample with the highest reward, and so do particles on ShapesWorld; on the mixtures they keep any, as q wants it. Cost is in calls of the model for
a picture, and in CPU time of sampling and choosing; judging is not counted, and the network's labels and training are not: finetune.py counts
them. A call that is followed by a pass back through the model counts once. Prints markdown tables, writes them as JSON and as figures into
output/frontier.

usage: OMP_NUM_THREADS=1 python tests/bench/frontier.py [MODELS_DIR] [--runs 2] [--only ring] [--methods shift,best] [--work DIR]
"""

import argparse
import math
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from itertools import chain, product
from pathlib import Path
from statistics import mean, median

sys.path.insert(0, str(Path(__file__).parents[1]))
from harness.inprocess import load_comfyui

load_comfyui()

import torch
from bench import networks, one_step, particles, ring
from bench.cost.report import Report, Row
from bench.peers.gradient_guidance import dps, flowchef
from bench.peers.noise_optimisation import noise_optimisation
from bench.peers.problem import Problem
from bench.selection import Contest
from bench.shapesworld import SCORES, BatchReward, Bench, Pictures, World, with_error
from comfy.model_patcher import ModelPatcher
from harness import environment
from reward_guidance.guidance.estimators import Settings, Smoothing
from reward_guidance.guidance.network.unet import GuidanceNetwork
from reward_guidance.guidance.training.loop import fit
from reward_guidance.nodes.wiring.patch_network import NetworkGuidance
from reward_guidance.nodes.wiring.patch_reward import RewardGuidance
from reward_guidance.tests.bench.shapesworld_network import learned
from reward_guidance.tests.harness.models import shapesworld
from reward_guidance.tests.standins.analytic import PlainReward, analytic_model
from reward_guidance.tests.standins.mixture import Mixture, energy_distance
from reward_guidance.tests.standins.ring import CLOUD, RING, ring_reward, truth
from reward_guidance.tests.tools.chart import draw_chart, in_rows
from torch import Tensor

COSTS = ("model calls", "CPU ms")
ITERATIONS = (10, 25, 50)
LEAPS = (1.0, 2.0)
"""Strengths of a network for a one-step generator."""
BACKWARD = {"jacobian": "every call", "denoised": "", "shift": ""}
"""Of the estimators, which pass back through the model."""
KNOWN = {"jacobian": "as LGD-MC", "denoised": "as MPGD", "shift": "ours"}
"""Whose formula they are."""
CAPS = (0.5, 2.0, 8.0)
FLOOR = 1e-3
"""Of energies in a figure."""
SHIFTS: dict[str, dict] = {
    "4 points, strength 2": {"smoothing": Smoothing(4), "strength": 2.0},
    "target 0.8, strength 3, momentum 0": {"target": 0.8, "strength": 3.0, "momentum": 0.0},
}
"""Settings of ours that shapesworld.py measures beside the nodes' own."""


@dataclass(frozen=True)
class Values:
    """One of each run."""

    runs: list[float]

    @property
    def mean(self) -> float:
        return mean(self.runs)

    def __str__(self) -> str:
        return with_error(self.runs)


@dataclass(frozen=True)
class Source:
    """A model, and a way to sample as many pictures by it as are judged at once."""

    model: ModelPatcher
    steps: int
    reward: PlainReward
    sample: Callable[[ModelPatcher, int], Tensor]
    """(the model or a patched clone, seed) -> latents (B,...)"""

    def problem(self, seed: int) -> Problem:
        return Problem(self.model, self.reward, lambda model, *_: self.sample(model, seed))


@dataclass(frozen=True)
class Ours:
    """A model guided by this pack."""

    name: str
    setting: str
    model: Callable[[], ModelPatcher]
    """Made, and what it needs learned, when it is asked for the first time."""
    backward: str = ""


class Arena(ABC):
    """Where methods meet."""

    name: str
    runs: range
    pictures: int
    """Judged in each run."""
    repeats = 1
    """Of each run, for its time."""
    measures: dict[str, str]
    source: Source
    one_step: Source | None = None
    strengths: Sequence[float]
    """Of peers."""

    @abstractmethod
    def estimators(self) -> Iterator[Ours]:
        """Of the pack."""

    @abstractmethod
    def learned(self) -> Iterator[Ours]:
        """What uses a guidance network."""

    def leaps(self) -> "Leaps":
        """A guidance network for the one-step generator, where there is one."""
        raise NotImplementedError

    @abstractmethod
    def population(self, n: int, run: int) -> Tensor:
        """Latents (B,...), each of one of n particles."""

    @abstractmethod
    def judge(self, latents: Tensor, run: int) -> dict[str, float]:
        """Every measure."""

    @abstractmethod
    def truth(self) -> dict[str, float]:
        """The same of q."""


class Shapes(Arena):
    name, measures, strengths = "ShapesWorld", SCORES | {"energy": "energy"}, (0.1, 0.25, 0.5, 1.0, 2.0)

    def __init__(
        self, models: Path, per_prompt: int, pool: int, temperature: float, steps: int, runs: range, work: Path
    ):
        world = World(models, cfg=1.0, steps=steps, sampler="euler_ancestral")
        self.bench = Bench(world, per_prompt, pool, temperature, candidates=0)
        self.runs, self.pictures = runs, per_prompt * len(world.prompts)
        self.source = self.of(world)
        self.one_step = self.of(World(models, cfg=1.0, steps=1, kind="one_step"))
        self.contest, self.work, self.models = Contest(self.bench, len(runs)), work, models

    def of(self, world: World) -> Source:
        per_prompt = self.bench.per_prompt
        return Source(
            world.pipeline.model,
            world.steps,
            BatchReward(world, per_prompt),
            lambda model, seed: world.sample(model, per_prompt, seed),
        )

    def by_reward(self, estimator: str = "shift", **options) -> RewardGuidance:
        return RewardGuidance(self.source.reward, estimator, Settings(temperature=self.bench.temperature, **options))

    def guided(self, estimator: str = "shift", **options) -> Callable[[], ModelPatcher]:
        return cache(lambda: self.by_reward(estimator, **options).attach(self.source.model))

    def estimators(self):
        for estimator in BACKWARD:
            yield Ours(f"`{estimator}` ({KNOWN[estimator]})", "", self.guided(estimator), BACKWARD[estimator])
        for name, options in SHIFTS.items():
            yield Ours("`shift` (ours)", name, self.guided(**options))

    def learned(self):
        network = cache(
            lambda: NetworkGuidance(learned(self.bench.world, self.work, 2000, 1500), 4.0).attach(self.source.model)
        )
        yield Ours("network (ours)", "", network)
        yield Ours("network and `shift` (ours)", "", cache(lambda: self.by_reward().attach(network())))

    def leaps(self):
        return Leaps(one_step.Shapes(self.models, self.bench.per_prompt, pool=32))

    def population(self, n: int, run: int) -> Tensor:
        first = run * self.bench.per_prompt
        return torch.stack([self.contest.population(n, first + i) for i in range(self.bench.per_prompt)], 1).flatten(
            0, 1
        )

    def judge(self, latents: Tensor, run: int) -> dict[str, float]:
        return self.bench.measure(Pictures.of(self.bench.world, latents))

    def truth(self) -> dict[str, float]:
        return self.bench.truth | {"energy": 0.0}


class Leaps:
    """Moves the noise of a one-step generator by a network that learned from the reward's gradient."""

    def __init__(self, arena: one_step.Arena):
        self.arena = arena

    @cached_property
    def network(self) -> GuidanceNetwork:
        with self.arena.opened():
            return one_step.leap(self.arena, steps=2000, run=0, temperature=self.arena.temperature, batch=32)

    def sample(self, strength: float, run: int) -> Tensor:
        with self.arena.opened():
            return self.arena.tilted(self.network, "leap", 1, strength, run)


class Points(Arena):
    """Of a mixture. Particles need noise on the way and have another sampler than the rest; of each population, one is kept at random."""

    measures, strengths, repeats = {"reward": "reward", "energy": "energy"}, (0.25, 0.5, 1.0, 2.0, 4.0), 3

    def __init__(self, name: str, mixture: Mixture, count: int, steps: int, runs: range):
        self.name, self.mixture, self.runs, self.pictures = name, mixture, runs, count
        model = analytic_model(mixture)
        self.source = Source(
            model, steps, PlainReward(ring_reward), lambda model, seed: ring.sample(model, seed, count, steps)
        )
        self.crowd = particles.Bench("euler_ancestral", steps, count, mixture)
        self.drawn = {run: truth(run, count, mixture=mixture) for run in self.runs}

    def estimators(self):
        for estimator, k, cap in product(BACKWARD, (0, 4), CAPS):
            name = f"`{estimator}`, k = {k} ({KNOWN[estimator]})"
            model = cache(partial(ring.by_reward, self.source.model, estimator, k, cap=cap))
            yield Ours(name, f"cap {cap}", model, BACKWARD[estimator])

    def learned(self):
        world = networks.World(self.mixture)
        training = partial(world.training, "weighted", "correction", 0, networks.LABELS, 4000, 64)
        yield Ours("network (ours)", "", cache(lambda: world.guided(fit(training()), "correction", self.source.model)))

    def population(self, n: int, run: int) -> Tensor:
        return self.crowd.particles(n, run)

    def judge(self, latents: Tensor, run: int) -> dict[str, float]:
        return {"reward": float(ring_reward(latents).mean()), "energy": energy_distance(latents, self.drawn[run])}

    def truth(self) -> dict[str, float]:
        return {"reward": mean(float(ring_reward(samples).mean()) for samples in self.drawn.values()), "energy": 0.0}


# --- methods


@dataclass(frozen=True)
class Method:
    curve: str
    """To which it belongs in the figure."""
    setting: str
    calls: int
    """Of the model for a picture."""
    draw: Callable[[int], tuple[Tensor, float]]
    """Run -> latents, and the CPU seconds they took."""
    backward: str = ""
    prepare: Callable[[], object] = lambda: None
    """What is not counted."""

    @property
    def name(self) -> str:
        return f"{self.curve}, {self.setting}" if self.setting else self.curve


def timed(draw: Callable[[int], Tensor]) -> Callable[[int], tuple[Tensor, float]]:
    def run(seed: int) -> tuple[Tensor, float]:
        began = time.process_time()
        return draw(seed), time.process_time() - began

    return run


class BestOf:
    """Of each picture the candidate with the highest reward. Candidates are drawn once, and paid for by each who has them; a single one is
    not looked at."""

    def __init__(self, source: Source, most: int):
        self.source, self.most = source, most
        self.sampled = cache(timed(partial(source.sample, source.model)))
        self.scored = cache(timed(lambda seed: source.problem(seed).scores(self.sampled(seed)[0])))

    def ready(self) -> None:
        """Load the model and encode the prompts, which nobody is to pay for."""
        self.scored(-1)

    def of(self, n: int, run: int) -> tuple[Tensor, float]:
        drawn = [self.sampled(run * self.most + i) for i in range(n)]
        judged = [self.scored(run * self.most + i) for i in range(n)] if n > 1 else []
        latents = torch.stack([each for each, _ in drawn])
        chosen = torch.stack([scores for scores, _ in judged]).argmax(0) if judged else 0
        return latents[chosen, torch.arange(latents.shape[1])], sum(seconds for _, seconds in drawn + judged)


def methods(arena: Arena, counts: Sequence[int], crowds: Sequence[int]) -> Iterator[Method]:
    source, steps = arena.source, arena.source.steps
    yield from choosing(source, counts, "unguided, best of n")
    for n in crowds:
        yield Method("particles (FK steering)", f"n = {n}", n * steps, timed(partial(arena.population, n)))
    for strength in arena.strengths:
        setting = f"strength {strength}"
        yield Method(
            "DPS, FreeDoM", setting, steps, timed(lambda run, s=strength: dps(source.problem(run), s)), "every call"
        )
        yield Method("FlowChef", setting, steps, timed(lambda run, s=strength: flowchef(source.problem(run), s)))
    for ours in chain(arena.estimators(), arena.learned()):
        draw = timed(lambda run, ours=ours: source.sample(ours.model(), run))
        yield Method(ours.name, ours.setting, steps, draw, ours.backward, ours.model)
    if arena.one_step:
        problem = arena.one_step.problem
        yield from choosing(arena.one_step, counts, "one step, best of n")
        for n in ITERATIONS:
            yield Method(
                "one step, ReNO",
                f"{n} iterations",
                n,
                timed(lambda run, n=n: noise_optimisation(problem(run), n)),
                "every call",
            )
        yield from leaping(arena.one_step, arena.leaps(), counts)


def leaping(generator: Source, leaps: Leaps, counts: Sequence[int]) -> Iterator[Method]:
    """A single one, in both strengths, and the best of several."""
    for strength in LEAPS:
        draw = timed(partial(leaps.sample, strength))
        yield Method("one step, network (ours)", f"strength {strength:g}", 1, draw, prepare=lambda: leaps.network)
    source = replace(generator, sample=lambda _, seed: leaps.sample(LEAPS[0], seed))
    yield from choosing(source, [n for n in counts if n > 1], "one step, network (ours), best of n")


def choosing(source: Source, counts: Sequence[int], curve: str) -> Iterator[Method]:
    best = BestOf(source, max(counts))
    for n in counts:
        yield Method(curve, f"n = {n}", n * source.steps, partial(best.of, n), prepare=best.ready)


# --- results


def measured(arena: Arena, method: Method) -> Row:
    method.prepare()
    drawn = [[method.draw(run) for _ in range(arena.repeats)] for run in arena.runs]
    found = [arena.judge(latents, run) for run, [(latents, _), *_] in zip(arena.runs, drawn, strict=True)]
    return {
        "method": method.name,
        "model calls": method.calls,
        "backward through the model": method.backward,
        "CPU ms": mean(median(seconds for _, seconds in each) for each in drawn) / arena.pictures * 1000,
        **{heading: Values([run[key] for run in found]) for key, heading in arena.measures.items()},
    }


def frontier(rows: Sequence[Row], cost: str, measure: str, aim: float) -> list[str]:
    """The methods that no other, at that cost or less, is better than; a reward beyond the truth's is no better than the truth's."""
    missed = lambda row: row[measure].mean if measure == "energy" else max(aim - row[measure].mean, 0)  # noqa: E731
    names, least = [], (math.inf, 0)
    for row in sorted(rows, key=lambda row: (row[cost], missed(row))):
        found = missed(row), row[cost]
        if found[0] < least[0] or found == least:
            least = found
            names.append(row["method"])
    return names


def charts(arena: Arena, rows: dict[str, list[Row]], aims: dict[str, float]) -> list[list]:
    """One for each measure and cost: rows of the table by their curve, and a line for the truth."""

    def chart(measure: str, cost: str, aim: float):
        curves = {
            curve.replace("`", ""): [(row[cost], row[measure].mean) for row in each] for curve, each in rows.items()
        }
        xs = [x for points in curves.values() for x, _ in points]
        curves["truth"] = [(min(xs), aim), (max(xs), aim)]
        floor, least = (FLOOR, f", {FLOOR:g} or less at the bottom") if measure == "energy" else (0.0, "")
        return draw_chart(
            f"{arena.name}: {measure}{least}", f"{cost} of a picture", curves, logarithmic=True, floor=floor
        )

    return [[chart(heading, cost, aims[key]) for cost in COSTS] for key, heading in arena.measures.items()]


def compare(arena: Arena, report: Report, chosen: Sequence[Method]) -> list[list]:
    rows: dict[str, list[Row]] = {}
    for method in chosen:
        row = measured(arena, method)
        report.add(arena.name, row)
        rows.setdefault(method.curve, []).append(row)
    every = [row for each in rows.values() for row in each]
    aims = arena.truth()
    report.add(
        arena.name,
        dict.fromkeys(every[0])
        | {"method": "truth"}
        | {heading: Values([aims[key]]) for key, heading in arena.measures.items()},
    )
    for key, measure in arena.measures.items():
        for cost in COSTS:
            names = "; ".join(frontier(every, cost, measure, aims[key]))
            report.add(f"{arena.name}: the frontier", {"measure": measure, "against": cost, "methods": names})
    return charts(arena, rows, aims)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "models", type=Path, nargs="?", default=None, help="where ShapesWorld lies; the cache if left out"
    )
    parser.add_argument("--only", choices=("shapesworld", "ring", "cloud"))
    parser.add_argument("--methods", default="", help="parts of the names of those to run; all if left out")
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--first-run", type=int, default=1, help="settings of ours were chosen on run 0 of ShapesWorld")
    parser.add_argument("--per-prompt", type=int, default=8)
    parser.add_argument("--pool", type=int, default=128)
    parser.add_argument("--steps", type=int, default=30, help="on ShapesWorld")
    parser.add_argument("--temperature", type=float, default=0.05, help="on ShapesWorld")
    parser.add_argument("--samples", type=int, default=4000, help="on the ring and the cloud")
    parser.add_argument("--most", type=int, default=16, help="samples to choose among, and particles")
    parser.add_argument(
        "--work", type=Path, default=None, help="where the network's samples are kept; the cache if left out"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[2] / "output" / "frontier")
    chosen = parser.parse_args()
    runs = range(chosen.first_run, chosen.first_run + chosen.runs)
    arenas = {
        "ring": lambda: Points("ring", RING, chosen.samples, 20, runs),
        "cloud": lambda: Points("cloud", CLOUD, chosen.samples, 20, runs),
        "shapesworld": lambda: Shapes(
            chosen.models or shapesworld(),
            chosen.per_prompt,
            chosen.pool,
            chosen.temperature,
            chosen.steps,
            runs,
            chosen.work or environment.cache() / "bench",
        ),
    }
    for name, make in arenas.items():
        if chosen.only in (None, name):
            arena = make()
            counts = [n for n in (1, 2, 4, 8, 16) if n <= chosen.most]
            known = methods(arena, counts, [n for n in (4, 16) if n <= chosen.most])
            taken = [each for each in known if any(part in each.name for part in chosen.methods.split(","))]
            in_rows(compare(arena, Report(chosen.out, name), taken)).save(chosen.out / f"{name}.png")


if __name__ == "__main__":
    main()
