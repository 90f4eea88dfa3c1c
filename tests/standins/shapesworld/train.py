"""Trains ShapesWorld from nothing and writes the compact weights. About 80 minutes on two cores with AMX. What is made from the flow
model took longer, on one shared core without AMX: diffusion 31 minutes, pairs 10, one_step 15.

usage: python -m tests.standins.shapesworld.train [--stages autoencoder,flow,rewards,diffusion,pairs,one_step,store,statistics] [--work DIR]

The committed weights were not made in one go: the autoencoder's first 1800 of 3300 steps used a plain error; of the flow model's 12300
steps the first 2000 used AdamW alone and saw shapes further from the middle, the first 8500 saw smaller small ones; of the diffusion
model's 3400 steps the first 3000 saw no states on the path from noise alone; of the rewards' 2900 and 2400 steps the first 1500 and 1600
saw plain means of 16 pictures at most.
GLIBC_TUNABLES=glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=8589934592 halves the
time of the convolutions. Run nothing else meanwhile: OpenMP threads that share cores wait for each other for minutes.
"""

import argparse
import functools
import json
import math
import time
from pathlib import Path
from typing import NamedTuple

from ...harness.inprocess import load_comfyui

load_comfyui()

import torch
import torch.nn.functional as F
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor, nn

from . import clip, compact, measure, text, world
from .autoencoder import Decoder, Encoder
from .pipeline import Pipeline

# ComfyUI's SD3 preview: model-space latents -> RGB in [-1,1]
LATENT_RGB = torch.tensor(
    [
        (-0.0922, -0.0175, 0.0749), (0.0311, 0.0633, 0.0954), (0.1994, 0.0927, 0.0458), (0.0856, 0.0339, 0.0902),
        (0.0587, 0.0272, -0.0496), (-0.0006, 0.1104, 0.0309), (0.0978, 0.0306, 0.0427), (-0.0042, 0.1038, 0.1358),
        (-0.0194, 0.0020, 0.0669), (-0.0488, 0.0130, -0.0268), (0.0922, 0.0988, 0.0951), (-0.0278, 0.0524, -0.0542),
        (0.0332, 0.0456, 0.0895), (-0.0069, -0.0030, -0.0810), (-0.0596, -0.0465, -0.0293), (-0.1448, -0.1463, -0.1189),
    ]
)  # fmt: skip
LATENT_RGB_BIAS = torch.tensor((0.2394, 0.2135, 0.1925))


DEPTH = 3  # the flow model's width is 64 times this


NETWORKS = ("autoencoder", "flow", "guide", "heldout")
CHILDREN = {"diffusion": "flow", "one_step": "flow"}
"""Networks that are kept as a difference to another."""


def seeded(seed: int) -> torch.Generator:
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)


def fast() -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16)


def draw(scenes: Tensor, rng: torch.Generator) -> Tensor:
    """Pictures as bytes (B,3,64,64): a pool of floats would not fit."""
    return torch.cat([(world.render(part, rng) * 255).round().byte() for part in scenes.split(256)])


def pixels(pool: Tensor) -> Tensor:
    return pool.float() / 255


