"""What is lost where the tiny autoencoder decodes a picture at half or a quarter of its size, instead of decoding it whole and making it smaller.

ShapesWorld's pictures, enlarged to the size of the first column, encoded, and decoded by its trained autoencoder. A reward of 64 pixels looks
at them, as PickScore looks at 224 of 1024 pixels. `folded` is what nodes/wiring/tiny_decoders.py does; `left out` only leaves out the upsamplings.
The error is the root mean square over the pixels that the reward sees, by their standard deviation; the cosine is that of the gradients of
the reward by the latent. Prints a markdown table.

usage: python tests/bench/coarse.py [--pictures 8]
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1]))
from harness.inprocess import load_comfyui

load_comfyui()

import comfy.latent_formats
import comfy.taesd.taesd
import torch
from reward_guidance.guidance.rewards import evaluate, load_reward
from reward_guidance.nodes.wiring import tiny_decoders
from reward_guidance.tests.bench.cost.world import fixed
from reward_guidance.tests.harness.models import shapesworld
from reward_guidance.tests.standins.shapesworld import world
from torch import Tensor
from torch.nn import functional as F

SEEN = world.SIDE
KERNELS: dict[str, Callable] = {"folded": tiny_decoders.halved, "left out": lambda kernel, times: kernel}
ENLARGED = (2, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=8)
    count, draw, models = parser.parse_args().pictures, torch.Generator().manual_seed(0), shapesworld()
    encoder, decoder = (str(models / "vae_approx" / f"taesd3_{part}.safetensors") for part in ("encoder", "decoder"))
    encode = comfy.taesd.taesd.TAESD(encoder, None, 16).taesd_encoder
    reward = load_reward(models / "reward_models" / "shapes_clip.safetensors").float()
    scenes = world.wishes(count, draw)
    pictures, prompts = world.render(scenes, draw), list(map(world.caption, scenes))

    def looked(at: Tensor, halvings: int, kernels: str) -> tuple[Tensor, Tensor, int]:
        """What the reward sees, its gradient, and the pixels that were decoded."""
        with patch.object(tiny_decoders, "halved", KERNELS[kernels]):
            made = fixed(tiny_decoders.TAESD(comfy.latent_formats.SD3(), decoder), halvings)
        latents = at.requires_grad_()
        pixels = made.pixels(latents)
        seen = (
            F.interpolate(pixels, (SEEN, SEEN), mode="bicubic", antialias=True) if pixels.shape[-1] != SEEN else pixels
        )
        (gradient,) = torch.autograd.grad(evaluate(reward, seen, prompts).sum(), latents)
        return seen.detach(), gradient.flatten(1), pixels.shape[-1]

    print("| pixels | decoded | seen | kernels | error | cosine | least of all |\n|---|---|---|---|---|---|---|")
    for scale in ENLARGED:
        with torch.no_grad():
            latents = encode(F.interpolate(pictures, scale_factor=scale, mode="bicubic"))
        whole, straight, side = looked(latents, 0, "folded")
        for halvings in range(1, scale // 2 + 1):
            for kernels in KERNELS:
                seen, gradient, decoded = looked(latents, halvings, kernels)
                error, cosine = (
                    (seen - whole).square().mean() ** 0.5 / whole.std(),
                    torch.cosine_similarity(gradient, straight),
                )
                print(
                    f"| {side} | {decoded} | {SEEN} | {kernels} | {error:.3f} | {cosine.mean():.3f} | {cosine.min():.3f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
