"""What several tests of this folder use."""

from collections.abc import Callable
from pathlib import Path

import torch
from reward_guidance.guidance.data.collection import Collection
from reward_guidance.guidance.data.description import Description
from reward_guidance.guidance.data.samples import Sample
from reward_guidance.guidance.network.unet import Text

CHECKOUT = Path(__file__).resolve().parents[2]
PROMPTS = ["a large red circle on a blue ground", "two cats, 8k, masterpiece"]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_sample(number: int, description: Description) -> Sample:
    """A sample of random numbers, which depend on its number alone."""
    rng, shape, levels = generator(number), description.shape, description.levels
    draw = lambda *shape: torch.randn(shape, generator=rng)  # noqa: E731
    clean, scores = draw(*shape), draw(len(description.rewards))
    return Sample(clean, scores, torch.rand(levels, generator=rng) * 0.9 + 0.05, draw(levels, *shape))


def collected(
    folder: Path,
    description: Description,
    text: Text,
    count: int,
    sample: Callable[[int, Description], Sample] = random_sample,
) -> Collection:
    """A collection of `count` samples, of which the missing ones are made."""
    collection = Collection.create(folder, description, text)
    for numbers in collection.missing(count):
        collection.add(numbers, [sample(number, description) for number in numbers])
    return collection
