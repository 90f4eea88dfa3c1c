"""Random numbers that are nobody else's."""

import zlib

import torch


def generator(*key: int) -> torch.Generator:
    """A private generator on the CPU for a key, whose numbers are not those that ComfyUI draws for a seed.

    PyTorch reads 32 bits of a CPU generator's seed; the whole key counts here.
    """
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))