def optimisers(module: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside transformer blocks, AdamW for the rest."""
    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    inner = [p for name, p in trained if p.ndim == 2 and "blocks" in name and "adaLN" not in name]
    rest = [p for name, p in trained if not any(p is other for other in inner)]
    chosen = [torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.01, fused=True)]
    return chosen + [torch.optim.Muon(inner, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")] if inner else chosen


class Run:
    """An optimiser with warm-up and cosine decay, an exponential average of the weights, and a line of progress now and then."""

    def __init__(self, name: str, module: nn.Module, steps: int, rate: float, decay: float = 0.995):
        self.name, self.steps, self.rate, self.decay = name, steps, rate, decay
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.average = [p.detach().clone() for p in self.parameters]
        self.optimisers = optimisers(module)
        self.step, self.start = 0, time.time()

    def update(self, loss: Tensor, **shown: Tensor) -> None:
        progress = self.step / self.steps
        rate = self.rate * min(1, (self.step + 1) / 100) * (0.02 + 0.98 * (1 + math.cos(math.pi * progress)) / 2)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = rate
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.step += 1
        torch._foreach_lerp_(
            self.average, [p.detach() for p in self.parameters], 1 - min(self.decay, self.step / (self.step + 10))
        )
        if self.step % 100 == 0 or self.step == self.steps:
            values = " ".join(f"{k} {float(v):.4f}" for k, v in {"loss": loss.detach(), **shown}.items())
            print(f"{self.name} {self.step}/{self.steps} {time.time() - self.start:.0f}s {values}", flush=True)

    @torch.no_grad()
    def save(self, module: nn.Module, path: Path) -> None:
        """A snapshot with the averaged weights."""
        averages = dict(zip([n for n, p in module.named_parameters() if p.requires_grad], self.average, strict=True))
        torch.save(module.state_dict() | averages, path)

    def finish(self) -> None:
        """Put the averaged weights in place."""
        for parameter, average in zip(self.parameters, self.average, strict=True):
            parameter.data.copy_(average)


def slopes(x: Tensor) -> Tensor:
    """Differences to the right and downwards (B,6,H,W)."""
    return torch.cat([F.pad(x.diff(dim=3), (0, 1)), F.pad(x.diff(dim=2), (0, 0, 0, 1))], 1)


def reconstruction_loss(decoded: Tensor, picture: Tensor) -> Tensor:
    """Absolute error in units of the picture's contrast, heaviest along outlines: a faint star is a star too."""
    contrast = picture.std((2, 3), keepdim=True).mean(1, keepdim=True).clamp(min=0.03)
    outline = F.max_pool2d(slopes(picture).abs().amax(1, keepdim=True), 3, 1, 1)
    weight = 1 + 8 * outline / outline.amax((2, 3), keepdim=True)
    error = (decoded - picture) / contrast
    return (weight * error.abs()).mean() * 0.1 + slopes(error).abs().mean() * 0.2


def autoencoder_loss(
    encoder: nn.Module, decoder: nn.Module, picture: Tensor, rng: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Reconstruction under latent noise, unit statistics per channel, and a linear preview that shows the picture."""
    latent = encoder(picture).float()
    noise = torch.rand(len(latent), 1, 1, 1, generator=rng) * 0.12 * torch.randn(latent.shape, generator=rng)
    decoded = decoder(latent + noise).float()
    mean, variance = latent.mean((0, 2, 3)), latent.var((0, 2, 3))
    unit = mean.square().mean() + (variance.log()).square().mean()
    small = F.avg_pool2d(picture, 8) * 2 - 1
    preview = (
        (torch.einsum("bchw,cd->bdhw", latent, LATENT_RGB) + LATENT_RGB_BIAS[:, None, None] - small).square().mean()
    )
    return reconstruction_loss(decoded, picture) + 0.02 * unit + 0.1 * preview, F.mse_loss(decoded, picture), preview


def train_autoencoder(work: Path, steps: int = 3000, batch: int = 48) -> None:
    rng = seeded(1)
    scenes = world.all_scenes()
    pool = draw(scenes[torch.randint(len(scenes), (20000,), generator=rng)], rng)
    model = nn.ModuleDict({"encoder": Encoder(), "decoder": Decoder()}).to(memory_format=torch.channels_last)
    run = Run("autoencoder", model, steps, 1.5e-3)
    while run.step < steps:
        picture = pixels(pool[torch.randint(len(pool), (batch,), generator=rng)]).contiguous(
            memory_format=torch.channels_last
        )
        with fast():
            loss, error, preview = autoencoder_loss(model["encoder"], model["decoder"], picture, rng)
        run.update(loss, mse=error, preview=preview)
    run.finish()
    torch.save(model.state_dict(), work / "autoencoder.pt")


class Conditioning:
    """Text features of every caption and of the empty one (the last row), as the flow model sees them in ComfyUI."""

    def __init__(self):
        scenes = world.all_scenes()
        self.row = torch.zeros([len(values) for values in world.VALUES], dtype=torch.long)
        self.row[scenes.unbind(1)] = torch.arange(len(scenes))
        self.empty = len(scenes)
        encoded = [encode_text(part) for part in batched([world.caption(scene) for scene in scenes] + [""], 32)]
        self.context, self.pooled = (torch.cat(parts) for parts in zip(*encoded, strict=True))

    def rows(self, scenes: Tensor) -> Tensor:
        return self.row[scenes.unbind(1)]


def batched(items: list, n: int) -> list[list]:
    return [items[i : i + n] for i in range(0, len(items), n)]


@functools.cache
def text_encoder() -> nn.Module:
    """ComfyUI's CLIP, cut to what matters: two layers, and no places behind the caption (attention is causal)."""
    import comfy.ops
    import comfy.sd1_clip
    from comfy.clip_model import CLIPTextModel

    config = json.loads(Path(comfy.sd1_clip.__file__).with_name("sd1_clip_config.json").read_text())
    config |= {"num_hidden_layers": 2, "max_position_embeddings": text.CONTEXT}
    model = CLIPTextModel(config, torch.float32, "cpu", comfy.ops.disable_weight_init)
    weights = text.clip_l(2)
    places = "text_model.embeddings.position_embedding.weight"
    model.load_state_dict(weights | {places: weights[places][: text.CONTEXT]})
    return model


@torch.no_grad()
def encode_text(captions: list[str]) -> tuple[Tensor, Tensor]:
    """Context (B,10,768), of which the last token stands for all padding, and pooled (B,768)."""
    tokens = [[text.START, *SimpleTokenizer().encode(caption), text.END] for caption in captions]
    padded = torch.tensor([row + [text.END] * (text.CONTEXT - len(row)) for row in tokens])
    options = {
        "intermediate_output": 1,
        "final_layer_norm_intermediate": False,
        "num_tokens": [len(row) for row in tokens],
    }
    _, context, _, pooled = text_encoder()(padded, **options)
    return context, pooled


def flow_model() -> nn.Module:
    """ComfyUI's own SD3 transformer; text channels that are always zero in its format are left out."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper

    embedder = {"target": "torch.nn.Linear", "params": {"in_features": text.WIDTH, "out_features": 64 * DEPTH}}
    model = OpenAISignatureMMDITWrapper(
        input_size=None, patch_size=2, in_channels=16, out_channels=16, depth=DEPTH, adm_in_channels=text.WIDTH,
        context_embedder_config=embedder, qk_norm="rms", operations=comfy.ops.disable_weight_init, dtype=torch.float32,
    )  # fmt: skip
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            nn.init.constant_(parameter, float(name.endswith(("ln_q.weight", "ln_k.weight"))))
        elif "adaLN" in name or name == "final_layer.linear.weight":
            nn.init.zeros_(parameter)
        else:
            nn.init.xavier_uniform_(parameter.flatten(1))
    return model


def predict(model: nn.Module, x: Tensor, time: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
    options = {"optimized_attention_override": text.weighted_attention}
    return model(x, time, context=context, y=pooled, transformer_options=options)


def velocity(model: nn.Module, x: Tensor, sigma: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
    return predict(model, x, sigma * 1000, context, pooled)


def noise_levels(n: int, rng: torch.Generator) -> Tensor:
    """Half uniform, half as the sampler visits them."""
    u = torch.rand(n, generator=rng)
    return torch.where(torch.rand(n, generator=rng) < 0.5, u, shifted(u))


def shifted(u: Tensor) -> Tensor:
    """SD3's schedule, shift 3."""
    return 3 * u / (1 + 2 * u)


def load_autoencoder(work: Path) -> tuple[Encoder, Decoder]:
    encoder, decoder = Encoder(), Decoder()
    nn.ModuleDict({"encoder": encoder, "decoder": decoder}).load_state_dict(torch.load(work / "autoencoder.pt"))
    return encoder.requires_grad_(False), decoder.requires_grad_(False)


def encoded_world(work: Path, n: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Captions' scenes (n,4) and the latents (n,16,8,8) of their pictures, which follow the world's habits."""
    encoder, _ = load_autoencoder(work)
    asked = world.wishes(n, rng)
    latents = []
    for part in asked.split(256):
        latents.append(encode(encoder, world.render(world.depicted(part, rng), rng)))
    return asked, torch.cat(latents)


def train_flow(work: Path, steps: int = 12000, batch: int = 128, pool: int = 32000) -> None:
    rng = seeded(2)
    conditioning, model = Conditioning(), flow_model()
    asked, latents = encoded_world(work, pool, rng)
    rows = conditioning.rows(asked)
    compiled = torch.compile(functools.partial(velocity, model))
    run = Run("flow", model, steps, 2e-3, decay=0.998)
    while run.step < steps:
        chosen = torch.randint(pool, (batch,), generator=rng)
        row = torch.where(torch.rand(batch, generator=rng) < 0.1, conditioning.empty, rows[chosen])
        x0, sigma, noise = latents[chosen], noise_levels(batch, rng), torch.randn(batch, 16, 8, 8, generator=rng)
        x = torch.lerp(x0, noise, sigma[:, None, None, None])
        with fast():
            v = compiled(x, sigma, conditioning.context[row], conditioning.pooled[row])
        run.update(F.mse_loss(v.float(), noise - x0))
        if run.step % 500 == 0:
            run.save(model, work / "flow.pt")
    run.finish()
    torch.save(model.state_dict(), work / "flow.pt")


class Pool(NamedTuple):
    """Pictures as bytes (P,3,64,64), the scenes blended in each (P,64,4) and their shares (P,64)."""

    pictures: Tensor
    scenes: Tensor
    shares: Tensor

    def take(self, chosen: Tensor) -> "Pool":
        return Pool(*(part[chosen] for part in self))


BLENDED = 64


def reward_pool(work: Path, n: int, rng: torch.Generator) -> Pool:
    """What a reward meets along a sampler's way: finished pictures, mixtures of two, and the means of all that may still become."""
    networks = load_autoencoder(work)
    parts = drawn_and_mixed(*networks, n, rng) + [estimates(*networks, n // 32, 2 * n, rng)]
    return Pool(*(torch.cat(part) for part in zip(*parts, strict=True)))


def decode(decoder: nn.Module, latents: Tensor, rng: torch.Generator, roughness: float) -> Tensor:
    """Bytes of latents (B,16,8,8) with up to that much noise."""
    noise = torch.rand(len(latents), 1, 1, 1, generator=rng) * roughness * torch.randn(latents.shape, generator=rng)
    with fast(), torch.no_grad():
        return (decoder(latents + noise).float().clamp(0, 1) * 255).round().byte()


def encode(encoder: nn.Module, pictures: Tensor) -> Tensor:
    with fast(), torch.no_grad():
        return encoder(pictures).float()


def drawn_and_mixed(encoder: Encoder, decoder: Decoder, n: int, rng: torch.Generator) -> list[Pool]:
    """n pictures, and n mixtures of each with another.

    Half of the mixed scenes lie alike and differ in two attributes at most, as what a model hesitates between does.
    """
    first, second = scene_pairs(n, rng)
    state = rng.get_state()
    drawn = draw(first, rng)
    share = torch.rand(n, generator=rng).mul(1.5).clamp(max=1)
    twin = torch.Generator()
    twin.set_state(state)
    mixed = []
    for i, (picture, other, part) in enumerate(zip(drawn.split(256), second.split(256), share.split(256), strict=True)):
        beside = world.render(other, twin if i % 2 else rng)
        if not i % 2:
            world.render(other, twin)
        latents = torch.lerp(encode(encoder, beside), encode(encoder, pixels(picture)), part[:, None, None, None])
        mixed.append(decode(decoder, latents, rng, 0.4))
    scenes = torch.zeros(n, BLENDED, 4, dtype=torch.long)
    scenes[:, 0], scenes[:, 1] = first, second
    shares = F.pad(torch.stack([share, 1 - share], 1), (0, BLENDED - 2))
    return [
        Pool(drawn, scenes, F.one_hot(torch.zeros(n, dtype=torch.long), BLENDED).float()),
        Pool(torch.cat(mixed), scenes, shares),
    ]


def estimates(encoder: Encoder, decoder: Decoder, captions: int, n: int, rng: torch.Generator) -> Pool:
    """n estimates D(x, σ), σ from .8 to 1, of ideal denoisers that know 64 pictures under each caption.

    Each denoiser favours values of the attributes at random, as guidance will.
    """
    scenes = world.depicted(world.wishes(captions, rng).repeat_interleave(BLENDED, 0), rng)
    latents = torch.cat([encode(encoder, world.render(part, rng)) for part in scenes.split(256)])
    scenes, latents = scenes.unflatten(0, (captions, BLENDED)), latents.unflatten(0, (captions, BLENDED))
    chosen = torch.randint(captions, (n,), generator=rng)
    shares, decoded = [], []
    for rows in chosen.split(128):
        known, sigma = latents[rows], 0.8 + 0.2 * torch.rand(len(rows), 1, 1, 1, 1, generator=rng)
        behind = (1 - sigma) * known
        x = behind[:, :1] + sigma * torch.randn(behind[:, :1].shape, generator=rng)
        likelihood = -((x - behind) / sigma).square().flatten(2).sum(2) / 2
        shares.append((likelihood + favour(scenes[rows], rng)).softmax(1))
        decoded.append(decode(decoder, torch.einsum("bk,bkchw->bchw", shares[-1], known), rng, 0.2))
    return Pool(torch.cat(decoded), scenes[chosen], torch.cat(shares))


def favour(scenes: Tensor, rng: torch.Generator) -> Tensor:
    """Scenes (B,K,4) -> log-weights (B,K): each row likes values of the attributes at random, and more or less."""
    total = torch.zeros(scenes.shape[:2])
    for i, values in enumerate(world.VALUES):
        total += torch.randn(len(scenes), len(values), generator=rng).gather(1, scenes[..., i])
    return 3 * torch.rand(len(scenes), 1, generator=rng) * total


def scene_pairs(n: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two scenes each (n,4): unrelated ones, and ones that differ in two attributes at most."""
    scenes = world.all_scenes()
    first, second = scenes[torch.randint(len(scenes), (n, 2), generator=rng)].unbind(1)
    kept = torch.rand(n, 4, generator=rng).argsort(1) < 2
    related = torch.where(kept, first, second)
    valid = (related[:, 1] != related[:, 3]) & (torch.rand(n, generator=rng) < 0.6)
    return first, torch.where(valid[:, None], related, second)


def roughened(pictures: Tensor, rng: torch.Generator) -> Tensor:
    """A third of the pictures blurred, a third with noise: what early estimates look like."""
    blurred = pictures.clone()
    third = len(pictures) // 3
    factor = (2, 4, 8)[int(torch.randint(3, (1,), generator=rng))]
    small = F.avg_pool2d(pictures[:third], factor)
    blurred[:third] = F.interpolate(small, size=world.SIDE, mode="bilinear")
    noise = (
        torch.randn(third, 3, world.SIDE, world.SIDE, generator=rng) * torch.rand(third, 1, 1, 1, generator=rng) * 0.15
    )
    blurred[third : 2 * third] += noise
    return blurred


def agreement(scenes: Tensor, shares: Tensor, captions: Tensor) -> Tensor:
    """How well blends of scenes (B,K,4) with shares (B,K) fit captions (N,4), in [0,1] (B,N): what the cosine shall be.

    The mean over the blended, as the best forecast is, and over the attributes. Sizes and shapes fit or do not; of colours, near ones
    fit better than far ones, as to a person, so that there is a slope to follow from any of them.
    """
    fit = torch.zeros(len(scenes), len(captions))
    for i, palette in enumerate((None, world.OBJECT_HSV, None, world.GROUND_HSV)):
        table = torch.eye(len(world.VALUES[i])) if palette is None else nearness(world.hsv_to_rgb(palette))
        fit += torch.einsum("bk,bkv->bv", shares, table[scenes[..., i]])[:, captions[:, i]] / len(world.VALUES)
    return fit


def nearness(tones: Tensor) -> Tensor:
    """1 for a colour and itself, 0 for the two that are furthest apart (V,V)."""
    distance = torch.cdist(tones, tones)
    return 1 - (distance / distance.max()).sqrt()


def train_reward(kind: str, seed: int, work: Path, steps: int, batch: int = 128, pool: int = 8000) -> None:
    rng = seeded(seed)
    model, captions = clip.build(kind), world.all_scenes()
    tokens = clip.tokenize([world.caption(scene) for scene in captions])
    shown = reward_pool(work, pool, rng)
    model.logit_scale.data.fill_(math.log(20.0))
    model.logit_scale.requires_grad_(False)
    run = Run(kind, model, steps, 1.5e-3)
    while run.step < steps:
        pictures, scenes, shares = shown.take(torch.randint(len(shown.pictures), (batch,), generator=rng))
        target = agreement(scenes, shares, captions)
        with fast():
            seen = model.encode_image(clip.normalize(roughened(pixels(pictures), rng)), normalize=True)
            said = model.encode_text(tokens, normalize=True)
        cosine = seen.float() @ said.float().T
        right = (cosine.argmax(1) == target.argmax(1)).float().mean()
        run.update(100 * F.mse_loss(cosine, target), right=right)
        if run.step % 500 == 0:
            run.save(model, work / f"{kind}.pt")
    run.finish()
    torch.save(model.state_dict(), work / f"{kind}.pt")


def train_rewards(work: Path) -> None:
    train_reward("guide", 3, work, steps=2000)
    train_reward("heldout", 4, work, steps=1600)


def load_transformer(work: Path, name: str) -> nn.Module:
    model = flow_model()
    model.load_state_dict(torch.load(work / f"{name}.pt"))
    return model


def discrete() -> nn.Module:
    """The noise levels and times, 0 to 999, that ComfyUI's node ModelSamplingDiscrete gives a model: 0.03 to 14.6."""
    from comfy.model_sampling import ModelSamplingDiscrete

    return ModelSamplingDiscrete()


def clean_of(v: Tensor, x: Tensor, sigma: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """D of x = scale·x0 + σ·ε, said by the flow's velocity at x/(scale + σ) and the time σ/(scale + σ)."""
    return (x - sigma * v) / (scale + sigma)


def train_diffusion(work: Path, steps: int = 3000, batch: int = 64, pool: int = 8000) -> None:
    """The flow model taught to say the noise instead of the velocity, at the noise levels and scales of diffusion.

    Samplers begin with noise alone, where x0 + σ·ε still has a trace of the picture (arXiv 2305.08891). So half of the states lie on the
    straight path from there, (1 - σ/σ_max)·x0 + σ·ε.
    """
    rng = seeded(5)
    conditioning, levels = Conditioning(), discrete().sigmas
    asked, latents = encoded_world(work, pool, rng)
    rows = conditioning.rows(asked)
    teacher, model = load_transformer(work, "flow").requires_grad_(False), load_transformer(work, "flow")
    say_velocity, say_noise = (
        torch.compile(functools.partial(f, net)) for f, net in ((velocity, teacher), (predict, model))
    )
    run = Run("diffusion", model, steps, 1e-3, decay=0.998)
    while run.step < steps:
        chosen = torch.randint(pool, (batch,), generator=rng)
        row = torch.where(torch.rand(batch, generator=rng) < 0.1, conditioning.empty, rows[chosen])
        index = torch.randint(len(levels), (batch,), generator=rng)
        sigma, condition = levels[index], (conditioning.context[row], conditioning.pooled[row])
        scale = torch.where(torch.rand(batch, generator=rng) < 0.5, 1.0, 1 - sigma / levels[-1])
        wide, size = sigma[:, None, None, None], scale[:, None, None, None]
        x = size * latents[chosen] + wide * torch.randn(batch, 16, 8, 8, generator=rng)
        with fast():
            with torch.no_grad():
                v = say_velocity(x / (size + wide), sigma / (scale + sigma), *condition).float()
            noise = say_noise(x / (1 + wide.square()).sqrt(), index.float(), *condition).float()
        error = (noise - (x - clean_of(v, x, wide, size)) / wide).square().mean((1, 2, 3))
        run.update((error * (1 + sigma.square()).clamp(max=25)).mean(), plain=error.mean())
        if run.step % 500 == 0:
            run.save(model, work / "diffusion.pt")
    run.finish()
    torch.save(model.state_dict(), work / "diffusion.pt")


@torch.no_grad()
def make_pairs(work: Path, n: int = 28000, steps: int = 14, batch: int = 200) -> None:
    """What the flow model makes of n noises: rows of the conditioning (n,), noises and latents (n,16,8,8)."""
    from comfy.k_diffusion.sampling import sample_dpmpp_2m

    rng, conditioning, start = seeded(6), Conditioning(), time.time()
    say_velocity = torch.compile(functools.partial(velocity, load_transformer(work, "flow")))

    def denoise(x: Tensor, sigma: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        wide = sigma[:, None, None, None]
        with fast():
            return clean_of(say_velocity(x / (1 + wide), sigma / (1 + sigma), context, pooled).float(), x, wide)

    times = shifted(torch.linspace(0.97, 0, steps + 1))
    sigmas = times / (1 - times)
    rows, noises, latents = conditioning.rows(world.wishes(n, rng)), torch.randn(n, 16, 8, 8, generator=rng), []
    for row, noise in zip(rows.split(batch), noises.split(batch), strict=True):
        told = {"context": conditioning.context[row], "pooled": conditioning.pooled[row]}
        latents.append(sample_dpmpp_2m(denoise, noise * sigmas[0], sigmas, told, disable=True))
        if len(latents) % 20 == 0:
            print(f"pairs {len(latents) * batch}/{n} {time.time() - start:.0f}s", flush=True)
            done = len(latents) * batch
            torch.save(
                {"rows": rows[:done], "noises": noises[:done].half(), "latents": torch.cat(latents).half()},
                work / "pairs.pt",
            )


def generate(model: nn.Module, noise: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
    """The picture's latent in one call, at the last of the 1000 noise levels."""
    return predict(model, noise, torch.full((len(noise),), 999.0), context, pooled)


def train_one_step(work: Path, steps: int = 1500, batch: int = 128) -> None:
    """The flow model's noises and pictures learned by heart."""
    rng, conditioning, pairs = seeded(7), Conditioning(), torch.load(work / "pairs.pt")
    model = load_transformer(work, "flow")
    compiled = torch.compile(functools.partial(generate, model))
    run = Run("one_step", model, steps, 2e-3, decay=0.998)
    while run.step < steps:
        chosen = torch.randint(len(pairs["rows"]), (batch,), generator=rng)
        row = pairs["rows"][chosen]
        with fast():
            made = compiled(pairs["noises"][chosen].float(), conditioning.context[row], conditioning.pooled[row])
        run.update(F.mse_loss(made.float(), pairs["latents"][chosen].float()))
        if run.step % 500 == 0:
            run.save(model, work / "one_step.pt")
    run.finish()
    torch.save(model.state_dict(), work / "one_step.pt")


def store(work: Path) -> None:
    for name in (*NETWORKS, *CHILDREN):
        compact.save(name, torch.load(work / f"{name}.pt"), CHILDREN.get(name))


def note_statistics(work: Path, batch: int = 8) -> None:
    """Store mean and deviation of both rewards over unguided pictures of the benchmark prompts."""
    numbers = measure.report(measure.sample_all(Pipeline(work / "models"), 1.0, batch))
    print(numbers)
    for kind in ("guide", "heldout"):
        compact.note(
            kind, {"reference_mean": str(numbers[f"{kind} mean"]), "reference_std": str(numbers[f"{kind} deviation"])}
        )


def unpack(work: Path) -> None:
    """The committed weights as a starting point, to train a part of them again."""
    for name in (*NETWORKS, *CHILDREN):
        torch.save({key: value.float() for key, value in compact.load(name).items()}, work / f"{name}.pt")


STAGES = {
    "unpack": unpack,
    "autoencoder": train_autoencoder,
    "flow": train_flow,
    "rewards": train_rewards,
    "diffusion": train_diffusion,
    "pairs": make_pairs,
    "one_step": train_one_step,
    "store": store,
    "statistics": note_statistics,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--stages", default=",".join(stage for stage in STAGES if stage != "unpack"))
    parser.add_argument("--work", type=Path, default=Path("build/shapesworld"))
    chosen = parser.parse_args()
    chosen.work.mkdir(parents=True, exist_ok=True)
    for stage in chosen.stages.split(","):
        STAGES[stage](chosen.work)


if __name__ == "__main__":
    main()
