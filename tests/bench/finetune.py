"""What a guidance network costs beside a LoRA finetune by reward backpropagation, to the same held-out reward.

On ShapesWorld's diffusion model. The finetune samples without a graph, goes on with one through the last calls of the model, decodes, and
climbs the reward (DRaFT, arXiv 2309.17400; ReFL, arXiv 2304.05977); it stops at its best held-out reward on pictures kept for validation.
A network is followed alone, and beside a weak training-free guidance, which costs nothing in training, but a look at the reward in every step of
every picture that is made. Passes are counted by hooks, one for each picture that goes through; FLOPs are those of one pass, measured, times the
count. Seconds are of one CPU core. Prints markdown tables.

usage: python tests/bench/finetune.py [MODELS_DIR] [--recipes refl,refl-10] [--networks 500-short,1000-lean] [--work DIR]
"""

import argparse
import copy
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from harness.inprocess import load_comfyui

load_comfyui()

import comfy.sample
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from comfy.weight_adapter import LoRAAdapter
from reward_guidance.guidance.data.collection import SHARD
from reward_guidance.guidance.network.unet import Architecture
from reward_guidance.guidance.process import Diffusion
from reward_guidance.guidance.randomness import generator
from reward_guidance.guidance.rewards import evaluate
from reward_guidance.nodes.wiring.autograd import differentiable_model
from reward_guidance.nodes.wiring.loaded import LoadedNetwork, manage_network
from reward_guidance.nodes.wiring.patch_network import NetworkGuidance
from reward_guidance.tests.bench import passes
from reward_guidance.tests.bench.shapesworld import SCORES, Bench, Pictures, World, energy_to_truth, say
from reward_guidance.tests.bench.shapesworld_network import Collector, beside, first, numbers, prepared
from reward_guidance.tests.harness.environment import cache
from reward_guidance.tests.harness.models import shapesworld
from reward_guidance.tests.standins.shapesworld import world
from torch import Tensor, nn

VALIDATION_SEED = 777
TUNED, GUIDED = "euler", "euler_ancestral"
"""Samplers of a finetuned model, which learned from that one, and of a guided one: each does better with its own."""
WITH_TARGET = {"target": 0.8, "momentum": 0.0}
"""Of the training-free guidance, as in frontier.py."""
SHAPE = 16, 8, 8


# --- counting


class Tally(Counter):
    """Passes of pictures through modules, by the module's name, and CPU seconds under `seconds`."""

    @contextmanager
    def counting(self, modules: Sequence[tuple[str, nn.Module]]) -> Iterator[None]:
        hooks = [module.register_forward_hook(self.counter(name)) for name, module in modules]
        began = time.process_time()
        yield
        self["seconds"] += time.process_time() - began
        for hook in hooks:
            hook.remove()

    def counter(self, name: str) -> Callable:
        def count(_, inputs, output) -> None:
            rows = len(inputs[0] if isinstance(inputs[0], Tensor) else inputs[0][0])
            self[name] += rows
            made = output[0] if isinstance(output, tuple) else output
            if made.requires_grad:
                self[f"{name} backward"] += rows

        return count

    def times(self, factor: float) -> "Tally":
        return Tally({name: count * factor for name, count in self.items()})

    def plus(self, other: "Tally") -> "Tally":
        return Tally({name: self[name] + other[name] for name in self | other})

    def flops(self, prices: dict[str, float]) -> float:
        return sum(count * prices[name] for name, count in self.items() if name != "seconds")


def parts(world_: World) -> list[tuple[str, nn.Module]]:
    return [
        ("model", world_.pipeline.model.model.diffusion_model),
        ("decoder", world_.pipeline.decoder),
        ("reward", world_.reward),
    ]


# --- judging


class Judge:
    """Pictures of every prompt, always from the same noise, by a sampler."""

    def __init__(self, bench: Bench, sampler: str):
        self.bench, self.world = bench, copy.copy(bench.world)
        self.world.sampler = sampler

    def __call__(self, model: ModelPatcher) -> tuple[float, float]:
        """Reward and held-out reward of the pictures for validation, standardized."""
        pictures = self.pictures(model, VALIDATION_SEED)
        return float(pictures.reward.mean()), float(pictures.heldout.mean())

    def row(self, name: str, model: ModelPatcher, validated: float) -> None:
        """Of the pictures for the test."""
        found = self.pictures(model, *self.bench.seeds)
        energy = energy_to_truth(found, self.bench.pool, self.bench.temperature)
        values = [validated, *(float(getattr(found, what).mean()) for what in SCORES), energy, found.diversity]
        print(f"| {name} | {self.world.sampler} | {' | '.join(f'{value:.3f}' for value in values)} |", flush=True)

    def pictures(self, model: ModelPatcher, seed: int) -> Pictures:
        return Pictures.of(self.world, self.world.sample(model, self.bench.per_prompt, seed))


