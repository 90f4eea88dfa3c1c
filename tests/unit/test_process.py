"""The algebra of the noising processes, against definitions and over noise levels."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reward_guidance.guidance.process import Diffusion, Flow, Spherical

PROCESSES = [Diffusion(), Flow(), Flow(noise_scale=0.5), Spherical()]

levels = st.floats(0.02, 0.98)
values = st.floats(-3, 3)


def close(a, b):
    return a == pytest.approx(b, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("process", PROCESSES)
@given(x=values, gradient=values, sigma=levels, variance=st.floats(0.05, 4))
def test_a_shift_of_x_tilts_the_posterior_of_gaussian_data(process, x, gradient, sigma, variance):
    """E[x0|x] is linear in x with the slope a·v/(a²v + s²), and the tilted mean is E[x0|x] + Var[x0|x]·g."""
    a, s = process.scale(sigma), process.noise_std(sigma)
    mean = lambda point: a * variance / (a * a * variance + s * s) * point  # noqa: E731
    tilted = mean(x) + process.posterior_variance(sigma, variance) * gradient
    assert close(mean(x + process.shift_gain(sigma) * gradient), tilted)


def test_shift_gains_of_the_published_corrections():
    """The velocity (x - D)/σ of a flow changes by -σ/(1-σ)·∇log h, that of a diffusion by -σ·∇log h."""
    assert close(Flow().shift_gain(0.25) / 0.25, 0.25 / 0.75)
    assert close(Diffusion().shift_gain(4.0) / 4.0, 4.0)


@pytest.mark.parametrize("process", PROCESSES)
@given(sigma=levels, variance=st.floats(0.05, 4))
def test_posterior_variance_of_gaussian_data(process, sigma, variance):
    a, s = process.scale(sigma), process.noise_std(sigma)
    assert close(process.posterior_variance(sigma, variance), 1 / (1 / variance + a * a / (s * s)))


@given(angle=levels)
def test_the_noise_angle_is_that_of_the_spherical_process(angle):
    """At equal ratios of noise to data all processes have the same angle."""
    ratio = math.tan(angle)
    assert close(Spherical().angle(angle), angle)
    assert close(Diffusion().angle(ratio), angle)
    assert close(Flow().angle(ratio / (1 + ratio)), angle)


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("sigma", [0.1, 0.5, 0.9])
def test_unit_scale_has_unit_variance(process, sigma):
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 100_000, generator=generator, dtype=torch.float64)
    assert process.unit(process.add_noise(clean, noise, sigma), sigma).std() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("process", PROCESSES)
def test_algebra_broadcasts_over_tensors_as_over_floats(process):
    generator = torch.Generator().manual_seed(0)
    sigma = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64).view(3, 1)
    clean, noise = (torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    x = process.add_noise(clean, noise, sigma)
    for row, level in enumerate(sigma.flatten().tolist()):
        assert torch.allclose(x[row], process.add_noise(clean[row], noise[row], level))
        assert torch.allclose(process.unit(x, sigma)[row], process.unit(x[row], level))
        for coefficient in (process.posterior_variance, process.angle, process.shift_gain):
            assert close(float(coefficient(sigma)[row]), coefficient(level))
