"""Private random number generators."""

import zlib

import torch


def generator(*key: int) -> torch.Generator:
    """A private CPU generator for a key. Its numbers differ from those that ComfyUI draws for a seed.

    PyTorch uses 32 bits of a CPU generator's seed. Hashing makes every number of the key count.
    """
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))
