"""Reward and held-out reward while a guidance network is trained, in output/training_curve.png and as a markdown table.

On the ring of ring.py. The reward has a ripple that a true judge would not have; held out is the reward without it. Both are means over
4000 guided samples, beside those of p and of q.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.networks import LABELS, World, line, table
from bench.ring import sample
from harness.chart import draw_chart
from reward_guidance.tests.standins.ring import nearness, ring_reward, truth
from torch import Tensor

REWARDS = {"reward": ring_reward, "held-out reward": nearness}
PICTURE = Path(__file__).parents[2] / "output" / "training_curve.png"


def judged(samples: Tensor) -> list[float]:
    return [float(reward(samples).mean()) for reward in REWARDS.values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4000, help="of training")
    parser.add_argument("--form", choices=["correction", "shift"], default="correction")
    parser.add_argument("--samples", type=int, default=4000)
    arguments = parser.parse_args()
    world, count = World(), arguments.samples
    draw = lambda model: judged(sample(model, 0, count, sampler="dpmpp_2m"))  # noqa: E731
    unguided, aim = draw(world.model()), judged(truth(0, count))
    table("training step", *REWARDS)
    line("q", *(f"{value:.3f}" for value in aim))
    seen = [(0, unguided)]
    run = world.training("weighted", arguments.form, 0, LABELS, arguments.steps)
    for progress in run:
        if progress.check is not None:
            seen.append((progress.step, draw(world.guided(run.result(), arguments.form))))
            line(str(progress.step), *(f"{value:.3f}" for value in seen[-1][1]))
    curves = {name: [(step, values[i]) for step, values in seen] for i, name in enumerate(REWARDS)}
    PICTURE.parent.mkdir(exist_ok=True)
    draw_chart("A guidance network on the ring", "training step", curves, dict(zip(REWARDS, aim, strict=True)), "q").save(PICTURE)
    print(f"\n{PICTURE.name} is drawn.")


if __name__ == "__main__":
    main()
