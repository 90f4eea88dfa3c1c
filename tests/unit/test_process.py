"""Round trips and identities over the product of processes, parameterizations, schedules and noise levels."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reward_guidance.guidance.process import (
    Diffusion,
    Discrete,
    EDMPrediction,
    Flow,
    LogLinear,
    NoisePrediction,
    ShiftedFlow,
    Spherical,
    VPrediction,
    flux_schedule,
    scaled_linear_sigmas,
)

PROCESSES = [Diffusion(), Flow(), Flow(noise_scale=0.5), Spherical()]
PARAMETERIZATIONS = [NoisePrediction(), VPrediction(), VPrediction(0.5), EDMPrediction(), EDMPrediction(0.5)]
SCHEDULES = [
    ShiftedFlow(),
    ShiftedFlow(3.0),
    ShiftedFlow(8.0),
    flux_schedule(1.15),
    Discrete(),
    LogLinear(),
    LogLinear(0.03, 14.6),
]

levels = st.floats(0.02, 0.98)
values = st.floats(-3, 3)


def close(a, b):
    return a == pytest.approx(b, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("process", PROCESSES)
@given(clean=values, noise=values, sigma=levels)
def test_noise_score_and_velocity_invert(process, clean, noise, sigma):
    x = process.add_noise(clean, noise, sigma)
    assert close(process.noise(x, clean, sigma), noise)
    assert close(process.denoised_from_score(x, process.score(x, clean, sigma), sigma), clean)
    assert close(process.denoised_from_velocity(x, process.velocity(x, clean, sigma), sigma), clean)
    assert close(process.score(x, clean, sigma), -noise / process.noise_std(sigma))


@pytest.mark.parametrize("process", PROCESSES)
@given(clean=values, noise=values, sigma=levels)
def test_velocity_is_the_derivative_of_the_path(process, clean, noise, sigma):
    step = 1e-6
    slope = (process.add_noise(clean, noise, sigma + step) - process.add_noise(clean, noise, sigma - step)) / (2 * step)
    assert process.velocity(process.add_noise(clean, noise, sigma), clean, sigma) == pytest.approx(slope, abs=1e-6)


@pytest.mark.parametrize("process", PROCESSES)
@given(x=values, denoised=values, gradient=values, sigma=levels)
def test_velocity_form_and_denoised_form_of_guidance_agree(process, x, denoised, gradient, sigma):
    tilted = denoised + process.shift_gain(sigma) * gradient
    velocity = process.tilt_velocity(process.velocity(x, denoised, sigma), gradient, sigma)
    assert close(process.denoised_from_velocity(x, velocity, sigma), tilted)


def test_flow_guidance_is_the_published_velocity_correction():
    assert close(Flow().tilt_velocity(0.0, 1.0, 0.25), -0.25 / 0.75)
    assert close(Diffusion().tilt_velocity(0.0, 1.0, 4.0), -4.0)


@pytest.mark.parametrize("process", PROCESSES)
@given(sigma=levels, variance=st.floats(0.05, 4))
def test_posterior_variance_of_gaussian_data(process, sigma, variance):
    a, s = process.scale(sigma), process.noise_std(sigma)
    assert close(process.posterior_variance(sigma, variance), 1 / (1 / variance + a * a / (s * s)))


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
@given(x=values, output=values, sigma=st.floats(0.02, 20))
def test_parameterizations_invert(parameterization, x, output, sigma):
    assert close(parameterization.output(x, parameterization.denoised(x, output, sigma), sigma), output)


@given(clean=values, noise=values, sigma=st.floats(0.02, 20))
def test_true_targets_denoise_exactly(clean, noise, sigma):
    x = Diffusion().add_noise(clean, noise, sigma)
    v = (noise - sigma * clean) / math.sqrt(1 + sigma**2)
    assert close(NoisePrediction().denoised(x, noise, sigma), clean)
    assert close(VPrediction().denoised(x, v, sigma), clean)
    assert close(EDMPrediction().denoised(x, -v, sigma), clean)


@given(clean=values, noise=values, sigma=levels)
def test_velocity_target_denoises_flow_exactly(clean, noise, sigma):
    x = Flow().add_noise(clean, noise, sigma)
    assert close(NoisePrediction().denoised(x, noise - clean, sigma), clean)


@pytest.mark.parametrize("schedule", SCHEDULES)
@given(time=st.floats(0.001, 1), later=st.floats(0.001, 1))
def test_schedules_invert_and_rise(schedule, time, later):
    assert schedule.time(schedule.sigma(time)) == pytest.approx(time, abs=1e-7)
    if time < later - 1e-9:
        assert schedule.sigma(time) < schedule.sigma(later)


def test_schedules_of_published_models():
    assert [ShiftedFlow(3.0).percent_to_sigma(p) for p in (0.25, 0.5, 0.75)] == pytest.approx([0.9, 0.75, 0.5])
    assert [flux_schedule(1.15).percent_to_sigma(p) for p in (0.25, 0.5, 0.75)] == pytest.approx(
        [0.9045, 0.7595, 0.5128], abs=2e-4
    )
    sigmas = scaled_linear_sigmas()
    assert (sigmas[0], sigmas[-1]) == pytest.approx((0.0292, 14.6146), abs=1e-4)
    assert [Discrete().percent_to_sigma(p) for p in (0.25, 0.5, 0.75)] == pytest.approx([4.086, 1.616, 0.695], abs=2e-3)


@pytest.mark.parametrize("process", PROCESSES)
def test_algebra_broadcasts_over_tensors_as_over_floats(process):
    generator = torch.Generator().manual_seed(0)
    sigma = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64).view(3, 1)
    clean, noise = (torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    x = process.add_noise(clean, noise, sigma)
    for row in range(3):
        assert torch.allclose(x[row], process.add_noise(clean[row], noise[row], float(sigma[row])))
    assert torch.allclose(process.score(x, clean, sigma), -noise / process.noise_std(sigma))
    assert process.posterior_variance(sigma).shape == sigma.shape
