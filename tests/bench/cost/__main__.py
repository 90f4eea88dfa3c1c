"""What guidance costs: seconds and memory of a guided step, of what could be used instead, and how both grow.

    python tests/bench/cost --profile cpu    reduced models; minutes on one core; `make bench-cost`
    python tests/bench/cost --profile gpu    the published sizes; under ten minutes on an H200

README.md beside this file has the method. Prints markdown tables; writes them to output/cost/cost_PROFILE.json, and curves beside it.
What a bare machine lacks is packed by `make bench-gpu-pack` (pack.py) and found here by itself.
"""

import argparse
import gc
import sys
import time

STARTED = time.monotonic()

import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

sys.path[:1] = [str(Path(__file__).parents[2])]
from bench.cost import pack

pack.use()

from harness.inprocess import load_comfyui

load_comfyui()

import comfy.model_management
import torch
from bench.cost import alternatives, clock, scaling, steps, training
from bench.cost.report import Report
from bench.cost.steps import Effort, Variant
from bench.cost.world import World

TABLE = "A guided step beside the plain one"
DECODERS = ("latent_rgb", "taesd", "vae")
TARGETS = [Variant("PickScore", "taesd")]
ALL = [Variant(reward, decoder) for reward in ("PickScore", "ensemble") for decoder in DECODERS]
PICTURES, VIDEO = ("Flux-dev", "SD3.5-medium", "SDXL", "SD1.5"), "Wan 1.3B"


@dataclass(frozen=True)
class Profile:
    reduced: bool
    pictures: tuple[str, ...]
    """Families, the most important first."""
    video: str
    pixels: tuple[int, int]
    batches: tuple[int, int]
    video_pixels: int
    """Of the shorter side."""
    elsewhere: list[Variant]
    """What is measured beside the larger pixels and the smaller batch."""
    effort: Effort
    seconds: float
    """From the start; after so many, what is left is named and not measured."""
    longest: float
    """The share of them that one part may take."""
    alternatives: alternatives.Sizes
    growth: scaling.Sizes
    training: training.Sizes


PROFILES = {
    "trial": Profile(
        True, ("SD3.5-medium",), "SD3.5-medium", (8, 16), (1, 2), 8, TARGETS, Effort(1, 1), 300, 1 / 2,
        alternatives.Sizes(("SD-Turbo", "SD3.5-medium"), 8, steps=2, iterations=2, repeats=1),
        scaling.Sizes("SD3.5-medium", (1, 2), (8, 16), (2, 3), (1, 2), (1, 2), Effort(1, 1)),
        training.Sizes("SD3.5-medium", (16, 32), ((4, 4, 4), (4, 8, 8)), ("small",), (1,), 1, Effort(1, 1)),
    ),
    "cpu": Profile(
        True, PICTURES, VIDEO, (32, 64), (1, 2), 32, ALL, Effort(2, 3), 600, 1 / 3,
        alternatives.Sizes((*PICTURES, "SD-Turbo", VIDEO), 32, steps=5, iterations=10, repeats=3),
        scaling.Sizes("SD1.5", (1, 2, 4), (64, 96, 128), (2, 4, 8), (1, 2, 4), (1, 2, 4), Effort(2, 3)),
        training.Sizes("SDXL", (32, 64), ((4, 8, 8), (4, 16, 16), (4, 32, 32)), ("small", "medium"), (1, 2), 2, Effort(2, 3)),
    ),
    "gpu": Profile(
        False, PICTURES, VIDEO, (512, 1024), (1, 4), 480, TARGETS, Effort(4, 3), 540, 1 / 6,
        alternatives.Sizes(("SDXL", "SD-Turbo", "Flux-dev"), 512, steps=20, iterations=50, repeats=3),
        scaling.Sizes("SDXL", (1, 2, 4, 8), (512, 768, 1024, 1536), (5, 10, 20, 40), (1, 2, 4, 8), (1, 2, 4, 8), Effort(4, 3)),
        training.Sizes("SDXL", (512, 1024), ((4, 64, 64), (4, 128, 128), (16, 128, 128)), ("small", "medium", "large"), (1, 2), 2, Effort(10, 3)),
    ),
}  # fmt: skip
"""trial: every line of this benchmark, in a minute."""


