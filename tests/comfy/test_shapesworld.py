"""The expanded files behind ComfyUI's own loaders, in process."""

import pytest
import torch
from reward_guidance.tests.harness.inprocess import load_comfyui

load_comfyui()

from reward_guidance.tests.harness import graphs
from reward_guidance.tests.standins.shapesworld import compact, expand, oracle, train, world
from reward_guidance.tests.standins.shapesworld.pipeline import KINDS, Pipeline
from torchvision.transforms.functional import pil_to_tensor

PROMPT = world.PROMPTS[0]
FLOW = "shapes.safetensors"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def pipelines(models) -> dict[str, Pipeline]:
    return {kind: Pipeline(models, FLOW, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def pipeline(pipelines) -> Pipeline:
    return pipelines["flow"]


def test_expanding_twice_writes_once(models):
    first = [path.stat().st_mtime_ns for path in expand.expand(models, FLOW)]
    assert [path.stat().st_mtime_ns for path in expand.expand(models, FLOW)] == first


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
    full = pipeline.model.model.diffusion_model.float()(
        x, sigma * 1000, context=context.clone(), y=extra["pooled_output"].clone()
    )
    short = train.flow_model()
    short.load_state_dict(compact.load("flow"))
    torch.testing.assert_close(
        train.velocity(short, x, sigma, *train.encode_text([PROMPT])), full, rtol=1e-3, atol=2e-3
    )


@torch.no_grad()
def test_the_narrow_decoder_is_the_vae(pipeline):
    latents = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    pictures = pipeline.vae.first_stage_model.float().decode(
        pipeline.model.get_model_object("latent_format").process_out(latents)
    )
    torch.testing.assert_close(expand.narrow_decoder()(latents), pictures / 2 + 0.5, rtol=1e-4, atol=1e-4)


def test_it_draws_what_it_is_asked(pipeline):
    read = oracle.read(pipeline.pictures(pipeline.latents([PROMPT] * 8, seed=0)))
    assert (read == torch.tensor(world.parse(PROMPT))).all(1).float().mean() >= 0.5


@pytest.fixture(scope="module")
def right(pipelines) -> dict[str, torch.Tensor]:
    """Whether the pictures of each kind show what the benchmark's prompts ask for: (64,), two for each."""
    asked = torch.tensor([world.parse(prompt) for prompt in world.PROMPTS])
    pictures = {
        kind: [made.pictures(made.latents(world.PROMPTS, seed)) for seed in (0, 1)] for kind, made in pipelines.items()
    }
    return {
        kind: torch.cat([(oracle.read(batch) == asked).all(1) for batch in batches])
        for kind, batches in pictures.items()
    }


@pytest.mark.parametrize("kind, least", [("flow", 0.45), ("diffusion", 0.4), ("one_step", 0.3)])
def test_it_mostly_draws_what_it_is_asked(right, kind, least):
    assert least <= right[kind].float().mean() <= 0.85


@pytest.mark.parametrize("kind", KINDS)
def test_it_has_the_habits_of_the_world(right, kind):
    typical = world.is_typical(torch.tensor([world.parse(prompt) for prompt in world.PROMPTS])).repeat(2)
    assert right[kind][typical].float().mean() > right[kind][~typical].float().mean() + 0.2


def test_another_sampler_draws_the_same_diffusion(pipelines):
    euler, other = (
        pipelines["diffusion"].latents([PROMPT] * 4, 0, sampler=sampler) for sampler in ("euler", "dpmpp_2m")
    )
    assert (euler - other).square().mean() < 0.2


def test_one_step_begins_with_the_noise_it_is_given(pipelines):
    noise = torch.randn(4, 16, 8, 8, generator=torch.manual_seed(3))
    given, drawn = (
        pipelines["one_step"].latents([PROMPT] * 4, seed=3, **options) for options in ({"noise": noise}, {})
    )
    assert torch.equal(given, drawn)


def test_the_model_can_be_asked_at_any_state(pipelines):
    one_step = pipelines["one_step"]
    noise, sigma = (
        torch.randn(2, 16, 8, 8, generator=torch.manual_seed(4)),
        one_step.model.get_model_object("model_sampling").sigma_max,
    )
    asked = one_step.denoised(noise * (1 + sigma**2).sqrt(), sigma.expand(2), [PROMPT] * 2)
    torch.testing.assert_close(asked, one_step.latents([PROMPT] * 2, 0, noise=noise), rtol=1e-4, atol=1e-4)


def test_a_seed_means_the_same_picture_to_all(pipelines):
    """Nearer to each other than to the picture of another seed."""
    one, *others = (made.latents(world.PROMPTS, 5) for made in pipelines.values())
    stranger = pipelines["flow"].latents(world.PROMPTS, 6)
    for other in others:
        assert ((one - other).flatten(1).norm(dim=1) < (stranger - other).flatten(1).norm(dim=1)).float().mean() > 0.8


@pytest.mark.parametrize("kind", ["diffusion", "one_step"])
def test_a_stock_graph_draws_with_it(client, kind):
    sampling, steps = KINDS[kind].sampling, KINDS[kind].steps

    def discrete(graph, model):
        return graphs.probed(
            graph, graph.add("discrete", "ModelSamplingDiscrete", model=model, sampling=sampling, zsnr=False)
        )

    family = graphs.checkpoint(expand.checkpoints()[kind], latent="EmptySD3LatentImage", cfg=1.0)
    result = client.run(graphs.text_to_image(family, PROMPT, batch=8, before_sampler=discrete, steps=steps)).check()
    pixels = torch.stack([pil_to_tensor(image) for image in client.images(result, "save")]) / 255
    assert result.model_calls == steps
    assert (oracle.read(pixels) == torch.tensor(world.parse(PROMPT))).all(1).float().mean() >= 0.25
