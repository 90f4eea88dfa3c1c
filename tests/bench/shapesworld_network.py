"""Guidance networks on ShapesWorld: what N labelled samples are worth, at the model calls of unguided sampling.

Collects samples of the benchmark's prompts with the guide reward, trains a network on the first N of them, and samples with it; the
references are those of shapesworld.py. The networks are trained at a higher temperature than the truth has, where more samples count, and
followed with as much more strength: alone, and beside a weak training-free guidance. Collections are kept and gone on with. Prints a
markdown table.

usage: OMP_NUM_THREADS=1 python tests/bench/shapesworld_network.py [MODELS_DIR] [--samples 500,2000,5000] [--training-steps 500,2000] [--work DIR]
"""

import argparse
import sys
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from harness.inprocess import load_comfyui

load_comfyui()

import torch
from reward_guidance.guidance.data.collection import Collection
from reward_guidance.guidance.data.description import Description
from reward_guidance.guidance.data.samples import Sample, Samples, Texts, noise, percents, states
from reward_guidance.guidance.estimators import Settings
from reward_guidance.guidance.network.file import save_network
from reward_guidance.guidance.rewards import evaluate
from reward_guidance.guidance.training.labels import label
from reward_guidance.guidance.training.recipe import plan_for, prepare
from reward_guidance.guidance.training.report import Fitting
from reward_guidance.nodes.wiring.loaded import LoadedNetwork, manage_network
from reward_guidance.nodes.wiring.model_info import base_of, process_of, text_of_conditioning
from reward_guidance.nodes.wiring.patch_network import NetworkGuidance
from reward_guidance.nodes.wiring.patch_reward import RewardGuidance
from reward_guidance.tests.bench.shapesworld import BatchReward, Bench, World, say
from reward_guidance.tests.harness.environment import cache
from reward_guidance.tests.harness.models import shapesworld
from reward_guidance.tests.standins.shapesworld import expand

LEVELS, FIRST_SEED = 8, 1_000_000


@dataclass(frozen=True)
class Collector:
    """Fills a collection with samples of the world's prompts, which take turns; by Euler, whatever samples later."""

    world: World
    collection: Collection

    @staticmethod
    def begin(world_: World, work: Path, levels: int = LEVELS) -> "Collector":
        """In a folder of its own, which another bench that samples the same way goes on with."""
        pipeline, reward = world_.pipeline, world_.reward
        description = Description(
            base=base_of(pipeline.model),
            shape=(16, 8, 8),
            levels=levels,
            prompts=tuple(world_.prompts),
            rewards=(reward.name,),
            reward_means=(float(reward.reference_mean),),
            reward_stds=(float(reward.reference_std),),
            seed=FIRST_SEED,
            settings=f"{world_.steps} steps, cfg {world_.cfg}, weights {expand.digest()[:12]}",
        )
        texts = [text_of_conditioning(pipeline.short(pipeline.encode([prompt]))) for prompt in world_.prompts]
        text = Texts([each.tokens[0] for each in texts], torch.cat([each.pooled for each in texts]))
        folder = f"network-{world_.kind}-{world_.steps}-{levels}"
        return Collector(world_, Collection.create(work / folder, description, text))

    def fill(self, count: int) -> None:
        for numbers in self.collection.missing(count):
            self.collection.add(numbers, self.samples(numbers))

    def samples(self, numbers: range) -> list[Sample]:
        """Drawn, judged, and noised again to every level, with what the model makes of that."""
        description, pipeline = self.collection.description, self.world.pipeline
        seeds = [description.seed_of(number) for number in numbers]
        prompts = [self.world.prompts[description.prompt_of(number)] for number in numbers]
        start = torch.stack([noise(description.shape, seed, -2) for seed in seeds])
        clean = pipeline.latents(prompts, 0, self.world.cfg, self.world.steps, noise=start).half().float()
        scores = evaluate(self.world.reward, pipeline.pictures(clean), prompts)[:, None]
        sampling = pipeline.model.get_model_object("model_sampling")
        shares = torch.stack([percents(seed, description.levels) for seed in seeds])
        sigmas = torch.tensor([[float(sampling.percent_to_sigma(share)) for share in row] for row in shares.tolist()])
        process = process_of(sampling, clean.shape)
        return states(
            clean, scores, seeds, sigmas, process, lambda x, sigma: pipeline.denoised(x, sigma, prompts, self.world.cfg)
        )


def first(samples: Samples, count: int) -> Samples:
    return samples.rows(torch.arange(min(count, len(samples.clean))))


def prepared(samples: Samples, objective: str, temperature: float, steps: int, size: str, fresh: bool) -> Fitting:
    """temperature: in units of the standardized reward, as the truth has it; plans count in spreads within a prompt."""
    _, health = label(samples.rewards(), samples.prompts, 1.0)
    plan = plan_for(samples.description, objective, temperature=temperature / health.std, steps=steps, fresh=fresh)
    return prepare(samples, plan, size)


