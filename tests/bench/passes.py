"""FLOPs of one pass of a picture through each part, forward and backward, of ShapesWorld and of published sizes; and what they make of a step.

The floor of a guided step is that of the plain one, and a pass through the decoder and the reward and back: what no implementation can do
without. It is told in FLOPs, and in the least time on an H100 (cost/roofline.py), for one picture: where nothing but attention is fused, as
PyTorch runs it by itself, and where all that is no product of matrices is fused into one that is. Memory is what the looked-at estimate's way
there and back holds at most, one picture in bfloat16; the VAE, as the node runs it, computes its blocks again on the way back.
Models of published sizes live on the meta device, which computes shapes and nothing else. Prints markdown tables; writes them to
output/cost/passes.json.

usage: python tests/bench/passes.py [FAMILY ...]
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from math import prod
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from harness.inprocess import load_comfyui

load_comfyui()

import comfy.sd
import comfy.supported_models
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy.ldm.modules.diffusionmodules.model import AttnBlock, pytorch_attention
from reward_guidance.guidance.network.unet import Architecture, GuidanceNetwork, Text
from reward_guidance.guidance.training.recipe import WIDTHS
from reward_guidance.nodes.wiring.tiny_decoders import TAESD
from reward_guidance.nodes.wiring.vae_decoder import checkpointed
from reward_guidance.tests.bench.cost import sizes
from reward_guidance.tests.bench.cost.memory import held
from reward_guidance.tests.bench.cost.report import Report
from reward_guidance.tests.bench.cost.roofline import BYTES, Roofline, fused_attention, roofline
from reward_guidance.tests.bench.cost.scaling import exponent
from reward_guidance.tests.bench.cost.world import HALVINGS, fixed
from reward_guidance.tests.bench.shapesworld import World
from reward_guidance.tests.harness.models import shapesworld as models
from reward_guidance.tests.standins.published import PUBLISHED
from reward_guidance.tests.standins.shapesworld import text
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import interpolate
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

ROWS = 4
PICKSCORE = CLIPVisionConfig(
    hidden_size=1280,
    intermediate_size=5120,
    num_hidden_layers=32,
    num_attention_heads=16,
    image_size=224,
    patch_size=14,
    projection_dim=1024,
)
SIDES = {"SD1.5": 512, "SD-Turbo": 512, "SDXL": 1024, "SD3.5-medium": 1024, "Flux-dev": 1024}
FINETUNED = "SD1.5", "SDXL"
"""Models whose way back has a price too."""
NOISE_STEPS = 4
"""Of the network, for one of a one-step generator."""
TARGETS = {"SDXL": 1.10, "SD3.5-medium": 1.06, "Flux-dev": 1.03}
"""Of a guided step by the plain one, with the decoder taesd."""
TINY = {f"taesd, {name}": halvings for name, halvings in HALVINGS.items()}
GROWING = (512, 1024, 2048)
"""Pixels of a side. The reward sees 224 of them, whatever they are."""
LAYOUTS = {"PickScore": "PickScore", "HPS v2.1": "HPS", "ImageReward": "ImageReward"}
"""Of rewards, by their published keys."""
SPARSE = "taesd, half size"
"""The decoder for which looking at every other step is told too."""
META = torch.device("meta")

Prices = dict[str, float]
Call = Callable[[Tensor], Tensor]


def flops(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()


def price(name: str, call: Callable[[Tensor], Tensor], into: Tensor) -> Prices:
    """A pass of one row, and its way back to what went in and to all weights that want a gradient."""
    there = forward(call, into)
    both = flops(lambda: call(into.clone().requires_grad_()).sum().backward()) / len(into)
    return {name: there, f"{name} backward": both - there}


@torch.no_grad()
def forward(call: Callable[[Tensor], Tensor], into: Tensor) -> float:
    return flops(lambda: call(into)) / len(into)


def network(architecture: Architecture, shape: Sequence[int], tokens: int) -> Prices:
    """Of a training step, and of what a sampling step takes."""
    with torch.device("meta"):
        made = GuidanceNetwork(architecture.fitted(shape))
        latents, angle = torch.empty(ROWS, *shape), torch.empty(ROWS)
        words = Text(torch.empty(ROWS, tokens, architecture.tokens), torch.empty(ROWS, architecture.pooled))

    def learn(x: Tensor) -> Tensor:
        value, answer = made((x,), angle, words, with_denoised=True)
        return value.sum() + answer.sum()

    prices = price("network", learn, latents)
    made.requires_grad_(False)
    return prices | {"guided step": sum(price("", lambda x: made((x,), angle, words), latents).values())}


def shapesworld(world: World) -> Prices:
    pipeline, prompts = world.pipeline, world.prompts[:ROWS]
    [[context, extra]] = pipeline.conditions(prompts)[0]
    context, pooled = context.clone(), extra["pooled_output"].clone()
    options = {"optimized_attention_override": text.weighted_attention}
    unet = pipeline.model.model.diffusion_model
    latents, pixels = torch.randn(ROWS, 16, 8, 8), torch.rand(ROWS, 3, 64, 64)
    return {
        **price(
            "model",
            lambda x: unet(x, torch.ones(ROWS), context=context, y=pooled, transformer_options=options),
            latents,
        ),
        **price("decoder", pipeline.decode, latents),
        **price("reward", lambda x: world.reward(x, prompts), pixels),
    }


def decoder(family: sizes.Family) -> nn.Module:
    """With an attention that does not ask how much memory is free."""
    made = comfy.sd.VAE(sd={key: torch.zeros(shape) for key, shape in family.vae(False).items()}).first_stage_model
    for layer in made.modules():
        if isinstance(layer, AttnBlock):
            layer.optimized_attention = pytorch_attention
    return made.float().requires_grad_(False)


def tiny_decoder(family: sizes.Family) -> TAESD:
    made = sizes.decoder("taesd", family, False, getattr(comfy.supported_models, family.config).latent_format())
    made.module.to("meta", torch.float32)
    return made


def told(family: sizes.Family, rows: int) -> dict[str, Tensor]:
    """What a model asks for beside latents and noise levels."""
    pooled = family.unet.get("adm_in_channels") or family.pooled
    guidance = {"guidance": torch.empty(rows, device=META)} if family.config == "Flux" else {}
    text = {"context": torch.empty(rows, *family.tokens, device=META)} | (
        {"y": torch.empty(rows, pooled, device=META)} if pooled else {}
    )
    return guidance | text


@cache
def parts(name: str) -> dict[str, tuple[Call, tuple[int, ...]]]:
    """Of a step: calls, and the shape of what goes in, without the batch. PickScore is without its tower of texts, which sees each prompt once."""
    family = sizes.FAMILIES[name]
    unet = sizes.base_model(family, False, META).diffusion_model.requires_grad_(False)
    vae = decoder(family).to(META)
    with META:
        judge = CLIPVisionModelWithProjection(PICKSCORE).requires_grad_(False)
    options = {"optimized_attention_override": lambda _, *args, **kwargs: attention_pytorch(*args, **kwargs)}

    def ask(x: Tensor) -> Tensor:
        return unet(x, torch.empty(len(x), device=META), transformer_options=options, **told(family, len(x)))

    latents = family.shape(SIDES[name], 1)[1:]
    return {
        "model": (ask, latents),
        "decoder": (vae.decode, latents),
        **{each: (fixed(tiny_decoder(family), halvings).pixels, latents) for each, halvings in TINY.items()},
        "reward": (lambda x: judge(x).image_embeds, (3, 224, 224)),
    }


def of_rows(shape: Sequence[int], rows: int) -> Tensor:
    return torch.empty(rows, *shape, device=META)


def published(name: str, size: str = "small") -> Prices:
    family, calls = sizes.FAMILIES[name], parts(name)
    ask, latents = calls["model"]
    architecture = Architecture(
        family.channels, 1, tokens=family.tokens[1], pooled=family.pooled, width=WIDTHS[size], scalar=True
    )
    prices = (
        price("model", ask, of_rows(latents, ROWS))
        if name in FINETUNED
        else {"model": forward(ask, of_rows(latents, ROWS))}
    )
    for part, (call, shape) in calls.items():
        prices |= {} if part == "model" else price(part, call, of_rows(shape, ROWS))
    return prices | network(architecture, latents, family.tokens[0])


def rows_of(name: str) -> int:
    """For one picture: two with classifier-free guidance."""
    return 1 if sizes.FAMILIES[name].cfg == 1 else 2


def least(name: str) -> dict[str, Roofline]:
    """Of a plain step, and of a pass of one picture through each other part and back."""
    calls, found = parts(name), {}
    ask, latents = calls["model"]
    with torch.no_grad():
        found["model"] = roofline(lambda: ask(of_rows(latents, rows_of(name))))
    for part, (call, shape) in calls.items():
        if part != "model":
            into = of_rows(shape, 1).requires_grad_()
            found[part] = roofline(lambda call=call, into=into: call(into).sum().backward())
    return found


def guided(plain: float, there_and_back: Callable[[str], float]) -> dict[str, float]:
    """Steps by the plain one."""
    decoders = {"latent_rgb": 0.0, **{name: there_and_back(name) for name in TINY}, "vae": there_and_back("decoder")}
    added = {name: (there_and_back("reward") + price) / plain for name, price in decoders.items()}
    return {name: 1 + more for name, more in added.items()} | {f"{SPARSE}, every 2 steps": 1 + added[SPARSE] / 2}


def memory(name: str) -> dict[str, float]:
    """GB that a look at the reward holds at most, by its decoder; the VAE as the node runs it."""
    family, calls = sizes.FAMILIES[name], parts(name)
    judge, latents = calls["reward"][0], of_rows(calls["model"][1], 1)
    vae = checkpointed(decoder(family).to(META))
    ways: dict[str, Call] = {"latent_rgb": lambda x: x[:, :3], "taesd": tiny_decoder(family).pixels, "vae": vae.decode}

    def look(decode: Call) -> None:
        pixels = decode(latents.clone().requires_grad_())
        judge(interpolate(pixels, (224, 224), mode="bicubic", antialias=True)).sum().backward()

    with fused_attention():
        return {way: held(partial(look, decode)) / 1e9 for way, decode in ways.items()}


def carried() -> dict[str, dict[str, float]]:
    """GB of the weights of rewards, in bfloat16."""
    numbers = {name: sum(map(prod, PUBLISHED[layout].shapes.values())) for name, layout in LAYOUTS.items()}
    return {name: {"weights": BYTES * count / 1e9} for name, count in numbers.items()}


def floor(name: str, prices: Prices) -> dict[str, float]:
    plain = rows_of(name) * prices["model"]
    by_reward = guided(plain, lambda part: prices[part] + prices[f"{part} backward"])
    calls = NOISE_STEPS if sizes.FAMILIES[name].one_step else 1
    return by_reward | {"guidance network": 1 + calls * prices["guided step"] / plain}


def growth(name: str) -> Prices:
    """Exponents of FLOPs by the pixels of a side; the decoder taesd chooses its size itself."""
    family, calls = sizes.FAMILIES[name], parts(name)
    asked = {"model": calls["model"][0], "taesd": tiny_decoder(family).pixels, "vae": calls["decoder"][0]}
    counted = {
        part: [[forward(call, of_rows(family.shape(side, 1)[1:], 1))] for side in GROWING]
        for part, call in asked.items()
    }
    return {part: exponent(GROWING, curve).middle for part, curve in counted.items()}


def table(report: Report, title: str, columns: dict[str, dict[str, float]], digits: int) -> None:
    """Names across and down; numbers with so many digits that count."""
    for name in dict.fromkeys(name for values in columns.values() for name in values):
        report.add(
            title,
            {"": name}
            | {head: f"{values[name]:.{digits}g}" if name in values else None for head, values in columns.items()},
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=list(SIDES))
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[2] / "output" / "cost")
    arguments = parser.parse_args()
    report = Report(arguments.out, "passes")
    found, times = (
        {name: published(name) for name in arguments.families},
        {name: least(name) for name in arguments.families},
    )
    own = {"ShapesWorld": shapesworld(World(models(), cfg=1.0, steps=20, kind="diffusion"))}
    table(report, "FLOPs of a pass", own | found, 3)
    table(report, "Guided by plain step, FLOPs", {name: floor(name, prices) for name, prices in found.items()}, 4)
    for what, seconds in {"as PyTorch runs it": lambda of: of.seconds, "all fused": lambda of: of.fused}.items():
        spent = {name: {part: seconds(of) * 1000 for part, of in parts.items()} for name, parts in times.items()}
        table(report, f"Least ms of a plain step, and of a pass there and back, {what}", spent, 3)
        table(
            report,
            f"Guided by plain step, least time, {what}",
            {name: guided(part["model"], part.__getitem__) for name, part in spent.items()},
            4,
        )
    table(report, "GB of a look at the reward, weights aside", {name: memory(name) for name in arguments.families}, 2)
    table(report, "GB of rewards", carried(), 3)
    table(
        report,
        f"Exponents of FLOPs by pixels a side, {GROWING[0]} to {GROWING[-1]}",
        {name: growth(name) for name in arguments.families},
        3,
    )
    table(report, "Targets", {name: {"taesd": target} for name, target in TARGETS.items()}, 4)


if __name__ == "__main__":
    main()
