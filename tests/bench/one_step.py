"""How to make a one-step generator follow a reward, each way at what it costs.

On ShapesWorld's distilled student, and on the ring of ring.py with a generator that is the ring's own probability flow. Noise tilted by what
labels say (`weighted`) or moved in one leap by the reward's gradient through the generator (`reward_gradient`), pictures corrected afterwards
by a network (the additive correction), the noise of each picture optimised on its own (ReNO), and the best of n. Networks are chosen by
their own loss; judging is of other noise than training, and of the same for every method. Prints markdown tables.

usage: OMP_NUM_THREADS=1 python tests/bench/one_step.py [MODELS_DIR] [--only ring] [--runs 2] [--labels 5000] [--steps 2000]
"""

import argparse
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from harness.inprocess import load_comfyui

load_comfyui()

import comfy.sample
import torch
from bench import ring
from bench.peers.noise_optimisation import noise_optimisation
from bench.peers.problem import Problem
from bench.shapesworld import BatchReward, Pictures, World, energy_to_truth, say, with_error
from comfy.model_patcher import ModelPatcher
from reward_guidance.guidance.data.batches import Batch, Source
from reward_guidance.guidance.data.samples import Texts
from reward_guidance.guidance.network.forms import FORMS
from reward_guidance.guidance.network.unet import Architecture, GuidanceNetwork, Text
from reward_guidance.guidance.one_step import PROCESS, FreshNoise, NoisePairs, tilted_noise
from reward_guidance.guidance.process import Diffusion, Process
from reward_guidance.guidance.randomness import generator
from reward_guidance.guidance.training.labels import label
from reward_guidance.guidance.training.loop import Training
from reward_guidance.guidance.training.objectives import Plan, Task
from reward_guidance.nodes.wiring.autograd import gradients, trainable
from reward_guidance.nodes.wiring.latent_reward import differentiable_context
from reward_guidance.nodes.wiring.model_info import text_of_conditioning
from reward_guidance.nodes.wiring.sample_maker import SampleMaker
from reward_guidance.nodes.wiring.training_setup import one_step_generator, with_static_model
from reward_guidance.tests.bench.shapesworld_network import numbers
from reward_guidance.tests.harness.models import shapesworld
from reward_guidance.tests.standins.analytic import PlainReward, analytic_model
from reward_guidance.tests.standins.mixture import Mixture, energy_distance
from reward_guidance.tests.standins.ring import RING, ring_reward, truth
from reward_guidance.tests.standins.shapesworld import world
from torch import Tensor

TRAINING, JUDGING = 1, 2
"""First keys of what is drawn."""
CHUNK = 64


# --- where methods meet


class Arena(ABC):
    """A one-step generator, a reward of its pictures, and what is measured of them."""

    name: str
    columns: Sequence[str]
    model: ModelPatcher
    shape: tuple[int, ...]
    texts: Texts
    """Of every prompt."""
    prompts: list[int]
    """Of every picture that is judged."""
    temperature: float
    sizes: dict

    @abstractmethod
    def encode(self, prompt: str) -> list: ...

    @abstractmethod
    def score(self, latents: Tensor, prompts: list[int]) -> Tensor:
        """Standardized rewards (B,), with a graph."""

    @abstractmethod
    def judge(self, latents: Tensor, run: int) -> dict[str, float]: ...

    @abstractmethod
    def problem(self, seed: int) -> Problem: ...

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Inside, `make` makes latents of noise and prompts, with a graph."""
        names = tuple(map(str, range(len(self.texts.pooled))))
        empty = {"samples": torch.zeros(1, *self.shape)}
        maker = SampleMaker(self.model, names, self.encode, "0", 1, 1.0, "euler", "simple", empty, CHUNK, None, None)  # type: ignore[arg-type]
        maker = with_static_model(maker)
        with trainable(), gradients(*self.problem(0).reward.modules), differentiable_context(maker.model):
            self.make = one_step_generator(maker)
            yield

    def noise(self, seed: int) -> Tensor:
        """Of every picture that is judged; as ComfyUI's samplers have it."""
        return comfy.sample.prepare_noise(torch.zeros(len(self.prompts), *self.shape), seed)

    @torch.no_grad()
    def pictures(self, noise: Tensor, prompts: list[int]) -> Tensor:
        """Latents, by one call of the generator for each."""
        return torch.cat([self.make(noise[i : i + CHUNK], prompts[i : i + CHUNK]) for i in range(0, len(noise), CHUNK)])

    def text(self) -> Text:
        return self.texts[torch.tensor(self.prompts)]

    def tilted(self, network: GuidanceNetwork, form: str, steps: int, strength: float, seed: int) -> Tensor:
        """Latents of noise that a network tilts."""
        return self.pictures(tilted_noise(network, self.noise(seed), self.text(), steps, strength, form), self.prompts)


