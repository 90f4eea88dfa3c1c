"""The guidance network: a U-Net over latents. It learns the step from D to D_q, and never differentiates a reward or a model."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import GuidanceError, short


@dataclass(frozen=True)
class Text:
    """What a diffusion model is told: tokens (B,T,E), all zero where there is none, and a pooled vector (B,P); T, E and P may be 0."""

    tokens: Tensor
    pooled: Tensor

    @staticmethod
    def none(batch: int) -> "Text":
        return Text(torch.zeros(batch, 0, 0), torch.zeros(batch, 0))

    def to(self, device: torch.device) -> "Text":
        """On a device, in single precision."""
        return Text(self.tokens.to(device, torch.float32), self.pooled.to(device, torch.float32))

    def __getitem__(self, rows) -> "Text":
        return Text(self.tokens[rows], self.pooled[rows])


@dataclass(frozen=True)
class Architecture:
    """The sizes of a network; all that is needed to build it again."""

    channels: int
    """Of a latent."""
    inputs: int = 2
    """Latents it looks at: the noisy one, and with 2 the denoised estimate too."""
    tokens: int = 0
    """Channels of a text token."""
    pooled: int = 0
    """Channels of the pooled text."""
    width: int = 48
    levels: int = 3
    """Resolutions, each half of the one before and twice as wide."""
    blocks: int = 2
    """Residual blocks at each."""
    kernel: int = 3
    scalar: bool = False
    """One number per sample, read off the lowest resolution; what would be a latent is a guess of the model's answer, to learn to see from."""

    def __post_init__(self):
        for name, (least, most) in SIZES.items():
            if not least <= getattr(self, name) <= most:
                raise GuidanceError(
                    f"A guidance network has {name} of {least} to {most}, not {short(getattr(self, name))}."
                )
        if self.width % GROUPS:
            raise GuidanceError(f"A guidance network has a width that is a multiple of {GROUPS}, not {self.width}.")
        if self.kernel % 2 == 0:
            raise GuidanceError(f"A guidance network has an odd kernel, not {self.kernel}.")

    def fitted(self, shape: Sequence[int]) -> "Architecture":
        """Without levels and kernels that latents (C,H,W) of this shape are too small for."""
        side = min(shape[-2:])
        return replace(
            self, levels=min(self.levels, 1 + int(math.log2(max(side // 2, 1)))), kernel=self.kernel if side > 1 else 1
        )


GROUPS = 8
"""Of normalised channels."""
SIZES = {
    "channels": (1, 1024), "inputs": (1, 2), "tokens": (0, 2**16), "pooled": (0, 2**16), "width": (1, 1024), "levels": (1, 8), "blocks": (1, 16),
    "kernel": (1, 7),
}  # fmt: skip
"""Least and most of each size of an architecture. The most is several times what any model or training has (latents of 128 channels, texts of
12,288, a width of 64 at 3 levels of 2 blocks); a network of these sizes is described within a second, and a damaged file can ask for no more."""
HEAD = 32
"""Channels of an attention head."""


class GuidanceNetwork(nn.Module):
    """A U-Net over latents, modulated by noise level and pooled text, with attention over places and words at the lowest resolution.

    It begins as exactly "no guidance": the last layer is zero. Any height, width and number of frames; frames meet in the attention.
    """

    def __init__(self, architecture: Architecture):
        super().__init__()
        self.architecture = a = architecture
        widths = [a.width * 2**i for i in range(a.levels)]
        self.embed = Embedding(a.width, a.pooled, 4 * a.width)
        self.stem = conv(a.inputs * a.channels, a.width, a.kernel)
        self.down = nn.ModuleList(Stage(a, 4 * a.width, widths[max(i - 1, 0)], w) for i, w in enumerate(widths))
        self.middle = Attention(widths[-1], a.tokens)
        self.up = nn.ModuleList(
            Stage(a, 4 * a.width, widths[i] + widths[min(i + 1, a.levels - 1)], w) for i, w in enumerate(widths)
        )
        self.norm = nn.GroupNorm(GROUPS, a.width)
        self.head = conv(a.width, a.channels, a.kernel)
        self.value = Value(widths[-1], 4 * a.width) if a.scalar else None
        for parameter in self.last.parameters():
            nn.init.zeros_(parameter)

    @staticmethod
    def described(architecture: Architecture) -> "GuidanceNetwork":
        """One whose weights have shapes and no values: it takes no memory, until `load_state_dict(..., assign=True)` gives it weights."""
        with torch.device("meta"):
            network = GuidanceNetwork(architecture)
        network.embed.frequencies = frequencies(architecture.width)
        return network

    @property
    def last(self) -> nn.Module:
        """The layer that makes what guides."""
        return self.head if self.value is None else self.value.last

    def forward(self, inputs: Sequence[Tensor], angle: Tensor, text: Text, answers: bool = False):
        """Latents (B,C,H,W) or (B,C,T,H,W), unit scale; atan(noise/signal) (B,) -> the shape of a latent, or (B,) of a scalar network.

        answers: of a scalar network, both.
        """
        shape, frames = inputs[0].shape, 1 if inputs[0].ndim == 4 else inputs[0].shape[2]
        x = torch.cat([part.movedim(1, -3).flatten(0, -4) for part in inputs], 1)
        embedding = self.embed(angle, text.pooled).repeat_interleave(frames, 0)
        x = self.stem(x)
        skips = []
        for i, stage in enumerate(self.down):
            x = stage(x if i == 0 else F.avg_pool2d(x, 2, ceil_mode=True), embedding)
            skips.append(x)
        x = self.middle(x, frames, text.tokens)
        value = None if self.value is None else self.value(x, embedding, frames)
        if value is not None and not answers:
            return value
        for stage, skip in zip(reversed(self.up), reversed(skips), strict=True):
            x = stage(torch.cat([skip, resized(x, skip)], 1), embedding)
        latent = self.head(F.silu(self.norm(x))).unflatten(0, (-1, frames)).movedim(2, 1).reshape(shape)
        return latent if value is None else (value, latent)


def conv(inputs: int, outputs: int, kernel: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)


def resized(x: Tensor, like: Tensor) -> Tensor:
    return x if x.shape[-2:] == like.shape[-2:] else F.interpolate(x, like.shape[-2:], mode="nearest")


def frequencies(width: int) -> Tensor:
    """At which a noise level is shown, (width/2,); no part of a file."""
    return torch.logspace(0, 1.5, width // 2)


class Embedding(nn.Module):
    """Noise level and pooled text -> (B,outputs)."""

    def __init__(self, width: int, pooled: int, outputs: int):
        super().__init__()
        self.frequencies: Tensor
        self.register_buffer("frequencies", frequencies(width), persistent=False)
        self.angle = nn.Linear(2 * (width // 2), outputs)
        self.standardized = Standardized(pooled)
        self.pooled = nn.Linear(pooled, outputs) if pooled else None
        self.mix = nn.Sequential(nn.SiLU(), nn.Linear(outputs, outputs), nn.SiLU())

    def forward(self, angle: Tensor, pooled: Tensor) -> Tensor:
        phases = angle[:, None] * self.frequencies
        embedding = self.angle(torch.cat([phases.sin(), phases.cos()], 1))
        return self.mix(embedding if self.pooled is None else embedding + self.pooled(self.standardized(pooled)))


class Standardized(nn.Module):
    """Vectors (B,P) less their mean, in units of their spread: most of a text's vector is common to all texts and says nothing."""

    def __init__(self, size: int):
        super().__init__()
        self.mean: Tensor
        self.spread: Tensor
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("spread", torch.ones(()))

    def fit(self, vectors: Tensor) -> None:
        """Take mean and spread from vectors (N,P); where they are all alike, their size is the spread."""
        if not vectors.shape[1]:
            return
        self.mean.copy_(vectors.mean(0))
        spread, size = (part.square().mean().sqrt() for part in (vectors - self.mean, vectors))
        self.spread.copy_(spread if spread > 1e-3 * size else size if size > 0 else torch.ones(()))

    def forward(self, vectors: Tensor) -> Tensor:
        return (vectors - self.mean) / self.spread


class Value(nn.Module):
    """Maps (B·frames,C,H,W) and their embedding -> a number for each sample (B,)."""

    def __init__(self, width: int, embedding: int):
        super().__init__()
        self.first = nn.Sequential(nn.LayerNorm(width + embedding), nn.Linear(width + embedding, 128), nn.SiLU())
        self.last = nn.Linear(128, 1)

    def forward(self, x: Tensor, embedding: Tensor, frames: int) -> Tensor:
        values = self.last(self.first(torch.cat([x.mean((-1, -2)), embedding], 1)))
        return values.view(-1, frames).mean(1)


class Stage(nn.Module):
    def __init__(self, a: Architecture, embedding: int, inputs: int, width: int):
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(inputs if i == 0 else width, width, embedding, a.kernel) for i in range(a.blocks)
        )

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, embedding)
        return x


class Block(nn.Module):
    """Residual block whose second normalisation is scaled and shifted by the embedding."""

    def __init__(self, inputs: int, width: int, embedding: int, kernel: int):
        super().__init__()
        self.first = nn.Sequential(nn.GroupNorm(GROUPS, inputs), nn.SiLU(), conv(inputs, width, kernel))
        self.modulation = nn.Linear(embedding, 2 * width)
        self.norm = nn.GroupNorm(GROUPS, width)
        self.second = conv(width, width, kernel)
        self.skip = nn.Identity() if inputs == width else nn.Conv2d(inputs, width, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.modulation(embedding)[..., None, None].chunk(2, 1)
        h = self.norm(self.first(x)) * (1 + scale) + shift
        return self.skip(x) + self.second(F.silu(h))


class Attention(nn.Module):
    """A transformer layer over all places of all frames, which also reads the words."""

    def __init__(self, width: int, tokens: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.heads = width // HEAD or 1
        self.qkv = nn.Linear(width, 3 * width)
        self.words = nn.Sequential(nn.LayerNorm(tokens), nn.Linear(tokens, 2 * width)) if tokens else None
        self.out = nn.Linear(width, width)
        self.feed = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, frames: int, tokens: Tensor) -> Tensor:
        shape = x.shape
        h = x.unflatten(0, (-1, frames)).movedim(2, -1).flatten(1, 3)
        q, k, v = self.qkv(self.norm(h)).chunk(3, 2)
        mask = None
        if self.words is not None and tokens.shape[1]:
            k, v = (torch.cat(pair, 1) for pair in zip((k, v), self.words(tokens).chunk(2, 2), strict=True))
            mask = F.pad(tokens.any(2), (h.shape[1], 0), value=True)[:, None, None]
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        h = h + self.out(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))
        h = h + self.feed(h)
        return h.unflatten(1, (frames, *shape[-2:])).movedim(-1, 2).reshape(shape)
