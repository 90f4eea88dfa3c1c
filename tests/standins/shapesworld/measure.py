"""Samples the benchmark prompts through ComfyUI, unguided, and says how right the pictures are.

usage: python -m tests.standins.shapesworld.measure MODELS_DIR [--kind flow] [--cfg 1,2,4] [--batch 16] [--sheet FILE.png]
"""

import argparse
from pathlib import Path

from ...harness.inprocess import load_comfyui

load_comfyui()

import torch
from PIL import Image
from torch import Tensor

from . import clip, compact, oracle, world
from .pipeline import KINDS, Pipeline


def scorers() -> dict[str, clip.Scorer]:
    return {kind: clip.Scorer(compact.load(kind), kind) for kind in ("guide", "heldout")}


def sample_all(pipeline: Pipeline, cfg: float, batch: int, prompts=world.PROMPTS) -> Tensor:
    """(prompts,B,3,64,64)"""
    return torch.stack([pipeline.pictures(pipeline.latents(prompts, seed, cfg)) for seed in range(batch)], 1)


@torch.no_grad()
def report(pictures: Tensor, prompts=world.PROMPTS) -> dict[str, float]:
    """Accuracy by attribute, for usual and unusual wishes, of the best of four by reward; and the rewards' statistics."""
    asked = torch.tensor([world.parse(prompt) for prompt in prompts])
    read = torch.stack([oracle.read(batch) for batch in pictures])
    right = (read == asked[:, None]).all(2).float()
    scores = {kind: _scores(score, pictures, prompts) for kind, score in scorers().items()}
    typical = world.is_typical(asked)
    numbers = {"right": right.mean(), "typical": right[typical].mean(), "unusual": right[~typical].mean()}
    numbers |= {name: (read[..., i] == asked[:, None, i]).float().mean() for i, name in enumerate(world.ATTRIBUTES)}
    numbers["nothing"] = (read[..., 0] == oracle.NOTHING).float().mean()
    numbers["best of 4"] = _best_of(4, scores["guide"], right)
    for kind, values in scores.items():
        numbers |= {f"{kind} mean": values.mean(), f"{kind} deviation": values.std()}
        numbers[f"{kind} finds right"] = torch.corrcoef(torch.stack([values.flatten(), right.flatten()]))[0, 1]
    numbers["correlation"] = torch.corrcoef(torch.stack([values.flatten() for values in scores.values()]))[0, 1]
    return {name: round(float(value), 3) for name, value in numbers.items()}


def _scores(score: clip.Scorer, pictures: Tensor, prompts) -> Tensor:
    return torch.stack([score(batch, [prompt] * len(batch)) for batch, prompt in zip(pictures, prompts, strict=True)])


def _best_of(n: int, scores: Tensor, right: Tensor) -> Tensor:
    groups = scores.shape[1] // n
    scores, right = (x[:, : groups * n].unflatten(1, (groups, n)) for x in (scores, right))
    return right.gather(2, scores.argmax(2, keepdim=True)).mean()


def contact_sheet(pictures: Tensor, path: str, columns: int = 8, scale: int = 3) -> None:
    rows = [torch.cat(list(row), 2) for row in pictures.split(columns) if len(row) == columns]
    image = Image.fromarray((torch.cat(rows, 1).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())
    image.resize((image.width * scale, image.height * scale), Image.LANCZOS).save(path)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("models_dir")
    parser.add_argument("--kind", choices=KINDS, default="flow")
    parser.add_argument("--cfg", default="1,2,4")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--sheet")
    chosen = parser.parse_args()
    pipeline = Pipeline(chosen.models_dir, kind=chosen.kind)
    for cfg in chosen.cfg.split(","):
        pictures = sample_all(pipeline, float(cfg), chosen.batch)
        print(f"cfg {cfg}: {report(pictures)}", flush=True)
        if chosen.sheet:
            contact_sheet(pictures[:, :2].flatten(0, 1), f"{Path(chosen.sheet).with_suffix('')}_cfg{cfg}.png")


if __name__ == "__main__":
    main()
