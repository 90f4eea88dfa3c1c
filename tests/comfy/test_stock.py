"""The stand-ins run through stock nodes, before any of ours: what fails here is not the pack's doing."""

import numpy as np
import pytest
from reward_guidance.tests.harness.graphs import FAMILIES, LARGE_FLUX, probed, text_to_image


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    """Of the whole module, so that one family's tests follow each other and its model is loaded once."""
    return request.param


def draw(client, family, **options):
    """The run, and its pictures (N,H,W,3)."""
    result = client.run(text_to_image(family, before_sampler=probed, **options)).check()
    return result, np.stack([np.asarray(image) for image in client.images(result, "save")])


def is_picture(pixels, family):
    return pixels.shape == (5 if family == "wan" else 1, 64, 64, 3) and pixels.std() > 1


def test_family_draws_a_picture(client, family):
    result, pixels = draw(client, family)
    assert is_picture(pixels, family)
    assert result.model_calls == 2


def test_tiny_autoencoder_decodes(client, family):
    result, pixels = draw(client, family, vae=FAMILIES[family].taesd)
    assert is_picture(pixels, family)


def test_seed_decides_the_picture(client, family):
    (_, one), (_, other) = (draw(client, family, seed=seed, vae=FAMILIES[family].taesd) for seed in (1, 2))
    assert (one != other).any()


def test_large_flux_draws_a_picture(client):
    _, pixels = draw(client, LARGE_FLUX)
    assert is_picture(pixels, LARGE_FLUX)


def test_bad_prompts_are_answered_in_words_and_the_next_one_works(client):
    refused = client.run(text_to_image("flux", sampler_name="no such sampler"))
    assert "no such sampler" in refused.error
    four_channels = "taesd"
    assert "channels" in client.run(text_to_image("flux", vae=four_channels)).error
    assert client.run(text_to_image("flux")).error is None


def test_interrupt_stops_a_run_and_the_next_one_works(client):
    def stop(kind, data):
        if kind == "probe.model_call":
            client.interrupt()

    long = text_to_image("flux", before_sampler=probed, steps=1000, seed=9)
    stopped = client.run(long, on_event=stop)
    assert stopped.error == "interrupted"
    assert stopped.model_calls < 100
    assert client.run(text_to_image("flux")).error is None
