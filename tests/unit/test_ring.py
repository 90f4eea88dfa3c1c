"""The ring's closed forms against samples."""

import pytest
import torch
from reward_guidance.guidance.process import Flow
from reward_guidance.tests.standins.ring import RING, TiltedRing, ring_reward


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize("sigma", [0.4, 0.8])
def test_the_quadrature_is_the_reward_weighted_mean(sigma, temperature):
    """Over 400,000 samples of p, weighted by what x says of them and by the reward; within a hundredth."""
    x = torch.tensor([[0.5, 0.2]], dtype=torch.float64)
    clean = RING.sample(400_000, torch.Generator().manual_seed(0))
    likelihood = -(x - Flow().scale(sigma) * clean).square().sum(1) / (2 * Flow().noise_std(sigma) ** 2)
    weights = (likelihood + ring_reward(clean) / temperature).softmax(0)
    answer = TiltedRing.at(temperature).denoised(x, Flow(), sigma)
    assert (answer - weights @ clean).abs().max() < 0.01
    assert (answer - RING.denoised(x, Flow(), sigma)).abs().max() > 0.03


def test_states_of_several_noise_levels_are_denoised_at_once():
    x, sigma = (
        torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
        torch.tensor([0.2, 0.5, 1.0]),
    )
    for mixture in (RING, TiltedRing.at(1.0)):
        alone = torch.cat([mixture.denoised(x[i : i + 1], Flow(), float(sigma[i])) for i in range(3)])
        torch.testing.assert_close(mixture.denoised(x, Flow(), sigma), alone)