class Bench:
    def __init__(self, profile: Profile, report: Report, started: float):
        self.profile, self.report, self.end = profile, report, started + profile.seconds
        self.world: World | None = None

    def of(self, name: str) -> World:
        """The model, in place of the one before."""
        if self.world is None or self.world.name != name:
            self.world = None
            comfy.model_management.unload_all_models()
            gc.collect()
            comfy.model_management.soft_empty_cache()
            self.world = World(name, self.profile.reduced)
        return self.world

    def part(self, what: str, measure: Callable[[], object]) -> None:
        """Measure it, if there is time left and memory enough. Whatever else goes wrong is named too, and ends no more than this part."""
        left = self.end - time.monotonic()
        if left <= 0:
            self.report.leave_out(f"{what}, for lack of time")
            return
        try:
            with clock.within(min(left, self.profile.longest * self.profile.seconds)):
                measure()
        except clock.OutOfTime as error:
            self.report.leave_out(f"{what}, for lack of time: it {error}")
        except comfy.model_management.OOM_EXCEPTION:
            self.report.leave_out(f"{what}, for lack of memory")
        except Exception as error:
            traceback.print_exc()
            self.report.leave_out(f"{what}: {type(error).__name__}: {error}")

    def steps(self, name: str, batch: int, side: int, variants: list[Variant], table: str = TABLE) -> None:
        what = f"{table}: {name} at {side} pixels, batch {batch}"
        self.part(
            what, lambda: steps.rows(self.report, table, self.of(name), side, batch, variants, self.profile.effort)
        )

    def run(self) -> None:
        """What matters most first."""
        profile, report = self.profile, self.report
        (fewer, side), (one, many) = profile.pixels, profile.batches
        for name in profile.pictures:
            self.steps(name, one, side, ALL)
        self.steps(profile.growth.family, one, side, steps.WOULD_BRING, "What would bring what")
        for name in profile.alternatives.families:
            self.part(
                f"alternatives with {name}",
                lambda name=name: alternatives.rows(report, self.of(name), profile.alternatives),
            )
        self.part("growth", lambda: scaling.rows(report, self.of(profile.growth.family), profile.growth))
        self.part("particles", lambda: scaling.crowds(report, self.of(profile.growth.family), profile.growth))
        self.part("collecting", lambda: training.collecting(report, self.of(profile.training.family), profile.training))
        self.part("fitting", lambda: training.fitting(report, profile.training))
        self.steps(profile.video, one, profile.video_pixels, profile.elsewhere)
        for name in reversed(profile.pictures):
            self.steps(name, many, side, profile.elsewhere)
            for batch in profile.batches:
                self.steps(name, batch, fewer, profile.elsewhere)
        self.part("processes that collect", lambda: training.collectors(report, profile.training, profile.reduced))
        self.part("processes that fit", lambda: training.launched(report, profile.training))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", choices=PROFILES, default="gpu" if clock.GPU else "cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[3] / "output" / "cost")
    parser.add_argument("--seconds", type=float, help="in place of the profile's own limit")
    arguments = parser.parse_args()
    if not clock.GPU:
        torch.set_num_threads(1)
    profile, report = PROFILES[arguments.profile], Report(arguments.out, f"cost_{arguments.profile}")
    Bench(replace(profile, seconds=arguments.seconds or profile.seconds), report, STARTED).run()
    print(f"\n{time.monotonic() - STARTED:.0f} s, {time.process_time():.0f} s of them on the CPU")


if __name__ == "__main__":
    main()
