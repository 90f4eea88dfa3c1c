"""The tilt of noise: nothing before training, exact where the answer is known."""

import math

import pytest
import torch
from reward_guidance.guidance import one_step
from reward_guidance.guidance.data.samples import Texts
from reward_guidance.guidance.network.forms import FORMS
from reward_guidance.guidance.network.unet import Architecture, GuidanceNetwork, Text
from reward_guidance.guidance.process import column
from reward_guidance.guidance.training.labels import label
from reward_guidance.guidance.training.objectives import OBJECTIVES, Plan, Task

TILT = torch.tensor([0.8, -0.5]).view(1, 2, 1, 1)


def randn(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 2, 1, 1, generator=torch.Generator().manual_seed(seed))


class LinearTilt(torch.nn.Module):
    """G = sin(φ)·t, the closed form for the reward t·z at temperature 1: then q = N(t, I)."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, inputs, angle, text):
        return self.scale * (angle.sin().view(-1, 1, 1, 1) * TILT).expand_as(inputs[0])


def test_an_untrained_network_leaves_noise_as_it_is():
    network = GuidanceNetwork(Architecture(channels=2, inputs=1, width=16).fitted((2, 1, 1)))
    assert torch.equal(one_step.tilted_noise(network, randn(5), Text.none(5)), randn(5))


@pytest.mark.parametrize(("steps", "error"), [(1, 0.12), (4, 0.007), (16, 5e-4)])
def test_a_linear_reward_moves_noise_by_its_gradient(steps, error):
    moved = one_step.tilted_noise(LinearTilt(), randn(5), Text.none(5), steps) - randn(5)
    torch.testing.assert_close(moved, TILT.expand_as(moved), rtol=0, atol=error)


def test_the_path_is_the_probability_flow_of_the_denoised_form():
    x, angle = randn(6), torch.linspace(0.1, 1.4, 6)
    denoised = one_step.denoise(x, angle)
    tilted = FORMS["noise"](LinearTilt(), one_step.PROCESS, lambda _: denoised, x, angle, Text.none(6))
    level = column(angle, x)
    velocity = (level.cos() * x - tilted) / level.sin()  # dx/dφ of x = cos(φ)·z + sin(φ)·ε
    torch.testing.assert_close(velocity, -LinearTilt()((x,), angle, Text.none(6)).detach(), rtol=1e-4, atol=1e-5)


def test_the_weighted_objective_is_least_at_the_closed_form():
    """200,000 samples of noise; the scale of the closed form is moved by less than four standard errors, and twice it by more."""
    noise = randn(200_000)
    weights, _ = label((noise * TILT).sum((1, 2, 3)), torch.zeros(len(noise)), 1 / float(TILT.norm()))
    batch = one_step.NoisePairs(noise, weights).batch(200_000, (0,))
    network = LinearTilt()
    task = Task(one_step.PROCESS, Plan(form="noise"))
    OBJECTIVES["weighted"](network, task, batch).backward()
    network.scale.grad, at_truth = None, float(network.scale.grad)
    network.scale.data.fill_(2.0)
    OBJECTIVES["weighted"](network, task, batch).backward()
    assert abs(at_truth) < 0.02 and float(network.scale.grad) > 0.2


def test_noise_pairs_span_the_path_and_repeat():
    pairs = one_step.NoisePairs(randn(10), torch.ones(10))
    first, again, part = pairs.batch(8, (1,)), pairs.batch(8, (1,)), pairs.batch(8, (1,), slice(1, None, 2))
    assert torch.equal(first.x, again.x) and torch.equal(first.x[1::2], part.x)
    assert 0 < first.sigma.min() < math.pi / 16 and math.pi * 7 / 16 < first.sigma.max() < math.pi / 2


class OneStepForm(torch.nn.Module):
    """The same move for every noise."""

    def __init__(self, move):
        super().__init__()
        self.move = torch.nn.Parameter(move)

    def forward(self, inputs, angle, text):
        assert torch.allclose(angle, torch.tensor(math.pi / 2))
        return self.move.expand_as(inputs[0])


def test_the_reward_gradient_is_least_at_the_leap_of_a_linear_reward():
    """|Δ|²/2 - t·(z + Δ)/β is least at Δ = t/β, which makes of N(0, I) the tilt N(t/β, I)."""
    network, texts = OneStepForm(TILT / 0.5), Texts([torch.empty(0, 0)], torch.empty(1, 0))
    task = Task(
        one_step.PROCESS,
        Plan(objective="reward_gradient", form="leap", temperature=0.5),
        lambda noise, _: (noise * TILT).sum((1, 2, 3)),
    )
    batch = one_step.FreshNoise((2, 1, 1), texts).batch(64, (0,))
    OBJECTIVES["reward_gradient"](network, task, batch).backward()
    assert network.move.grad.abs().max() < 1e-5
    torch.testing.assert_close(
        one_step.tilted_noise(network, randn(5), Text.none(5), form="leap"), randn(5) + TILT / 0.5
    )
    torch.testing.assert_close(
        one_step.tilted_noise(network, randn(5), Text.none(5), strength=0.5, form="leap"), randn(5) + TILT
    )


def test_fresh_noise_takes_turns_with_prompts():
    source = one_step.FreshNoise((2, 3, 3), Texts([torch.zeros(1, 4)] * 3, torch.eye(3)))
    one, again, other = (source.batch(50, key) for key in ((1, 2), (1, 2), (1, 3)))
    assert torch.equal(one.x, again.x) and not torch.equal(one.x, other.x)
    assert set(one.prompts.tolist()) == {0, 1, 2} and torch.equal(one.text.pooled.argmax(1), one.prompts)
    assert torch.equal(source.batch(50, (1, 2), slice(0, None, 2)).x, one.x[::2])
