"""A flow model unguided and guided by a reward, through the shipped workflow in a real ComfyUI: `make demo`.

Leaves demo.png (rows: prompts; columns: unguided, guided; scores beside each), demo.json and a printed table.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from reward_guidance.guidance.rewards import Reward, evaluate, load_reward
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from ..harness import comfy, environment, models
from ..harness.client import Client, Prompt
from ..harness.environment import CHECKOUT, say
from ..harness.graphs import nodes_of, ui_to_api
from ..standins.shapesworld import oracle, world
from .sheet import draw_sheet

WORKFLOW = CHECKOUT / "workflows" / "flow_guidance_sd35.json"
PICTURE, RECORD = CHECKOUT / "demo.png", CHECKOUT / "demo.json"
SAMPLER = "RewardGuidanceKSampler"
BATCH, SEED = 4, 7


@dataclass(frozen=True)
class Cell:
    """One prompt, sampled one way."""

    prompt: str
    column: str
    pictures: Tensor
    """(B,3,H,W) in [0,1]"""
    rewards: list[float]
    heldout: list[float]
    right: list[bool]
    """Whether a picture shows all that its prompt says."""
    model_calls: int
    seconds: float

    def scores(self) -> dict[str, float]:
        return {
            "reward": mean(self.rewards),
            "held-out": mean(self.heldout),
            "accuracy": mean(self.right),
            "model calls": self.model_calls,
            "seconds": self.seconds,
        }

    def notes(self) -> list[str]:
        right = f"right {sum(self.right)} of {len(self.right)}"
        return [f"reward {mean(self.rewards):+.2f}", f"held-out {mean(self.heldout):+.2f}", right]


def mean(values) -> float:
    return sum(values) / len(values)


class Stage:
    """A server, the workflow, and the judges."""

    def __init__(self, client: Client, folder: Path):
        self.client = client
        self.workflow = ui_to_api(json.loads(WORKFLOW.read_text()), client.object_info())
        self.reward = load_reward(folder / "reward_models" / "shapes_clip.safetensors")
        self.heldout = load_reward(folder / "reward_models" / "shapes_heldout.safetensors")

    def strength(self) -> float:
        return self.workflow[nodes_of(self.workflow, SAMPLER)[0]]["inputs"]["strength"]

    def play(self, text: str, column: str, strength: float, seed: int = SEED) -> Cell:
        prompt = adapt(self.workflow, text, strength, seed)
        result = self.client.run(prompt).check()
        images = self.client.images(result, nodes_of(prompt, "SaveImage")[0])
        pictures = torch.stack([pil_to_tensor(image) for image in images]).float() / 255
        return Cell(
            prompt=text,
            column=column,
            pictures=pictures,
            rewards=score(self.reward, pictures, text),
            heldout=score(self.heldout, pictures, text),
            right=(oracle.read(pictures) == torch.tensor(world.parse(text))).all(1).tolist(),
            model_calls=result.model_calls,
            seconds=result.node_seconds[nodes_of(prompt, SAMPLER)[0]],
        )


def adapt(workflow: Prompt, text: str, strength: float, seed: int) -> Prompt:
    """The workflow with this prompt, strength and seed, the size and the cfg of the stand-in, and a counter on the model."""
    prompt = {node: content | {"inputs": dict(content["inputs"])} for node, content in workflow.items()}
    for content in prompt.values():
        inputs = content["inputs"]
        if content["_meta"]["title"] == "Prompt":
            inputs["value"] = text
        elif content["class_type"] == "EmptySD3LatentImage":
            inputs.update(width=world.SIDE, height=world.SIDE, batch_size=BATCH)
        elif content["class_type"] == SAMPLER:
            prompt_model = inputs["model"]
            inputs.update(seed=seed, strength=strength, cfg=1.0, model=["probe", 0])
    return prompt | {"probe": {"class_type": "ProbeModelCalls", "inputs": {"model": prompt_model}}}


@torch.no_grad()
def score(reward: Reward, pictures: Tensor, text: str) -> list[float]:
    """Rewards in units of their usual spread."""
    return reward.standardize(evaluate(reward, pictures, [text])).tolist()


def perform(stage: Stage) -> list[Cell]:
    say("loading the models")
    stage.play(world.DEMO_PROMPTS[0], "warm-up", 0, SEED + 1)
    cells = []
    for i, text in enumerate(world.DEMO_PROMPTS, 1):
        for column, strength in (("unguided", 0.0), ("guided", stage.strength())):
            cell = stage.play(text, column, strength)
            say(f"{i} of {len(world.DEMO_PROMPTS)}  {column:8}  {'  '.join(cell.notes())}  {text}")
            cells.append(cell)
    return cells


def totals(cells: list[Cell]) -> dict[str, dict[str, float]]:
    """Column -> each score's mean over the prompts."""
    columns: dict[str, list[dict[str, float]]] = {}
    for cell in cells:
        columns.setdefault(cell.column, []).append(cell.scores())
    return {column: {name: mean([row[name] for row in rows]) for name in rows[0]} for column, rows in columns.items()}


def table(summary: dict[str, dict[str, float]]) -> str:
    formats = {"reward": "+.2f", "held-out": "+.2f", "accuracy": ".0%", "model calls": ".0f", "seconds": ".2f"}
    lines = ["| | " + " | ".join(formats) + " |", "|---|" + "---|" * len(formats)]
    for column, scores in summary.items():
        lines.append(
            f"| {column} | " + " | ".join(format(scores[name], style) for name, style in formats.items()) + " |"
        )
    return "\n".join(lines)


def record(cells: list[Cell], summary: dict) -> dict:
    kept = ("prompt", "column", "rewards", "heldout", "right", "model_calls", "seconds")
    return {"summary": summary, "cells": [{name: getattr(cell, name) for name in kept} for cell in cells]}


def sheet(cells: list[Cell], summary: dict) -> Image.Image:
    rows: dict[str, dict[str, tuple[Tensor, list[str]]]] = {}
    for cell in cells:
        rows.setdefault(cell.prompt, {})[cell.column] = (cell.pictures, cell.notes())
    headings = {
        column: f"{column}: {row['accuracy']:.0%} right, {row['model calls']:.0f} model calls"
        for column, row in summary.items()
    }
    return draw_sheet("A flow model, without and with a reward to follow", headings, rows)


def main() -> None:
    started = time.monotonic()
    folder = models.shapesworld()
    base = environment.cache() / "work" / "demo"
    models.link_models(base / "models", folder)
    with comfy.serve(base) as server:
        cells = perform(Stage(Client(server.url), folder))
    summary = totals(cells)
    RECORD.write_text(json.dumps(record(cells, summary), indent=1) + "\n")
    sheet(cells, summary).save(PICTURE)
    print(
        f"\n{len(world.DEMO_PROMPTS)} prompts, {BATCH} pictures each; rewards in units of their usual spread\n\n{table(summary)}\n"
    )
    print(
        "The model of this demo is far smaller than the reward that it follows, so that the seconds are mostly the reward's.\n"
    )
    print(f"{PICTURE} and {RECORD.name}, {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
