"""The guidance network: a U-Net over latents, which learns the difference between D and D_q."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import GuidanceError, short


@dataclass(frozen=True)
class Text:
    """The text conditioning of a diffusion model: tokens (B,T,E), zero where padded, and a pooled vector (B,P).

    T, E and P may be 0.
    """

    tokens: Tensor
    pooled: Tensor

    @staticmethod
    def none(batch: int) -> "Text":
        """No conditioning, for B batch rows."""
        return Text(torch.zeros(batch, 0, 0), torch.zeros(batch, 0))

    def to(self, device: torch.device) -> "Text":
        """A copy on a device, in single precision."""
        return Text(self.tokens.to(device, torch.float32), self.pooled.to(device, torch.float32))

    def __getitem__(self, rows) -> "Text":
        return Text(self.tokens[rows], self.pooled[rows])


@dataclass(frozen=True)
class Architecture:
    """The sizes of a network, from which it can be rebuilt."""

    channels: int
    """Channels of a latent."""
    inputs: int = 2
    """Number of input latents: 1 for the noisy latent, 2 for the noisy latent and D."""
    tokens: int = 0
    """Channels of a text token, E."""
    pooled: int = 0
    """Channels of the pooled text, P."""
    width: int = 48
    levels: int = 3
    """Number of resolutions. Each halves the resolution of the previous one and doubles its width."""
    blocks: int = 2
    """Residual blocks per resolution."""
    kernel: int = 3
    scalar: bool = False
    """Output one number per sample. The latent head then predicts the model's D, as an auxiliary task."""

    def __post_init__(self):
        for name, (least, most) in SIZES.items():
            if not least <= getattr(self, name) <= most:
                given = short(getattr(self, name))
                raise GuidanceError(f"A guidance network has {name} from {least} to {most}, not {given}.")
        if self.width % GROUPS:
            raise GuidanceError(f"The width of a guidance network must be a multiple of {GROUPS}, not {self.width}.")
        if self.kernel % 2 == 0:
            raise GuidanceError(f"The kernel of a guidance network must be odd, not {self.kernel}.")

    def fitted(self, shape: Sequence[int]) -> "Architecture":
        """Fewer levels and a smaller kernel if latents of this shape (C,H,W) or (C,T,H,W) are too small for these."""
        side = min(shape[-2:])
        return replace(
            self, levels=min(self.levels, 1 + int(math.log2(max(side // 2, 1)))), kernel=self.kernel if side > 1 else 1
        )


GROUPS = 8
"""Groups of channels in a normalisation."""
SIZES = {
    "channels": (1, 1024),
    "inputs": (1, 2),
    "tokens": (0, 2**16),
    "pooled": (0, 2**16),
    "width": (1, 1024),
    "levels": (1, 8),
    "blocks": (1, 16),
    "kernel": (1, 7),
}
"""Minimum and maximum of each size of an architecture.

The maxima are several times those in use: latents of 128 channels, texts of 12,288, a width of 64 at 3 levels of 2
blocks. They limit the time and memory that a damaged file can cost.
"""
HEAD = 32
"""Channels of an attention head."""


class GuidanceNetwork(nn.Module):
    """A U-Net over latents, conditioned on noise level and text.

    Noise level and pooled text modulate it. At the lowest resolution it attends to text tokens. Its output is zero
    before training, because the last layer is zero. Height, width and number of frames are free. Frames exchange
    information in the attention alone.
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
    def without_weights(architecture: Architecture) -> "GuidanceNetwork":
        """A network on the meta device, for `load_state_dict(..., assign=True)`."""
        with torch.device("meta"):
            network = GuidanceNetwork(architecture)
        network.embed.frequencies = frequencies(architecture.width)
        return network

    @property
    def last(self) -> nn.Module:
        """The output layer."""
        return self.head if self.value is None else self.value.last

    def forward(self, inputs: Sequence[Tensor], angle: Tensor, text: Text, with_denoised: bool = False):
        """Latents (B,C,H,W) or (B,C,T,H,W) of unit scale, noise angles (B,) -> the output, of a latent's shape.

        A scalar network returns (B,). with_denoised: it returns a pair, that and the predicted D.
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
        if value is not None and not with_denoised:
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
    """Frequencies (width/2,) of the sinusoidal embedding of the noise angle. They are not stored in files."""
    return torch.logspace(0, 1.5, width // 2)


class Embedding(nn.Module):
    """Noise angle (B,) and pooled text (B,P) -> embedding (B,outputs)."""

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
    """Vectors (B,P), standardized by a mean vector and one spread: most of a text's vector is common to all texts."""

    def __init__(self, size: int):
        super().__init__()
        self.mean: Tensor
        self.spread: Tensor
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("spread", torch.ones(()))

    def fit(self, vectors: Tensor) -> None:
        """Set mean and spread from vectors (N,P). If they are all equal, the spread is their RMS."""
        if not vectors.shape[1]:
            return
        self.mean.copy_(vectors.mean(0))
        spread, size = (part.square().mean().sqrt() for part in (vectors - self.mean, vectors))
        self.spread.copy_(spread if spread > 1e-3 * size else size if size > 0 else torch.ones(()))

    def forward(self, vectors: Tensor) -> Tensor:
        return (vectors - self.mean) / self.spread


class Value(nn.Module):
    """The scalar head: feature maps (B·frames,C,H,W) and their embedding -> one number per sample (B,)."""

    def __init__(self, width: int, embedding: int):
        super().__init__()
        self.first = nn.Sequential(nn.LayerNorm(width + embedding), nn.Linear(width + embedding, 128), nn.SiLU())
        self.last = nn.Linear(128, 1)

    def forward(self, x: Tensor, embedding: Tensor, frames: int) -> Tensor:
        values = self.last(self.first(torch.cat([x.mean((-1, -2)), embedding], 1)))
        return values.view(-1, frames).mean(1)


class Stage(nn.Module):
    """The residual blocks of one resolution."""

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
    """A residual block. The embedding scales and shifts its second normalisation."""

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
    """A transformer layer: self-attention over all positions of all frames, and attention to the text tokens."""

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
