"""FLOPs of one pass of a picture through each part, forward and backward, of ShapesWorld and of published sizes; and what they make of a step.

The floor of a guided step is that of the plain one, and a pass through the decoder and the reward and back: what no implementation can do
without. Models of published sizes live on the meta device, which computes shapes and nothing else. Prints markdown tables.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from harness.inprocess import load_comfyui

load_comfyui()

import comfy.sd
import comfy.supported_models
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy.ldm.modules.diffusionmodules.model import AttnBlock, pytorch_attention
from reward_guidance.guidance.fitting import WIDTHS
from reward_guidance.guidance.network import Architecture, GuidanceNetwork, Text
from reward_guidance.nodes.decoders import TAESD
from reward_guidance.tests.bench.cost import sizes
from reward_guidance.tests.bench.shapesworld import World
from reward_guidance.tests.harness.models import shapesworld as models
from reward_guidance.tests.standins.shapesworld import text
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

ROWS = 4
PICKSCORE = CLIPVisionConfig(
    hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, image_size=224, patch_size=14, projection_dim=1024
)
SIDES = {"SD1.5": 512, "SDXL": 1024, "SD3.5-medium": 1024, "Flux-dev": 1024}
FINETUNED = "SD1.5", "SDXL"
"""Models whose way back has a price too."""
TINY = "decoder, taesd"

Prices = dict[str, float]


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
        value, answer = made((x,), angle, words, answers=True)
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
        **price("model", lambda x: unet(x, torch.ones(ROWS), context=context, y=pooled, transformer_options=options), latents),
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


def told(family: sizes.Family) -> dict[str, Tensor]:
    """What a model asks for beside latents, noise levels and tokens."""
    pooled = family.unet.get("adm_in_channels") or family.pooled
    guidance = {"guidance": torch.empty(ROWS)} if family.config == "Flux" else {}
    return guidance | ({"y": torch.empty(ROWS, pooled)} if pooled else {})


def published(name: str, size: str = "small") -> Prices:
    """PickScore without its tower of texts, which sees each prompt once."""
    family, side = sizes.FAMILIES[name], SIDES[name]
    meta = torch.device("meta")
    unet = sizes.base_model(family, False, meta).diffusion_model.requires_grad_(False)
    vae, tiny = decoder(family).to(meta), tiny_decoder(family)
    with meta:
        judge = CLIPVisionModelWithProjection(PICKSCORE).requires_grad_(False)
        latents, pixels = torch.empty(family.shape(side, ROWS)), torch.empty(ROWS, 3, 224, 224)
        times, context, more = torch.empty(ROWS), torch.empty(ROWS, *family.tokens), told(family)
    options = {"optimized_attention_override": lambda _, *args, **kwargs: attention_pytorch(*args, **kwargs)}
    architecture = Architecture(family.channels, 1, tokens=family.tokens[1], pooled=family.pooled, width=WIDTHS[size], scalar=True)
    ask = lambda x: unet(x, times, context=context, transformer_options=options, **more)  # noqa: E731
    return {
        **(price("model", ask, latents) if name in FINETUNED else {"model": forward(ask, latents)}),
        **price("decoder", vae.decode, latents),
        **price(TINY, tiny.pixels, latents),
        **price("reward", lambda x: judge(x).image_embeds, pixels),
        **network(architecture, latents.shape[1:], family.tokens[0]),
    }


def floor(name: str, prices: Prices) -> dict[str, float]:
    """FLOPs of guided steps by those of the plain one, which asks the model twice where it has classifier-free guidance."""
    plain = prices["model"] * (1 if sizes.FAMILIES[name].cfg == 1 else 2)

    def step(*passes: str) -> float:
        return 1 + sum(prices[each] + prices[f"{each} backward"] for each in passes) / plain

    return {
        "latent_rgb": step("reward"),
        "taesd": step("reward", TINY),
        "vae": step("reward", "decoder"),
        "guidance network": 1 + prices["guided step"] / plain,
    }


def table(head: str, columns: dict[str, dict[str, float]], form: str) -> None:
    print(f"\n| {head} | {' | '.join(columns)} |\n|---{'|---' * len(columns)}|")
    for name in dict.fromkeys(name for values in columns.values() for name in values):
        print(f"| {name} | {' | '.join(format(values[name], form) if name in values else '' for values in columns.values())} |")


def main() -> None:
    found = {name: published(name) for name in SIDES}
    own = {"ShapesWorld": shapesworld(World(models(), cfg=1.0, steps=20, kind="diffusion"))}
    table("FLOPs", own | found, ".2e")
    table("guided / plain step", {name: floor(name, prices) for name, prices in found.items()}, ".3f")


if __name__ == "__main__":
    main()