def train(fitting: Fitting) -> float:
    """CPU seconds."""
    began = time.process_time()
    for progress in fitting.training:
        if progress.check is not None:
            say(f"step {progress.step}: loss {progress.loss:.4f}, on held-out samples {progress.check:.4f}")
    say(fitting.report())
    return time.process_time() - began


def lesson(world_: World, work: Path, count: int = 2000, steps: int = 1500, temperature: float = 0.3) -> Fitting:
    """A training on so many samples, of which it needs the latents and their scores alone."""
    collector = Collector.begin(world_, work, levels=1)
    collector.fill(count)
    return prepared(first(collector.collection.load(), count), "potential", temperature, steps, "small", fresh=True)


def learned(world_: World, work: Path, count: int, steps: int) -> LoadedNetwork:
    """The network of a lesson."""
    fitting = lesson(world_, work, count, steps)
    train(fitting)
    return manage_network(fitting.network(), fitting.card())


def compare(
    bench: Bench, collector: Collector, count: int, objective: str, steps: int, chosen: argparse.Namespace
) -> None:
    """One network, followed at every strength."""
    collector.fill(count)
    samples = first(collector.collection.load(), count)
    fresh = collector.collection.description.levels == 1
    fitting = prepared(samples, objective, chosen.training_temperature, steps, chosen.size, fresh)
    seconds = train(fitting)
    if chosen.save:
        save_network(chosen.save / f"{objective}-{count}-{steps}.safetensors", fitting.network(), fitting.card())
    loaded, plain = manage_network(fitting.network(), fitting.card()), bench.world.pipeline.model
    name = f"`{objective}`, {count} samples, {steps} steps ({seconds:.0f} s)"
    for strength in chosen.strengths:
        bench.sampled(f"{name}, strength {strength:g}", NetworkGuidance(loaded, strength).attach(plain))
    for strength in chosen.beside:
        both = beside(bench, strength).attach(NetworkGuidance(loaded, chosen.strengths[-1]).attach(plain))
        bench.sampled(f"{name}, strength {chosen.strengths[-1]:g}, and `shift`, strength {strength:g}", both)


def beside(bench: Bench, strength: float, **options) -> RewardGuidance:
    """The training-free guidance, at the temperature that the nodes begin with."""
    return RewardGuidance(
        BatchReward(bench.world, bench.per_prompt), "shift", Settings(strength=strength, temperature=0.05, **options)
    )


def numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "models", type=Path, nargs="?", default=None, help="where ShapesWorld lies; the cache if left out"
    )
    parser.add_argument("--samples", type=numbers, default=[500, 2000, 5000])
    parser.add_argument("--strengths", type=numbers, default=[1.0, 4.0])
    parser.add_argument(
        "--beside",
        type=numbers,
        default=[0.5],
        help="strengths of training-free guidance alone, and beside the strongest network",
    )
    parser.add_argument("--objectives", type=lambda text: text.split(","), default=["potential"])
    parser.add_argument(
        "--stored",
        action="store_true",
        help="train on noised states that are collected, not on new noise in every batch",
    )
    parser.add_argument("--training-steps", type=numbers, default=[2000])
    parser.add_argument("--size", default="small", help="of the network")
    parser.add_argument("--kind", default="diffusion", choices=("diffusion", "flow"))
    parser.add_argument("--sampler", default="euler")
    parser.add_argument("--steps", type=int, default=20, help="of sampling")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--per-prompt", type=int, default=8)
    parser.add_argument("--pool", type=int, default=128)
    parser.add_argument(
        "--temperature", type=float, default=0.1, help="of the truth, in units of the standardized reward"
    )
    parser.add_argument("--training-temperature", type=float, default=0.3, help="of the networks, in the same units")
    parser.add_argument("--work", type=Path, default=None, help="where collections are kept; the cache if left out")
    parser.add_argument("--save", type=Path, default=None, help="a folder for the networks")
    chosen = parser.parse_args()
    world_ = World(
        chosen.models or shapesworld(), cfg=1.0, steps=chosen.steps, kind=chosen.kind, sampler=chosen.sampler
    )
    collector = Collector.begin(
        world_, chosen.work or cache() / "bench", LEVELS if chosen.stored or "weighted" in chosen.objectives else 1
    )
    bench = Bench(world_, chosen.per_prompt, chosen.pool, chosen.temperature, runs=chosen.runs)
    bench.references()
    for strength in chosen.beside:
        bench.sampled(f"`shift`, strength {strength:g}", beside(bench, strength).attach(world_.pipeline.model))
    for count in map(int, chosen.samples):
        for objective, steps in product(chosen.objectives, map(int, chosen.training_steps)):
            compare(bench, collector, count, objective, steps, chosen)


if __name__ == "__main__":
    main()
