"""Models folders in the cache: the stand-ins of every format, and ShapesWorld."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from .environment import CHECKOUT, cache, comfyui, locked, say, scratch

FORMATS = CHECKOUT / "tests" / "standins" / "formats.py"


def format_standins() -> Path:
    """A models folder with a random stand-in of every format, made once for each version of the script and of ComfyUI.

    Flux also has the name of Z-Image, whose latents are the same.
    """
    made_by = [FORMATS, comfyui() / "comfyui_version.py"]
    digest = hashlib.sha256(b"\0".join(path.read_bytes() for path in made_by)).hexdigest()[:16]
    target = cache() / f"standins-{digest}"
    with locked(), scratch() as work:
        if not target.is_dir():
            say("making the format stand-ins")
            subprocess.run(
                [sys.executable, str(FORMATS), str(comfyui()), str(work / "models")], check=True, stdout=sys.stderr
            )
            (work / "models").rename(target)
        also_called(target / "diffusion_models" / "flux1-dev.safetensors", "z_image_bf16.safetensors")
    return target


def shapesworld() -> Path:
    """A models folder with the trained stand-in, of which only what is out of date is written. The reward also has PickScore's name."""
    from ..standins.shapesworld.expand import expand

    target = cache() / "shapesworld"
    with locked():
        expand(target)
        also_called(target / "reward_models" / "shapes_clip.safetensors", "PickScore_v1.safetensors")
    return target


def also_called(file: Path, name: str) -> None:
    link = file.with_name(name)
    if not link.is_symlink():
        link.symlink_to(file.name)


def link_models(target: Path, *sources: Path) -> None:
    """A models folder of links to the files of others; later ones win. What a test adds to it stays out of the cache."""
    shutil.rmtree(target, ignore_errors=True)
    for source in sources:
        for file in filter(Path.is_file, source.rglob("*")):
            link = target / file.relative_to(source)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            os.symlink(file, link)


def link_every(target: Path) -> None:
    """All stand-ins, and places held for the other models that the shipped workflows name."""
    link_models(target, format_standins(), shapesworld())
    for path in (CHECKOUT / "workflows").glob("*.json"):
        hold_places(target, json.loads(path.read_text()))


def asked_for(folder: Path, workflow: dict) -> list[Path]:
    """Where the model files that a workflow names belong in a models folder."""
    graphs = [workflow, *workflow.get("definitions", {}).get("subgraphs", [])]
    named = [model for graph in graphs for node in graph["nodes"] for model in node["properties"].get("models", [])]
    return [folder / model["directory"] / model["name"] for model in named]


def hold_places(folder: Path, workflow: dict) -> None:
    """Empty files in place of models that have no stand-in: they can be chosen, not loaded."""
    for file in asked_for(folder, workflow):
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
