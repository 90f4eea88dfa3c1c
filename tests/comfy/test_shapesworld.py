"""The expanded files behind ComfyUI's own loaders, in process."""

import pytest
import torch
from reward_guidance.tests.harness.inprocess import load_comfyui

load_comfyui()

from reward_guidance.tests.standins.shapesworld import compact, expand, oracle, train, world
from reward_guidance.tests.standins.shapesworld.pipeline import Pipeline

PROMPT = world.PROMPTS[0]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Pipeline:
    return Pipeline(tmp_path_factory.mktemp("models"), "shapes.safetensors")


def test_expanding_twice_writes_once(tmp_path):
    first = [path.stat().st_mtime_ns for path in expand.expand(tmp_path, "shapes.safetensors")]
    assert [path.stat().st_mtime_ns for path in expand.expand(tmp_path, "shapes.safetensors")] == first


def test_padding_is_one_token_many_times(pipeline):
    context, extra = pipeline.encode([PROMPT])[0]
    assert context.shape == (1, 77, 4096) and extra["pooled_output"].shape == (1, 2048)
    assert (context[:, 9:] == context[:, 9:10]).all() and not context[..., 768:].any()
    short, pooled = train.encode_text([PROMPT])
    torch.testing.assert_close(context[:, :10, :768].clone(), short, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(extra["pooled_output"][:, :768].clone(), pooled, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_the_short_context_of_training_is_exact(pipeline):
    context, extra = pipeline.encode([PROMPT])[0]
    x, sigma = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.7])
    full = pipeline.model.model.diffusion_model.float()(x, sigma * 1000, context=context.clone(), y=extra["pooled_output"].clone())
    short = train.flow_model()
    short.load_state_dict(compact.load("flow"))
    torch.testing.assert_close(train.velocity(short, x, sigma, *train.encode_text([PROMPT])), full, rtol=1e-3, atol=2e-3)


@torch.no_grad()
def test_the_narrow_decoder_is_the_vae(pipeline):
    latents = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    pictures = pipeline.vae.first_stage_model.float().decode(pipeline.model.get_model_object("latent_format").process_out(latents))
    torch.testing.assert_close(expand.narrow_decoder()(latents), pictures / 2 + 0.5, rtol=1e-4, atol=1e-4)


def test_it_draws_what_it_is_asked(pipeline):
    read = oracle.read(pipeline.pictures(pipeline.latents([PROMPT] * 8, seed=0)))
    assert (read == torch.tensor(world.parse(PROMPT))).all(1).float().mean() >= 0.5
