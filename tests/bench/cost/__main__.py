"""What guidance costs: seconds and memory of a guided step, of what could be used instead, and how both grow.

    python tests/bench/cost --profile cpu    reduced models; minutes on a laptop; part of `make bench`
    python tests/bench/cost --profile gpu    the published sizes; under ten minutes on an H100

Weights are random: time and memory do not depend on them. The models are ComfyUI's own classes, the rewards are in the published layouts.
Ratios are of runs that took turns. Prints markdown tables; writes them to output/cost/cost_PROFILE.json, and curves beside it.

A machine needs this checkout, ComfyUI's folder (COMFYUI_DIR), and of Python packages torch, torchvision, numpy, safetensors, transformers,
einops, scipy, Pillow, psutil, tqdm, aiohttp, yarl, PyYAML, torchsde, open_clip_torch, comfy-kitchen and comfy-aimdo with what these require.
Without the rest of ComfyUI's requirements only the row of particles is missing.
"""

import argparse
import gc
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path[:1] = [str(Path(__file__).parents[2])]
from harness.inprocess import load_comfyui

load_comfyui()

import comfy.model_management
from bench.cost import alternatives, scaling, steps, training
from bench.cost.clock import GPU
from bench.cost.report import Report
from bench.cost.steps import Variant
from bench.cost.world import World
from reward_guidance.guidance.errors import GuidanceError

TABLE = "A guided step beside the plain one"
DECODERS = ("latent_rgb", "taesd", "vae")
TARGETS = [Variant("PickScore", "taesd")]
ALL = [Variant(reward, decoder) for reward in ("PickScore", "ensemble") for decoder in DECODERS]


@dataclass(frozen=True)
class Profile:
    reduced: bool
    pixels: tuple[int, ...]
    """The last is the one that everything is measured at."""
    batches: tuple[int, ...]
    video: int
    """Pixels of a video's shorter side."""
    repeats: int
    seconds: float
    """After so many, what is left is named and not measured."""
    images: alternatives.Sizes
    growth: scaling.Sizes
    fit_steps: int


PROFILES = {
    "cpu": Profile(
        True, (48, 64), (1, 2), 64, 3, 600,
        alternatives.Sizes(["SD1.5"], 64, steps=4, iterations=50, repeats=1),
        scaling.Sizes("SD1.5", (1, 2, 4), (64, 96, 128), (2, 4, 8), (0, 1, 2, 4), (1, 2, 4)), 100,
    ),
    "gpu": Profile(
        False, (512, 1024), (1, 4), 480, 3, 480,
        alternatives.Sizes(["SDXL"], 512, steps=20, iterations=50, repeats=1),
        scaling.Sizes("SDXL", (1, 2, 4, 8), (512, 768, 1024, 1536), (5, 10, 20, 40), (0, 1, 2, 4, 8), (1, 2, 4, 8)), 200,
    ),
}  # fmt: skip


class Bench:
    def __init__(self, profile: Profile, report: Report):
        self.profile, self.report, self.end = profile, report, time.monotonic() + profile.seconds
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
        """Measure it, if there is time left and memory enough."""
        if time.monotonic() > self.end:
            self.report.leave_out(f"{what}, for lack of time")
            return
        try:
            measure()
        except comfy.model_management.OOM_EXCEPTION:
            self.report.leave_out(f"{what}, for lack of memory")
        except (GuidanceError, ModuleNotFoundError) as error:
            self.report.leave_out(f"{what}: {error}")

    def steps(self, name: str, batch: int, side: int, variants: list[Variant], table: str = TABLE) -> None:
        what = f"{table}: {name} at {side} pixels, batch {batch}"
        self.part(what, lambda: steps.rows(self.report, table, self.of(name), side, batch, variants, self.profile.repeats))

    def run(self) -> None:
        """What matters most first."""
        profile, side = self.profile, self.profile.pixels[-1]
        small, large = profile.batches
        for name in ("Flux-dev", "SD3.5-medium", "SD1.5", "SDXL"):
            self.steps(name, small, side, ALL)
        self.steps("SDXL", small, side, steps.WOULD_BRING, "What would bring what")
        for name in profile.images.families:
            self.part(f"alternatives with {name}", lambda name=name: alternatives.rows(self.report, self.of(name), profile.images))
        self.part("growth", lambda: scaling.rows(self.report, self.of(profile.growth.family), profile.growth))
        self.part("particles", lambda: scaling.crowds(self.report, self.of(profile.growth.family), profile.growth))
        self.part("collecting", lambda: training.collecting(self.report, self.of("SDXL"), side))
        self.part("fitting", lambda: training.fitting(self.report, profile.fit_steps, profile.reduced))
        self.steps("Wan 1.3B", small, profile.video, TARGETS)
        for name in ("SDXL", "SD1.5", "SD3.5-medium", "Flux-dev"):
            self.steps(name, large, side, TARGETS)
            for batch in profile.batches:
                self.steps(name, batch, profile.pixels[0], TARGETS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", choices=PROFILES, default="gpu" if GPU else "cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[3] / "output" / "cost")
    arguments = parser.parse_args()
    started = time.monotonic()
    Bench(PROFILES[arguments.profile], Report(arguments.out, f"cost_{arguments.profile}")).run()
    print(f"\n{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