class Shapes(Arena):
    name, columns = "ShapesWorld", ("reward", "held-out", "oracle", "energy", "to data")
    shape, temperature = (16, 8, 8), 0.1
    sizes = {"width": 24, "levels": 3, "blocks": 2}

    def __init__(self, models: Path, per_prompt: int, pool: int):
        self.world = World(models, cfg=1.0, steps=1, kind="one_step")
        pipeline = self.world.pipeline
        self.model, self.per_prompt = pipeline.model, per_prompt
        self.prompts = [i for i in range(len(self.world.prompts)) for _ in range(per_prompt)]
        texts = [text_of_conditioning(self.encode(str(i))) for i in range(len(self.world.prompts))]
        self.texts = Texts(
            [each.tokens[0].clone() for each in texts], torch.cat([each.pooled for each in texts]).clone()
        )
        self.reward = BatchReward(self.world, per_prompt)
        self.pool = Pictures.joined(
            [Pictures.of(self.world, self.world.sample(self.model, 32, 100_000 + i)) for i in range(pool // 32)]
        )
        rng = torch.Generator().manual_seed(0)
        true = world.render(world.depicted(world.wishes(2000, rng), rng), rng)
        with torch.no_grad():
            self.data = torch.cat([self.world.heldout.image_features(part) for part in true.split(100)])

    def encode(self, prompt: str) -> list:
        pipeline = self.world.pipeline
        return pipeline.short(pipeline.encode([self.world.prompts[int(prompt)]]))

    def score(self, latents, prompts):
        return self.reward.score(latents, [self.world.prompts[prompt] for prompt in prompts])

    def judge(self, latents, run):
        pictures = Pictures.of(self.world, latents)
        means = [float(part.mean()) for part in (pictures.reward, pictures.heldout, pictures.right)]
        nearest = torch.cdist(pictures.features.flatten(0, 1), self.data).min(1).values
        return dict(
            zip(
                self.columns,
                [*means, energy_to_truth(pictures, self.pool, self.temperature), float(nearest.mean())],
                strict=True,
            )
        )

    def problem(self, seed):
        return Problem(self.model, self.reward, lambda model, *_: self.world.sample(model, self.per_prompt, seed))


@dataclass(frozen=True)
class Flowed(Mixture):
    """A generator in place of a denoiser: where the probability flow from x ends."""

    def denoised(self, x, process, sigma, tilt=None):
        ratio = 0.01 ** (1 / 60) if float(sigma) > 0.01 else 1.0
        level = float(sigma)
        while level > 0.01:
            x = x + (ratio - 1) * (x - RING.denoised(x, process, level))
            level *= ratio
        return RING.denoised(x, process, level)


class Ring(Arena):
    name, columns = "ring", ("reward", "energy", "to data")
    shape, temperature = (2, 1, 1), 1.0
    sizes = {"width": 64, "levels": 1, "blocks": 1, "kernel": 1}

    def __init__(self, count: int):
        self.model = analytic_model(Flowed(RING.means, RING.std, RING.logits), flow=False)
        self.prompts, self.texts = [0] * count, Texts([torch.zeros(0, 0)], torch.zeros(1, 0))
        self.data = RING.sample(20_000, torch.Generator().manual_seed(5))

    def encode(self, prompt: str) -> list:
        return [[torch.zeros(1, 1, 1), {}]]

    def score(self, latents, prompts):
        return ring_reward(latents)

    def judge(self, latents, run):
        points = latents.flatten(1).double()
        nearest = torch.cdist(points, self.data).min(1).values
        values = (
            float(ring_reward(latents).mean()),
            energy_distance(points, truth(run, len(points))),
            float(nearest.mean()),
        )
        return dict(zip(self.columns, values, strict=True))

    def problem(self, seed):
        return Problem(
            self.model,
            PlainReward(ring_reward),
            lambda model, *_: ring.sample(model, seed, len(self.prompts), 1).view(-1, *self.shape),
        )


# --- networks


@dataclass(frozen=True)
class Labels:
    """Noise, and how its pictures are liked."""

    noise: Tensor
    prompts: Tensor
    pictures: Tensor
    weights: Tensor
    spread: float
    """Of the reward within a prompt: the unit of a plan's temperature."""


def labelled(arena: Arena, count: int) -> Labels:
    prompts = torch.arange(count) % len(arena.texts.pooled)
    noise = torch.randn(count, *arena.shape, generator=generator(TRAINING, 0))
    pictures = arena.pictures(noise, prompts.tolist())
    with torch.no_grad():
        chunks = [slice(i, i + CHUNK) for i in range(0, count, CHUNK)]
        scores = torch.cat([arena.score(pictures[part], prompts[part].tolist()) for part in chunks])
    _, health = label(scores, prompts, 1.0)
    weights, _ = label(scores, prompts, arena.temperature / health.std)
    return Labels(noise, prompts, pictures, weights, health.std)


@dataclass(frozen=True)
class Additive:
    """States of pure noise, the generator's pictures of it, and other pictures that are to be reached: a correction of the picture itself."""

    arena: Arena
    labels: Labels
    sigma: float

    def batch(self, size: int, key: tuple[int, ...], part: slice = slice(None)) -> Batch:
        rng = generator(*key)
        rows = torch.randint(len(self.labels.noise), (size,), generator=rng)[part]
        prompts = self.labels.prompts[rows]
        noise = torch.randn(size, *self.arena.shape, generator=rng)[part]
        made = self.arena.pictures(noise, prompts.tolist())
        sigma = torch.full((len(rows),), self.sigma)
        text = self.arena.texts[prompts]
        return Batch(
            self.labels.pictures[rows],
            self.sigma * noise,
            sigma,
            made,
            self.labels.weights[rows],
            text,
            prompts=prompts,
        )


def trained(
    arena: Arena, source: Source, held_out: Source, plan: Plan, process: Process, reward=None
) -> GuidanceNetwork:
    text = arena.text()
    sizes = {"tokens": text.tokens.shape[2], "pooled": text.pooled.shape[1], **arena.sizes}
    architecture = Architecture(arena.shape[0], FORMS[plan.form].inputs, **sizes)
    training = Training(source, Task(process, plan, reward), architecture, held_out, pooled=arena.texts.pooled)
    for progress in training:
        if progress.check is not None:
            say(f"{plan.objective} {progress.step}: {progress.check:.4f}")
    return training.result()


def plan(objective: str, form: str, steps: int, run: int, **options) -> Plan:
    return Plan(
        objective,
        form,
        steps,
        check_every=max(10, steps // 20),
        ema=min(Plan.ema, 1 - 10 / steps),
        seed=run,
        **{"batch": 64} | options,
    )


def split(labels: Labels) -> tuple[Labels, Labels]:
    """To train on, and held out."""
    kept = len(labels.noise) // 10
    names = ("noise", "prompts", "pictures", "weights")
    rows = lambda part: replace(labels, **{name: getattr(labels, name)[part] for name in names})  # noqa: E731
    return rows(slice(kept, None)), rows(slice(kept))


def weighted_tilt(arena: Arena, labels: Labels, steps: int, run: int) -> GuidanceNetwork:
    own, held_out = (NoisePairs(part.noise, part.weights, arena.texts, part.prompts) for part in split(labels))
    return trained(arena, own, held_out, plan("weighted", "noise", steps, run), PROCESS)


def leap(arena: Arena, steps: int, run: int, temperature: float, batch: int) -> GuidanceNetwork:
    source = FreshNoise(arena.shape, arena.texts)

    def reward(noise: Tensor, batch: Batch) -> Tensor:
        assert batch.prompts is not None
        return arena.score(arena.make(noise, batch.prompts.tolist()), batch.prompts.tolist())

    chosen = plan("reward_gradient", "leap", steps, run, temperature=temperature, batch=batch, learning_rate=5e-4)
    return trained(arena, source, source, chosen, PROCESS, reward)


def correction(arena: Arena, labels: Labels, steps: int, run: int) -> tuple[GuidanceNetwork, float]:
    sigma = float(arena.model.get_model_object("model_sampling").sigma_max)
    own, held_out = (Additive(arena, part, sigma) for part in split(labels))
    return trained(arena, own, held_out, plan("weighted", "correction", steps, run), Diffusion()), sigma


# --- the contest


class Contest:
    def __init__(self, arena: Arena, runs: int):
        self.arena, self.runs = arena, range(runs)
        heads = ["method", "generator calls", *arena.columns, "CPU ms a picture"]
        print(f"\n{arena.name}\n\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}")

    def add(self, name: str, calls: str, draw: Callable[[int], Tensor]) -> None:
        """draw: run -> latents of every picture that is judged."""
        found, seconds = [], 0.0
        for run in self.runs:
            began = time.process_time()
            latents = draw(run)
            seconds += time.process_time() - began
            found.append(self.arena.judge(latents, run))
        cells = [with_error([each[column] for each in found]) for column in self.arena.columns]
        print(
            f"| {name} | {calls} | {' | '.join(cells)} | {1000 * seconds / len(self.runs) / len(self.arena.prompts):.1f} |",
            flush=True,
        )

    def plain(self, seed: int) -> Tensor:
        return self.arena.pictures(self.arena.noise(seed), self.arena.prompts)

    def best_of(self, n: int, run: int) -> Tensor:
        drawn = torch.stack([self.plain(JUDGING + run * n + i) for i in range(n)])
        with torch.no_grad():
            scores = torch.stack([self.arena.problem(0).scores(latents) for latents in drawn])
        return drawn[scores.argmax(0), torch.arange(len(self.arena.prompts))]

    def optimised(self, iterations: int, run: int) -> Tensor:
        return noise_optimisation(self.arena.problem(JUDGING + run), iterations).clone()

    def tilted(self, network: GuidanceNetwork, form: str, steps: int, strength: float, run: int) -> Tensor:
        return self.arena.tilted(network, form, steps, strength, JUDGING + run)

    @torch.no_grad()
    def corrected(self, network: GuidanceNetwork, sigma: float, run: int) -> Tensor:
        noise = self.arena.noise(JUDGING + run)
        made, level = self.arena.pictures(noise, self.arena.prompts), torch.full((len(noise),), sigma)
        return FORMS["correction"](network, Diffusion(), lambda _: made, sigma * noise, level, self.arena.text())


def compare(arena: Arena, chosen: argparse.Namespace) -> None:
    contest = Contest(arena, chosen.runs)
    if not chosen.quick:
        contest.add(
            "noise optimisation (ReNO), 50 iterations", "50, each and back", lambda run: contest.optimised(50, run)
        )
    with arena.opened():
        at_one_call(contest, arena, chosen)


def at_one_call(contest: Contest, arena: Arena, chosen: argparse.Namespace) -> None:
    contest.add("unguided", "1", lambda run: contest.plain(JUDGING + run))
    for n in (2, 4, 8):
        contest.add(f"best of {n}", str(n), lambda run, n=n: contest.best_of(n, run))
    for temperature in chosen.temperatures:
        began = time.process_time()
        networks = [
            leap(arena, chosen.leap_steps, run, temperature * arena.temperature, chosen.batch)
            for run in range(chosen.runs)
        ]
        say(f"trained in {(time.process_time() - began) / chosen.runs:.0f} s each")
        for strength in chosen.strengths:
            name = f"network, `reward_gradient` at {temperature * arena.temperature:g}, strength {strength:g}"
            contest.add(name, "1", lambda run, s=strength, n=networks: contest.tilted(n[run], "leap", 1, s, run))
    if chosen.quick:
        return
    labels = labelled(arena, chosen.labels)
    networks = [weighted_tilt(arena, labels, chosen.steps, run) for run in range(chosen.runs)]
    for steps in (1, 4, 8):
        name = f"network, `weighted`, {steps} of its own steps"
        contest.add(name, "1", lambda run, k=steps, n=networks: contest.tilted(n[run], "noise", k, 1.0, run))
    pairs = [correction(arena, labels, chosen.steps, run) for run in range(chosen.runs)]
    contest.add("network, pictures corrected", "1", lambda run: contest.corrected(*pairs[run], run))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "models", type=Path, nargs="?", default=None, help="where ShapesWorld lies; the cache if left out"
    )
    parser.add_argument("--only", choices=("shapesworld", "ring"))
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--per-prompt", type=int, default=8)
    parser.add_argument("--pool", type=int, default=128)
    parser.add_argument("--count", type=int, default=2000, help="judged on the ring")
    parser.add_argument("--labels", type=int, default=5000)
    parser.add_argument("--steps", type=int, default=2000, help="of training on labels")
    parser.add_argument("--leap-steps", type=int, default=2000, help="of training by the gradient")
    parser.add_argument("--batch", type=int, default=32, help="of that")
    parser.add_argument("--temperatures", type=numbers, default=[1.0], help="of that, in units of the truth's")
    parser.add_argument("--strengths", type=numbers, default=[1.0, 2.0])
    parser.add_argument("--quick", action="store_true", help="only the leap")
    chosen = parser.parse_args()
    arenas = {
        "ring": lambda: Ring(chosen.count),
        "shapesworld": lambda: Shapes(chosen.models or shapesworld(), chosen.per_prompt, chosen.pool),
    }
    for name, make in arenas.items():
        if chosen.only in (None, name):
            compare(make(), chosen)


if __name__ == "__main__":
    main()
