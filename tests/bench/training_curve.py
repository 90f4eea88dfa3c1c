"""Reward and held-out reward while a guidance network is trained, in output/training_curve.png and as markdown tables: is the reward hacked?

On the ring of ring.py by the objective `weighted`, from 100,000 labels: the reward has a ripple that a true judge would not have, and held out
is the reward without it. On ShapesWorld's flow model by `potential`, from 2000 labels, followed with strength 4: held out is a second reward, of
other weights. Both are means over guided samples, beside those of q. The last lines tell what the reward gained since the
model without guidance, and how much of that the held-out reward did not gain.

usage: OMP_NUM_THREADS=1 python tests/bench/training_curve.py [--only ring] [--work DIR]
"""

import argparse
import sys
from abc import ABC, abstractmethod
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench import networks
from bench.networks import LABELS, line, table
from bench.ring import sample
from bench.shapesworld import Bench, Pictures, World
from bench.shapesworld_network import lesson
from comfy.model_patcher import ModelPatcher
from harness.environment import cache
from PIL import Image
from reward_guidance.guidance.training.loop import Training
from reward_guidance.nodes.wiring.loaded import manage_network
from reward_guidance.nodes.wiring.patch_network import NetworkGuidance
from reward_guidance.tests.harness.models import shapesworld
from reward_guidance.tests.standins.ring import nearness, ring_reward, truth
from reward_guidance.tests.tools.chart import draw_chart, in_rows
from torch import Tensor

REWARDS = "reward", "held-out reward"
STRENGTH = 4.0
"""Of the network on ShapesWorld, as selection.py has it."""
PICTURE = Path(__file__).parents[2] / "output" / "training_curve.png"


class School(ABC):
    """A network in training, and how its samples are judged: by both rewards."""

    name: str
    training: Training
    looks: int
    """Of the looks at held-out samples, every such one is followed by a look at guided ones."""

    @abstractmethod
    def unguided(self) -> list[float]: ...

    @abstractmethod
    def aim(self) -> list[float]:
        """Of q."""

    @abstractmethod
    def guided(self) -> list[float]:
        """By the network as it is."""


class Ring(School):
    name, looks = "the ring", 1

    def __init__(self, steps: int, form: str, count: int):
        self.world, self.form, self.count = networks.World(), form, count
        self.training = self.world.training("weighted", form, 0, LABELS, steps)

    def judged(self, samples: Tensor) -> list[float]:
        return [float(reward(samples).mean()) for reward in (ring_reward, nearness)]

    def drawn(self, model: ModelPatcher) -> list[float]:
        return self.judged(sample(model, 0, self.count, sampler="dpmpp_2m"))

    def unguided(self):
        return self.drawn(self.world.model())

    def aim(self):
        return self.judged(truth(0, self.count))

    def guided(self):
        return self.drawn(self.world.guided(self.training.result(), self.form, self.world.model()))


class Shapes(School):
    name, looks = "ShapesWorld", 2

    def __init__(self, steps: int, per_prompt: int, pool: int, work: Path):
        self.world = World(shapesworld(), cfg=1.0, steps=30, sampler="euler_ancestral")
        self.bench = Bench(self.world, per_prompt, pool, temperature=0.05, candidates=1)
        self.fitting = lesson(self.world, work, steps=steps)
        self.training = self.fitting.training

    def unguided(self):
        return self.judged(self.bench.candidates[0][0])

    def judged(self, pictures: Pictures) -> list[float]:
        return [float(pictures.reward.mean()), float(pictures.heldout.mean())]

    def aim(self):
        return [self.bench.truth["reward"], self.bench.truth["heldout"]]

    def guided(self):
        loaded = manage_network(self.fitting.network(), self.fitting.card())
        model = NetworkGuidance(loaded, STRENGTH).attach(self.world.pipeline.model)
        return self.judged(
            Pictures.of(self.world, self.world.sample(model, self.bench.per_prompt, self.bench.seeds[0]))
        )


def watch(school: School) -> Image.Image:
    print(f"\nOn {school.name}:")
    table("training step", *REWARDS)
    row = lambda name, values: line(name, *(f"{value:.3f}" for value in values))  # noqa: E731
    aim, seen, looks = school.aim(), [(0, school.unguided())], 0
    row("q", aim)
    row("0", seen[0][1])
    for progress in school.training:
        if progress.check is None:
            continue
        looks += 1
        if looks % school.looks == 0 or progress.step == school.training.task.plan.steps:
            seen.append((progress.step, school.guided()))
            row(str(progress.step), seen[-1][1])
    reward, heldout = (after - before for before, after in zip(seen[0][1], seen[-1][1], strict=True))
    print(
        f"\nThe reward gained {reward:.3f}, the held-out reward {heldout:.3f}: {(reward - heldout) / reward:.1%} of the gain are missing."
    )
    curves = {name: [(step, values[i]) for step, values in seen] for i, name in enumerate(REWARDS)}
    return draw_chart(
        f"A guidance network on {school.name}", "training step", curves, dict(zip(REWARDS, aim, strict=True)), "q"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["ring", "shapesworld"])
    parser.add_argument("--steps", type=int, default=4000, help="of training on the ring")
    parser.add_argument("--form", choices=["correction", "shift"], default="correction", help="on the ring")
    parser.add_argument("--samples", type=int, default=4000, help="on the ring")
    parser.add_argument("--shapes-steps", type=int, default=1500, help="of training on ShapesWorld")
    parser.add_argument("--per-prompt", type=int, default=8)
    parser.add_argument("--pool", type=int, default=128)
    parser.add_argument("--work", type=Path, default=None, help="where collections are kept; the cache if left out")
    chosen = parser.parse_args()
    schools = {
        "ring": lambda: Ring(chosen.steps, chosen.form, chosen.samples),
        "shapesworld": lambda: Shapes(
            chosen.shapes_steps, chosen.per_prompt, chosen.pool, chosen.work or cache() / "bench"
        ),
    }
    pictures = [watch(make()) for name, make in schools.items() if chosen.only in (None, name)]
    PICTURE.parent.mkdir(exist_ok=True)
    in_rows([pictures]).save(PICTURE)
    print(f"\n{PICTURE.name} is drawn.")


if __name__ == "__main__":
    main()