# --- the finetune


@dataclass(frozen=True)
class Recipe:
    """How to climb a reward."""

    last: int = 1
    """Calls of the model with a graph, K of DRaFT-K; 0 is ReFL: one call, anywhere in the last half, whose D is judged."""
    learning_rate: float = 3e-3
    penalty: float = 0.0
    """Weight of ((D - D of the model as it was)/s)², s the posterior's standard deviation: the KL divergence of a step, by element."""
    rank: int = 8
    batch: int = 32
    sampling_steps: int = 20
    steps: int = 120
    check_every: int = 10
    patience: int = 3
    """Checks without a better held-out reward after which it stops."""
    seed: int = 0

    def calls(self, of: int, rng: torch.Generator) -> range:
        """The calls that have a graph, of a sampling of so many."""
        if self.last:
            return range(of - self.last, of)
        chosen = int(torch.randint(of // 2, of, (1,), generator=rng))
        return range(chosen, chosen + 1)


RECIPES = {
    "refl": Recipe(last=0, steps=150),
    "refl-10": Recipe(last=0, sampling_steps=10, steps=150),
    "refl-fast": Recipe(last=0, learning_rate=1e-2, steps=30),
    "refl-slow": Recipe(last=0, learning_rate=1e-3),
    "refl-kl": Recipe(last=0, penalty=1.0),
    "draft-1": Recipe(),
    "draft-2": Recipe(last=2),
}


@dataclass(frozen=True)
class Check:
    """What had been reached, and spent, at a step of a finetune."""

    step: int
    spent: Tally
    reward: float
    heldout: float
    weights: dict[str, Tensor]


def best(checks: Sequence[Check]) -> Check:
    return max(checks, key=lambda check: check.heldout)


def reached(checks: Sequence[Check], heldout: float) -> tuple[Check, Tally]:
    """The first check at or above a held-out reward, and what had been spent, on the line from the check before, when it was reached."""
    i = next(i for i, check in enumerate(checks) if check.heldout >= heldout)
    after, before = checks[i], checks[max(i - 1, 0)]
    share = (heldout - before.heldout) / (after.heldout - before.heldout) if i else 1.0
    return after, before.spent.times(1 - share).plus(after.spent.times(share))


class Finetune:
    """A LoRA on every linear layer of the model's blocks, by ComfyUI's own adapter."""

    def __init__(self, world_: World, recipe: Recipe):
        self.world, self.recipe, self.tally = world_, recipe, Tally()
        self.model = world_.pipeline.model.clone()
        self.adapters = nn.ModuleList()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            for name, layer in self.model.model.diffusion_model.named_modules():
                if isinstance(layer, nn.Linear) and "blocks" in name:
                    self.adapters.append(LoRAAdapter.create_train(layer.weight, recipe.rank, float(recipe.rank)))
                    self.model.add_weight_wrapper(f"diffusion_model.{name}.weight", self.adapters[-1])
        for _, module in parts(world_):
            module.requires_grad_(False)
        self.trained = [parameter for parameter in self.adapters.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, recipe.learning_rate, weight_decay=0.0)

    def run(self, judge: Judge) -> list[Check]:
        """Train until the held-out reward rises no more."""
        checks = [self.check(0, judge)]
        for step in range(1, self.recipe.steps + 1):
            self.climb(step)
            if step % self.recipe.check_every == 0:
                checks.append(self.check(step, judge))
                say(
                    f"step {step}: reward {checks[-1].reward:.3f}, held out {checks[-1].heldout:.3f}, {self.tally['seconds']:.0f} s"
                )
            if step - best(checks).step >= self.recipe.patience * self.recipe.check_every:
                break
        return checks

    def check(self, step: int, judge: Judge) -> Check:
        return Check(step, Tally(self.tally), *judge(self.model), copy.deepcopy(self.adapters.state_dict()))

    def at(self, check: Check) -> ModelPatcher:
        """The model as it was there."""
        self.adapters.load_state_dict(check.weights)
        return self.model

    def climb(self, step: int) -> None:
        rng = generator(self.recipe.seed, step)
        order = torch.randperm(len(self.world.prompts), generator=rng)
        prompts = [
            self.world.prompts[i] for i in order.repeat(-(-self.recipe.batch // len(order)))[: self.recipe.batch]
        ]
        noise = torch.randn(self.recipe.batch, *SHAPE, generator=rng)
        with self.tally.counting(parts(self.world)), differentiable_model(self.model.model):
            latents, penalty = self.sample(prompts, noise, self.recipe.calls(self.recipe.sampling_steps, rng))
            pixels = self.world.pipeline.decode(latents).clamp(0, 1)
            reward = self.world.reward.standardize(evaluate(self.world.reward, pixels, prompts)).mean()
            (self.recipe.penalty * penalty - reward).backward()
            nn.utils.clip_grad_norm_(self.trained, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def sample(self, prompts: Sequence[str], noise: Tensor, graph: range) -> tuple[Tensor, Tensor]:
        """The last D (B,16,8,8) of Euler steps that end with those that have a graph, and the penalty."""
        found: list[Tensor] = []
        penalties = [torch.zeros(())]

        def sampler(model, x, sigmas, extra_args=None, **_):
            for i in range(graph.stop):
                with torch.set_grad_enabled(i in graph):
                    level = sigmas[i].expand(len(x))
                    denoised = model(x, level, **extra_args)
                    if i in graph and self.recipe.penalty:
                        with torch.no_grad(), self.left_out():
                            before = model(x, level, **extra_args)
                        penalties.append(
                            (denoised - before).square().mean() / Diffusion().posterior_variance(sigmas[i])
                        )
                    x = x + (x - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
            found.append(denoised)
            return x.detach()

        sampling = self.model.get_model_object("model_sampling")
        sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", self.recipe.sampling_steps)
        conditions = [normal(condition) for condition in self.world.pipeline.conditions(prompts)]
        comfy.sample.sample_custom(
            self.model,
            noise,
            self.world.cfg,
            comfy.samplers.KSAMPLER(sampler),
            sigmas,
            *conditions,
            torch.zeros_like(noise),
            disable_pbar=True,
        )
        return found[0], torch.stack(penalties).sum()

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Inside, the model is as it was."""
        for adapter in self.adapters:
            adapter.alpha.data.zero_()
        yield
        for adapter in self.adapters:
            adapter.alpha.data.fill_(self.recipe.rank)


def normal(conditioning: list) -> list:
    """Of tensors that autograd may save."""
    [[context, extra]] = conditioning
    return [[context.clone(), {name: value.clone() for name, value in extra.items()}]]


# --- the guidance network


@dataclass(frozen=True)
class Lesson:
    """How to come by a guidance network."""

    samples: int
    steps: int = 600
    levels: int = 8
    sampling_steps: int = 20
    size: str = "small"
    temperature: float = 0.3
    """In units of the standardized reward."""
    fresh: bool = False
    """Whether the noise is new in every batch: one noised state of a sample is then enough, for its level."""

    def collector(self, world_: World, work: Path) -> Collector:
        sampled = copy.copy(world_)
        sampled.steps = self.sampling_steps
        return Collector.begin(sampled, work, self.levels)


LESSONS = {
    "500-short": Lesson(500, 200, levels=1, sampling_steps=10, fresh=True),
    "500-lean": Lesson(500, levels=1, sampling_steps=10, fresh=True),
    "500": Lesson(500),
    "500-fresh": Lesson(500, levels=1, fresh=True),
    "1000-lean": Lesson(1000, levels=1, sampling_steps=10, fresh=True),
    "2000-lean": Lesson(2000, 1000, levels=1, sampling_steps=10, fresh=True),
}


@dataclass(frozen=True)
class Learned:
    loaded: LoadedNetwork
    sampling: Tally
    """Samples of the model, and their noised states."""
    labels: Tally
    """Decoded and judged."""
    training: Tally
    architecture: Architecture


def learn(world_: World, lesson: Lesson, work: Path) -> Learned:
    collector = lesson.collector(world_, work)
    collector.fill(lesson.samples)
    sampling, labels = (tally.times(lesson.samples) for tally in cost_of_a_sample(collector))
    fitting = prepared(
        first(collector.collection.load(), lesson.samples),
        "potential",
        lesson.temperature,
        lesson.steps,
        lesson.size,
        lesson.fresh,
    )
    training, tally = fitting.training, Tally()
    with tally.counting([("network", training.network), ("network", training.average.module)]):
        for progress in training:
            if progress.check is not None:
                say(f"step {progress.step}: loss {progress.loss:.4f}, on held-out samples {progress.check:.4f}")
    return Learned(manage_network(fitting.network(), fitting.card()), sampling, labels, tally, training.architecture)


def cost_of_a_sample(collector: Collector, shards: int = 2) -> tuple[Tally, Tally]:
    """Of sampling one and asking the model at its noised states, and of judging it; measured, whatever has been collected before."""
    whole, judging, world_ = Tally(), Tally(), collector.world
    for _ in range(shards):
        with whole.counting(parts(world_)):
            collector.samples(range(SHARD))
    prompts = [world_.prompts[collector.collection.description.prompt_of(number)] for number in range(SHARD)]
    with judging.counting(parts(world_)), torch.no_grad():
        evaluate(world_.reward, world_.pipeline.pictures(torch.zeros(SHARD, *SHAPE)), prompts)
    whole, judging = whole.times(1 / SHARD / shards), judging.times(1 / SHARD)
    return Tally({name: whole[name] - judging[name] for name in whole}), judging


# --- the comparison


class Comparison:
    def __init__(self, bench: Bench, work: Path, strengths: Sequence[float], beside: Sequence[float]):
        self.bench, self.world, self.work = bench, bench.world, work
        self.strengths, self.beside = strengths, beside
        self.tuned, self.guided = (Judge(bench, sampler) for sampler in (TUNED, GUIDED))
        self.finetunes: dict[str, tuple[Finetune, list[Check]]] = {}
        self.prices = {
            "here": passes.shapesworld(self.world),
            **{name: passes.published(name) for name in passes.FINETUNED},
        }

    def unguided(self) -> None:
        for judge in (self.tuned, self.guided):
            plain = self.world.pipeline.model
            judge.row("unguided", plain, judge(plain)[1])

    def finetune(self, name: str, recipe: Recipe) -> None:
        say(f"finetune {name}: {recipe}")
        made = Finetune(self.world, recipe)
        self.finetunes[name] = made, made.run(self.tuned)
        peak = best(self.finetunes[name][1])
        self.judged(f"{name}, at its best", made, peak)
        self.guided.row(f"{name}, the same", made.at(peak), self.guided(made.at(peak))[1])

    def judged(self, name: str, made: Finetune, check: Check) -> None:
        self.tuned.row(f"{name}, step {check.step}", made.at(check), check.heldout)

    def reaching(self, heldout: float) -> dict[str, tuple[Check, Tally]]:
        """The finetunes that came to this held-out reward, where, and what they had spent by then; the fewest FLOPs first."""
        through = {
            name: checks
            for name, (_, checks) in self.finetunes.items()
            if checks[0].heldout < heldout <= best(checks).heldout
        }
        found = {name: reached(checks, heldout) for name, checks in through.items()}
        return dict(sorted(found.items(), key=lambda each: each[1][1].flops(self.prices["here"])))

    def network(self, name: str, lesson: Lesson) -> None:
        say(f"network {name}: {lesson}")
        learned = learn(self.world, lesson, self.work)
        alone = lambda strength: NetworkGuidance(learned.loaded, strength).attach(self.world.pipeline.model)  # noqa: E731
        self.followed(f"network, {name}", learned, alone)
        for other in self.beside:
            both = lambda strength, s=other: beside(self.bench, s, **WITH_TARGET).attach(alone(strength))  # noqa: E731
            self.followed(f"network, {name}, beside `shift` {other:g}", learned, both, looks=self.world.steps)

    def followed(self, name: str, learned: Learned, attach: Callable[[float], ModelPatcher], looks: int = 0) -> None:
        """At the strength that is best in validation; against what comes as far, or to its best. looks: at the reward, for a picture."""
        judged = {strength: self.guided(attach(strength))[1] for strength in self.strengths}
        say(f"held out by strength: {judged}")
        strength = max(judged, key=lambda strength: judged[strength])
        self.guided.row(f"{name}, strength {strength:g}", attach(strength), judged[strength])
        goal = min(judged[strength], max(best(checks).heldout for _, checks in self.finetunes.values()))
        finetunes = self.reaching(goal)
        if not finetunes:
            print(f"\nNo finetune comes from less to {goal:.3f}.\n\n{HEADER}")
            return
        cheapest, (check, against) = next(iter(finetunes.items()))
        self.judged(f"{cheapest}, as good as that", self.finetunes[cheapest][0], check)
        columns = ["way", *COUNTED, "TFLOPs", "CPU s", *(f"of {cheapest}'s FLOPs, {where}" for where in self.prices)]
        print(f"\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
        for finetune, (_, spent) in finetunes.items():
            self.cost(f"{finetune}, to {goal:.3f}", spent, against, learned)
        fit = learned.labels.plus(learned.training)
        self.cost(f"{name}, to {judged[strength]:.3f}", learned.sampling.plus(fit), against, learned)
        self.cost("another reward, the same samples", fit, against, learned)
        self.cost("another temperature, the same labels", learned.training, against, learned)
        if looks:
            self.spent_again(looks, learned.sampling.plus(fit), against, learned)
        print(f"\n{HEADER}")

    def spent_again(self, looks: int, tally: Tally, against: Tally, learned: Learned) -> None:
        """After how many pictures what was saved in training has gone into looks at the reward."""
        look = Tally({what: looks for what in COUNTED if what.startswith(("decoder", "reward"))})
        saved = {
            where: (against.flops(each) - tally.flops(each)) / look.flops(each)
            for where, each in self.prices_with(learned).items()
        }
        pictures = ", ".join(f"{count:.0f} ({where})" for where, count in saved.items())
        print(
            f"\nIts looks at the reward, {looks} for a picture, have cost the difference after so many pictures: {pictures}."
        )

    def prices_with(self, learned: Learned) -> dict[str, dict[str, float]]:
        text = self.world.pipeline.conditions([""])[0][0]
        own = passes.network(learned.architecture, SHAPE, text[0].shape[1])
        return {where: found | own if where == "here" else found for where, found in self.prices.items()}

    def cost(self, name: str, tally: Tally, against: Tally, learned: Learned) -> None:
        prices = self.prices_with(learned)
        counts = [f"{tally[what]:.0f}" for what in COUNTED]
        shares = [f"{tally.flops(each) / against.flops(each):.0%}" for each in prices.values()]
        cells = [name, *counts, f"{tally.flops(prices['here']) / 1e12:.2f}", f"{tally['seconds']:.0f}", *shares]
        print(f"| {' | '.join(cells)} |", flush=True)


COUNTED = [f"{what}{way}" for what in ("model", "decoder", "reward", "network") for way in ("", " backward")]
COLUMNS = "way", "sampler", "held-out, validation", *SCORES.values(), "energy", "diversity"
HEADER = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "models", type=Path, nargs="?", default=None, help="where ShapesWorld lies; the cache if left out"
    )
    parser.add_argument(
        "--recipes", type=lambda text: text.split(","), default=["refl", "refl-10"], help=", ".join(RECIPES)
    )
    parser.add_argument(
        "--networks", type=lambda text: text.split(","), default=["500-short", "1000-lean"], help=", ".join(LESSONS)
    )
    parser.add_argument("--strengths", type=numbers, default=[4.0, 8.0])
    parser.add_argument(
        "--beside",
        type=numbers,
        default=[3.0],
        help="strengths of training-free guidance, to which a network is added too",
    )
    parser.add_argument("--per-prompt", type=int, default=8)
    parser.add_argument("--pool", type=int, default=64)
    parser.add_argument(
        "--temperature", type=float, default=0.1, help="of the truth, in units of the standardized reward"
    )
    parser.add_argument("--work", type=Path, default=None, help="where collections are kept; the cache if left out")
    chosen = parser.parse_args()
    world_ = World(
        chosen.models or shapesworld(), cfg=1.0, steps=20, prompts=world.PROMPTS, kind="diffusion", sampler=TUNED
    )
    bench = Bench(world_, chosen.per_prompt, chosen.pool, chosen.temperature, candidates=0)
    comparison = Comparison(bench, chosen.work or cache() / "bench", chosen.strengths, chosen.beside)
    print(HEADER)
    comparison.unguided()
    for name in chosen.recipes:
        comparison.finetune(name, RECIPES[name])
    for name in chosen.networks:
        comparison.network(name, LESSONS[name])


if __name__ == "__main__":
    main()
