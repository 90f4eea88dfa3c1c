"""The stand-ins run through stock nodes, before any of ours: what fails here is not the pack's doing."""

import numpy as np
import pytest
from reward_guidance.tests.harness.graphs import FAMILIES, LARGE_FLUX, probed, text_to_image

FRAMES = {"wan": 5}


def pixels(client, result):
    return np.stack([np.asarray(image) for image in client.images(result, "save")])


@pytest.mark.parametrize("family", FAMILIES)
def test_family_draws_a_picture(client, family):
    result = client.run(text_to_image(family, before_sampler=probed)).check()
    drawn = pixels(client, result)
    assert drawn.shape == (FRAMES.get(family, 1), 64, 64, 3)
    assert drawn.std() > 1
    assert result.model_calls == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_autoencoder_decodes(client, family):
    drawn = pixels(client, client.run(text_to_image(family, vae=FAMILIES[family].taesd)).check())
    assert drawn.shape == (FRAMES.get(family, 1), 64, 64, 3)
    assert drawn.std() > 1


def test_large_flux_draws_a_picture(client):
    assert pixels(client, client.run(text_to_image(LARGE_FLUX)).check()).std() > 1


@pytest.mark.parametrize("family", FAMILIES)
def test_seed_decides_the_picture(client, family):
    first, other = (pixels(client, client.run(text_to_image(family, seed=seed)).check()) for seed in (3, 4))
    client.free()
    again = pixels(client, client.run(text_to_image(family, seed=3)).check())
    assert (first == again).all()
    assert (first != other).any()
