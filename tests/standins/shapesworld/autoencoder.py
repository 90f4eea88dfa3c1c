"""TAESD with fewer channels: the architecture of madebyollin/taesd at any width, and its widening to the 64 channels of the file format."""

import torch
from torch import Tensor, nn

LATENT_CHANNELS, WIDTH, FORMAT_WIDTH = 16, 32, 64


def conv(n_in: int, n_out: int, **options) -> nn.Conv2d:
    return nn.Conv2d(n_in, n_out, 3, padding=1, **options)


class Clamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class Block(nn.Module):
    def __init__(self, n: int):
        super().__init__()
        self.conv = nn.Sequential(conv(n, n), nn.ReLU(), conv(n, n), nn.ReLU(), conv(n, n))

    def forward(self, x: Tensor) -> Tensor:
        return (self.conv(x) + x).relu()


class Encoder(nn.Sequential):
    """Pictures (B,3,8H,8W) in [0,1] -> latents (B,16,H,W), about N(0,1)."""

    def __init__(self, n: int = WIDTH):
        stages = [conv(3, n), Block(n)]
        for _ in range(3):
            stages += [conv(n, n, stride=2, bias=False), Block(n), Block(n), Block(n)]
        super().__init__(*stages, conv(n, LATENT_CHANNELS))


class Decoder(nn.Sequential):
    """Latents (B,16,H,W) -> pictures (B,3,8H,8W), about [0,1]."""

    def __init__(self, n: int = WIDTH):
        stages = [Clamp(), conv(LATENT_CHANNELS, n), nn.ReLU()]
        for _ in range(3):
            stages += [Block(n), Block(n), Block(n), nn.Upsample(scale_factor=2), conv(n, n, bias=False)]
        super().__init__(*stages, Block(n), conv(n, 3))


def widen(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same function with 64 channels: the added ones are zero. Only the inner width grows, never pictures or latents."""

    def grown(n: int) -> int:
        return FORMAT_WIDTH if n == WIDTH else n

    wide = {}
    for name, weight in weights.items():
        shape = [grown(n) for n in weight.shape[:2]] + list(weight.shape[2:])
        wide[name] = weight.new_zeros(shape)
        wide[name][tuple(slice(n) for n in weight.shape)] = weight
    return wide
