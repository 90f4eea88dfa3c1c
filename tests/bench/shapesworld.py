"""Guidance on ShapesWorld, where everything can be checked: rewards, held-out reward, what is in the picture, distance to the truth.

Samples 32 prompts through ComfyUI's own loader and sampler. The truth q(x|c) ∝ p(x|c)·exp(r/β) is a reweighted pool of unguided
pictures; energy distances are taken per prompt in the held-out encoder's features and averaged. Prints markdown tables: means over the runs,
with standard errors, and what each setting has ahead of best-of-4 in the same run.

usage: python tests/bench/shapesworld.py [MODELS_DIR] [--tables estimators,sweep,smoothing] [--runs 4] [--per-prompt 8] [--pool 128]
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from harness.inprocess import load_comfyui

load_comfyui()

import torch
from comfy.model_patcher import ModelPatcher
from reward_guidance.guidance.estimators import Settings, Smoothing
from reward_guidance.guidance.rewards import evaluate, load_reward
from reward_guidance.nodes.wiring.patch_reward import RewardGuidance
from reward_guidance.tests.harness.models import shapesworld
from reward_guidance.tests.standins.analytic import PlainReward
from reward_guidance.tests.standins.shapesworld import oracle, world
from reward_guidance.tests.standins.shapesworld.pipeline import Pipeline
from torch import Tensor

CHUNK = 64
"""Pictures that are judged at once: caches hold no more."""
REWARDS = "shapes_clip.safetensors", "shapes_heldout.safetensors"


def say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


class World:
    """The model, both rewards, and the prompts."""

    def __init__(
        self, models: Path, cfg: float, steps: int, prompts=world.PROMPTS, kind: str = "flow", sampler: str = "euler"
    ):
        self.pipeline = Pipeline(models, kind=kind)
        self.reward, self.heldout = (load_reward(models / "reward_models" / name).float() for name in REWARDS)
        self.cfg, self.steps, self.sampler, self.prompts, self.kind = cfg, steps, sampler, prompts, kind

    def sample(self, model: ModelPatcher, per_prompt: int, seed: int) -> Tensor:
        """Model-space latents (prompts·per_prompt,16,8,8), prompt by prompt."""
        return self.pipeline.latents(self.repeated_prompts(per_prompt), seed, self.cfg, self.steps, model, self.sampler)

    def repeated_prompts(self, per_prompt: int) -> list[str]:
        return [prompt for prompt in self.prompts for _ in range(per_prompt)]


class BatchReward(PlainReward):
    """Standardized reward of decoded latents, a prompt for each picture; stands where a LatentReward stands."""

    def __init__(self, world: World, per_prompt: int):
        self.reward, self.pipeline = world.reward, world.pipeline
        self.prompts = world.repeated_prompts(per_prompt)
        self.modules = [self.reward, self.pipeline.decoder]

    def __call__(self, latents: Tensor) -> Tensor:
        return torch.cat(
            [self.score(latents[i : i + CHUNK], self.prompts[i : i + CHUNK]) for i in range(0, len(latents), CHUNK)]
        )

    def score(self, latents: Tensor, prompts: list[str]) -> Tensor:
        return self.reward.standardize(evaluate(self.reward, self.pipeline.decode(latents), prompts))


@dataclass(frozen=True)
class Pictures:
    """Everything measured of a set of pictures; (prompts, n) or (prompts, n, ...)."""

    pixels: Tensor
    reward: Tensor
    heldout: Tensor
    features: Tensor
    right: Tensor

    @staticmethod
    @torch.no_grad()
    def of(world_: World, latents: Tensor) -> "Pictures":
        per_prompt = len(latents) // len(world_.prompts)
        shape = (len(world_.prompts), per_prompt)
        prompts = world_.repeated_prompts(per_prompt)
        pixels = world_.pipeline.pictures(latents)
        score = lambda reward: reward.standardize(evaluate(reward, pixels, prompts)).view(shape)  # noqa: E731
        asked = torch.tensor([world.parse(prompt) for prompt in prompts])
        right = (oracle.read(pixels) == asked).all(1).float().view(shape)
        features = world_.heldout.image_features(pixels).view(*shape, -1)
        return Pictures(
            pixels.view(*shape, 3, world.SIDE, world.SIDE), score(world_.reward), score(world_.heldout), features, right
        )

    @staticmethod
    def joined(parts: "Sequence[Pictures]") -> "Pictures":
        """Of the same prompts."""
        return Pictures(*(torch.cat([getattr(part, name) for part in parts], 1) for name in Pictures.__annotations__))

    @staticmethod
    def best(candidates: "list[Pictures]") -> "Pictures":
        """Of each place, the candidate with the highest reward."""
        chosen = torch.stack([pictures.reward for pictures in candidates]).argmax(0)
        rows = torch.cartesian_prod(*(torch.arange(side) for side in chosen.shape)).unbind(1)

        def pick(name: str) -> Tensor:
            values = torch.stack([getattr(pictures, name) for pictures in candidates])
            return values[(chosen.flatten(), *rows)].unflatten(0, chosen.shape)

        return Pictures(*map(pick, Pictures.__annotations__))

    @property
    def diversity(self) -> float:
        """Mean pixel RMS distance between two pictures of one prompt."""
        flat = self.pixels.flatten(2)
        n = flat.shape[1]
        return float(torch.cdist(flat, flat).sum() / (len(flat) * n * (n - 1)) / flat.shape[2] ** 0.5)


def energy_to_truth(pictures: Pictures, pool: Pictures, temperature: float) -> float:
    """Mean over prompts of the energy distance between features of the pictures and of the pool reweighted by exp(r/β).

    A prompt of whose truth the pool has little more than one picture says nothing of distances and is left out.
    """
    weights = (pool.reward / temperature).softmax(1)
    known = weights.square().sum(1) < 2 / 3
    n = pictures.features.shape[1]
    across = torch.cdist(pictures.features, pool.features)
    within = torch.cdist(pictures.features, pictures.features).sum((1, 2)) / (n * (n - 1))
    pairs = weights[:, :, None] * weights[:, None, :]
    truth = (pairs * torch.cdist(pool.features, pool.features)).sum((1, 2)) / (1 - weights.square().sum(1))
    return float((2 * torch.einsum("pij,pj->pi", across, weights).mean(1) - within - truth)[known].mean())


@dataclass(frozen=True)
class Setting:
    name: str
    estimator: str = "shift"
    strength: float = 1.0
    samples: int = 0
    radius: float = 1.0
    grid: int = 4
    options: dict = field(default_factory=dict)
    interval: tuple[float, float] = (0.0, 1.0)


class Bench:
    """Runs of every setting from the same seeds, and what was measured of them."""

    def __init__(
        self, world_: World, per_prompt: int, pool: int, temperature: float, candidates: int = 8, runs: int = 1
    ):
        self.world, self.per_prompt, self.temperature = world_, per_prompt, temperature
        self.pool = Pictures.joined([self.unguided(32, 100_000 + i) for i in range(pool // 32)])
        self.seeds = [run * max(1, candidates) for run in range(runs)]
        self.candidates = [[self.unguided(per_prompt, seed + i) for i in range(candidates)] for seed in self.seeds]
        self.rows: list[dict] = []

    def unguided(self, per_prompt: int, seed: int) -> Pictures:
        return Pictures.of(self.world, self.world.sample(self.world.pipeline.model, per_prompt, seed))

    def run(self, setting: Setting) -> dict:
        settings = Settings(
            strength=setting.strength,
            temperature=self.temperature,
            smoothing=Smoothing(setting.samples, setting.radius, setting.grid),
            **setting.options,
        )
        guidance = RewardGuidance(
            BatchReward(self.world, self.per_prompt), setting.estimator, settings, *setting.interval
        )
        return self.sampled(setting.name, guidance.attach(self.world.pipeline.model), CALLS.get(setting.estimator, "1"))

    def sampled(self, name: str, model: ModelPatcher, calls: str = "1") -> dict:
        """What a guided model makes of every seed."""
        began = time.process_time()
        latents = [self.world.sample(model, self.per_prompt, seed) for seed in self.seeds]
        seconds = (time.process_time() - began) / len(self.seeds)
        return self.add(name, [Pictures.of(self.world, each) for each in latents], calls, seconds)

    @property
    def weights(self) -> Tensor:
        """Of the pool, for the truth (prompts,n)."""
        return (self.pool.reward / self.temperature).softmax(1)

    @property
    def truth(self) -> dict[str, float]:
        return {name: float((self.weights * getattr(self.pool, name)).sum(1).mean()) for name in SCORES}

    def references(self) -> None:
        """The truth, unguided pictures, and the best of n by reward."""
        ess = float((1 / self.weights.square().sum(1)).mean())
        print(
            f"Temperature {self.temperature}; effective sample size of the truth {ess:.1f} of {self.weights.shape[1]} pictures per prompt.\n"
        )
        print(HEADER)
        self.note("truth (reweighted pool)", "", [self.truth])
        n = 1
        while n <= len(self.candidates[0]):
            self.add(
                "unguided" if n == 1 else f"best of {n}",
                [Pictures.best(drawn[:n]) for drawn in self.candidates],
                str(n),
            )
            n *= 2

    def add(self, name: str, runs: list[Pictures], calls: str, seconds: float | None = None) -> dict:
        return self.note(
            name, calls, [self.measure(pictures) for pictures in runs], {} if seconds is None else {"seconds": seconds}
        )

    def measure(self, pictures: Pictures) -> dict[str, float]:
        scores = {name: float(getattr(pictures, name).mean()) for name in SCORES}
        return scores | {
            "energy": energy_to_truth(pictures, self.pool, self.temperature),
            "diversity": pictures.diversity,
        }

    def note(self, name: str, calls: str, runs: list[dict[str, float]], more: dict[str, float] | None = None) -> dict:
        row = (
            {"setting": name, "calls": calls, "runs": runs}
            | {key: statistics.mean(run[key] for run in runs) for key in runs[0]}
            | (more or {})
        )
        self.rows.append(row)
        print(f"| {name} | {calls} | {' | '.join(cell(row, key) for key in COLUMNS)} |", flush=True)
        return row

    def ahead(self, of: str) -> None:
        """A table of what each setting that was run has ahead of another, run by run."""
        other = next(row for row in self.rows if row["setting"] == of)
        print(f"\n| ahead of {of} in | {' | '.join(SCORES.values())} |\n|---|{'---|' * len(SCORES)}")
        for row in self.rows:
            if "seconds" in row:
                pairs = list(zip(row["runs"], other["runs"], strict=True))
                print(
                    f"| {row['setting']} | {' | '.join(with_error([mine[key] - its[key] for mine, its in pairs]) for key in SCORES)} |"
                )


def with_error(values: list[float]) -> str:
    """Mean, and its standard error where there are several."""
    error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{error}"


def cell(row: dict, key: str) -> str:
    if key == "seconds":
        return format(row[key], ".0f") if key in row else ""
    return with_error([run[key] for run in row["runs"]]) if key in row else ""


CALLS = {"shift_two_pass": "2", "jacobian": "1 and a backward pass"}
SCORES = {"reward": "reward", "heldout": "held-out", "right": "oracle"}
COLUMNS = *SCORES, "energy", "diversity", "seconds"
HEADER = "| setting | model calls per step | reward | held-out | oracle | energy | diversity | CPU seconds |\n|---|---|---|---|---|---|---|---|"


ESTIMATORS = (
    Setting("`shift`"),
    Setting("`shift`, target 0.8, strength 3, momentum 0", strength=3.0, options={"momentum": 0.0, "target": 0.8}),
    Setting("`shift`, 4 points, strength 2", strength=2.0, samples=4),
    Setting("`shift_two_pass`", "shift_two_pass"),
    Setting("`denoised`", "denoised"),
    Setting("`jacobian`", "jacobian"),
    Setting("`jacobian`, plain", "jacobian", options={"momentum": 0.0, "cap": 100.0}),
)
SWEEP = (
    Setting("`shift`"),
    *(Setting(f"`shift`, strength {s}", strength=s) for s in (0.25, 0.5, 2.0)),
    *(Setting(f"`shift`, momentum {m}", options={"momentum": m}) for m in (0.0, 0.8)),
    *(Setting(f"`shift`, cap {c}", options={"cap": c}) for c in (0.25, 1.0, 2.0)),
    *(Setting(f"`shift`, variance {v}", options={"variance": v}) for v in (0.0, 1.0)),
    *(Setting(f"`shift`, {low} to {high}", interval=(low, high)) for low, high in ((0.0, 0.6), (0.3, 1.0))),
    Setting("`shift`, every 2", options={"every": 2}),
)
SMOOTHING = (
    Setting("`shift`, 4 points, radius 0.3", samples=4, radius=0.3),
    Setting("`shift`, 4 points, radius 1", samples=4),
    Setting("`shift`, 4 points, radius 0.3, white noise", samples=4, radius=0.3, grid=0),
)
TABLES = {"estimators": ESTIMATORS, "sweep": SWEEP, "smoothing": SMOOTHING}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "models", type=Path, nargs="?", default=None, help="where ShapesWorld lies; the cache if left out"
    )
    parser.add_argument("--tables", default="estimators")
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument("--per-prompt", type=int, default=8)
    parser.add_argument("--pool", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.05)
    parser.add_argument("--cfg", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--sampler", default="euler_ancestral")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    models = arguments.models or shapesworld()
    world_ = World(models, arguments.cfg, arguments.steps, sampler=arguments.sampler)
    bench = Bench(world_, arguments.per_prompt, arguments.pool, arguments.temperature, runs=arguments.runs)
    bench.references()
    for table in arguments.tables.split(","):
        for setting in TABLES[table]:
            bench.run(setting)
    bench.ahead(of="best of 4")
    if arguments.json:
        arguments.json.write_text(json.dumps(bench.rows, indent=1))


if __name__ == "__main__":
    main()
