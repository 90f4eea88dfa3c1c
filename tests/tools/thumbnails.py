"""Draws the thumbnails of the shipped workflows, or of those named: `make thumbnails`.

A workflow whose models ShapesWorld stands in for shows the pictures that it made there; any other shows its own graph.
"""

import json
import shutil
import sys
from collections.abc import Callable, Sequence

from PIL import Image, ImageDraw

from ..harness import comfy, environment, models
from ..harness.client import Client, Result
from ..harness.environment import CHECKOUT, say
from ..harness.graphs import changed, ui_to_api
from ..standins.shapesworld.world import SIDE as PICTURE
from .diagram import FAINT, GOLD, INK, NIGHT, diagram
from .sheet import write

WORKFLOWS = CHECKOUT / "workflows"
SIDE, MARGIN, TOP = 480, 20, 112
TITLES = {
    "flow_guidance_sd35": ("SD3.5", "guided by a reward; here a toy model"),
    "flow_guidance_flux": ("Flux", "guided by a reward"),
    "flow_guidance_z_image": ("Z-Image", "guided by a reward"),
    "diffusion_guidance_sdxl": ("SDXL", "guided by a reward"),
    "video_guidance_wan": ("Wan video", "guided by a reward on its frames"),
    "score_and_select_sd35": ("Score and select", "the best two of a toy model's eight"),
    "particles_sd35": ("Particles", "the best of eight; here a toy model"),
    "everything_combined_flux": ("All together", "rewards, held-out, LoRA, ControlNet"),
    "guidance_network_train_sd35": ("Train a network", "that guides SD3.5"),
    "guidance_network_sample_sd35": ("Guidance network", "what it learned; here a toy model"),
    "guidance_network_sd_turbo": ("One step", "SD-Turbo with chosen noise"),
}
SHAPES = {"width": PICTURE, "height": PICTURE, "batch_size": 8, "cfg": 1.0}
TRAINING = {
    "EmptySD3LatentImage": {"batch_size": 16},
    "RewardGuidanceCollect": {
        "count": 320,
        "steps": 15,
        "levels": 4,
        "prompts": "a small blue heart on a yellow ground",
    },
    "RewardGuidanceTrain": {"steps": 500, "size": "small"},
}
"""What a stand-in needs of the training's size."""


class Stage:
    """Plays shipped workflows on ShapesWorld."""

    def __init__(self, client: Client):
        self.client = client
        self.object_info = client.object_info()

    def play(self, name: str, **values) -> Result:
        """values: of every input with such a name, or of every node of such a class."""
        prompt = ui_to_api(read(name), self.object_info)
        return self.client.run(changed(prompt, SHAPES | values), timeout=3600, extra_pnginfo={}).check()

    def pictures(self, result: Result) -> list[Image.Image]:
        """Those that were saved, with their metadata."""
        return [Image.open(self.client.open(file)) for file in result.saved]


def read(name: str) -> dict:
    return json.loads((WORKFLOWS / f"{name}.json").read_text())


def strengths(stage: Stage, name: str, most: int = 1) -> Image.Image:
    return side_by_side(
        {f"strength {strength}": stage.pictures(stage.play(name, strength=float(strength))) for strength in (0, most)}
    )


def trained(stage: Stage, name: str) -> Image.Image:
    stage.play("guidance_network_train_sd35", **TRAINING)
    return strengths(stage, name, most=4)


def particles(stage: Stage, name: str) -> Image.Image:
    return side_by_side(
        {
            f"{count} particle{'s' * (count > 1)}": stage.pictures(stage.play(name, particles=count, keep=1))
            for count in (1, 8)
        }
    )


def selection(stage: Stage, name: str) -> Image.Image:
    """All candidates with their scores, and a frame around those that were saved."""
    result = stage.play(name)
    saved = stage.pictures(result)
    entries = json.loads(saved[0].info["reward_guidance"]).values()
    scores = max((entry["standardized"] for entry in entries if "indices" not in entry), key=len)
    [chosen] = [entry["indices"] for entry in entries if "indices" in entry]
    annotated = [picture for picture in stage.client.images(result) if picture.height > PICTURE]
    candidates = [
        picture.crop(((picture.width - PICTURE) // 2, 0, (picture.width + PICTURE) // 2, PICTURE))
        for picture in annotated
    ]
    sheet = blank()
    draw = ImageDraw.Draw(sheet)
    side, gap = 98, 16
    for i, (picture, score) in enumerate(zip(candidates, scores, strict=True)):
        x, y = MARGIN + i % 4 * (side + gap), TOP + 22 + i // 4 * (side + 64)
        if i in chosen:
            draw.rounded_rectangle((x - 6, y - 6, x + side + 5, y + side + 5), 8, GOLD)
        sheet.paste(enlarged(picture, side), (x, y))
        write(draw, (x + side // 2, y + side + 22), f"{score:+.2f}", 20, GOLD if i in chosen else FAINT, "mm")
    return sheet


PLAYED: dict[str, Callable[[Stage, str], Image.Image]] = {
    "flow_guidance_sd35": strengths,
    "guidance_network_sample_sd35": trained,
    "score_and_select_sd35": selection,
    "particles_sd35": particles,
}


def side_by_side(halves: dict[str, Sequence[Image.Image]]) -> Image.Image:
    """Two blocks of eight pictures, of the same seeds."""
    sheet = blank()
    side, gap = 79, 6
    block = SIDE - MARGIN - (2 * side + gap)
    for x, (heading, pictures) in zip((MARGIN + 16, block - 16), halves.items(), strict=True):
        write(ImageDraw.Draw(sheet), (x + side + gap // 2, SIDE - MARGIN // 2), heading, 20, FAINT, "mb")
        for i, picture in enumerate(pictures):
            sheet.paste(enlarged(picture, side), (x + i % 2 * (side + gap), TOP + i // 2 * (side + gap)))
    return sheet


def graph(workflow: dict) -> Image.Image:
    sheet = blank()
    sheet.paste(diagram(workflow, SIDE - 2 * MARGIN, SIDE - TOP - MARGIN), (MARGIN, TOP))
    return sheet


def blank() -> Image.Image:
    return Image.new("RGB", (SIDE, SIDE), NIGHT)


def enlarged(picture: Image.Image, side: int) -> Image.Image:
    return picture.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)


def entitled(sheet: Image.Image, name: str) -> Image.Image:
    title, line = TITLES[name]
    draw = ImageDraw.Draw(sheet)
    write(draw, (MARGIN, 16), title, 42, INK)
    write(draw, (MARGIN, 70), line, 22, FAINT)
    return sheet


def save(sheet: Image.Image, name: str) -> None:
    entitled(sheet, name).save(WORKFLOWS / f"{name}.jpg", quality=88, optimize=True)
    say(f"{name}.jpg")


def main() -> None:
    names = sys.argv[1:] or list(TITLES)
    for name in (name for name in names if name not in PLAYED):
        save(graph(read(name)), name)
    played = [name for name in names if name in PLAYED]
    if not played:
        return
    base = environment.cache() / "work" / "thumbnails"
    models.link_models(base / "models", models.shapesworld())
    shutil.rmtree(base / "output", ignore_errors=True)
    with comfy.serve(base) as server:
        stage = Stage(Client(server.url))
        for name in played:
            save(PLAYED[name](stage, name), name)


if __name__ == "__main__":
    main()
