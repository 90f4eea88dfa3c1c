"""Weights, resampling and best-of-N against closed forms."""

import math

import pytest
import torch
from reward_guidance.guidance.errors import GuidanceError
from reward_guidance.guidance.particles import (
    Population,
    at_least,
    best,
    effective_size,
    normalized,
    ranked,
    settled,
    systematic,
)
from reward_guidance.tests.unit.shared import generator

INF = math.inf


def population(size, temperature=1.0, threshold=0.5, seed=0):
    return Population(size, temperature, generator(seed), threshold)


def offspring(ancestors, n):
    return torch.stack([torch.bincount(row, minlength=n) for row in ancestors]).double()


def test_weights_are_normalized_whatever_their_scale():
    logits = torch.tensor([0.0, math.log(3), -INF], dtype=torch.float64)
    for shift in (0, 1e6, -1e6):
        assert torch.allclose(normalized(logits + shift), torch.tensor([0.25, 0.75, 0], dtype=torch.float64), atol=1e-9)
    assert normalized(torch.full((4,), -INF)).tolist() == [0.25] * 4


def test_effective_size_counts_the_weights():
    weights = torch.tensor([[0.25] * 4, [0.5, 0.5, 0, 0], [1, 0, 0, 0], [0.7, 0.1, 0.1, 0.1]], dtype=torch.float64)
    assert effective_size(weights).tolist() == pytest.approx([4, 2, 1, 1 / 0.52])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_systematic_resampling_is_unbiased_and_never_far_off(n, seed):
    weights = normalized(3 * torch.randn(n, generator=generator(seed), dtype=torch.float64)).expand(5000, n)
    offsets = (torch.arange(5000, dtype=torch.float64)[:, None] + 0.5) / 5000
    counts = offspring(systematic(weights, offsets), n)
    assert torch.allclose(counts.mean(0), n * weights[0], atol=1e-3)
    assert ((counts - n * weights).abs() < 1 + 1e-9).all()


@pytest.mark.parametrize("weights", [[0, 1, 0], [0, 0, 1], [1, 0, 0], [0, 0.5, 0.5, 0]])
def test_weight_zero_has_no_offspring(weights):
    offsets = torch.tensor([[0.0], [0.5], [math.nextafter(1, 0)]], dtype=torch.float64)
    counts = offspring(systematic(torch.tensor(weights, dtype=torch.float64).expand(3, -1), offsets), len(weights))
    assert (counts[:, torch.tensor(weights) == 0] == 0).all()


def test_survivors_keep_their_places():
    rows = settled(torch.tensor([[0, 2, 2, 2], [1, 1, 2, 3], [0, 1, 2, 3]]))
    assert rows.tolist() == [[0, 2, 2, 2], [5, 5, 6, 7], [8, 9, 10, 11]]
    weights = normalized(3 * torch.randn(50, 9, generator=generator(), dtype=torch.float64))
    ancestors = systematic(weights, torch.rand(50, 1, generator=generator(), dtype=torch.float64))
    rows = settled(ancestors)
    assert torch.equal((rows % 9).sort(1).values, ancestors)
    assert (rows.gather(1, rows % 9) == rows).all(), "an ancestor lies where it was"


def test_equal_rewards_resample_nothing():
    for rewards in (torch.zeros(6), torch.full((6,), 3.7), torch.full((6,), -INF)):
        for n in (1, 2, 3, 6):
            look = population(n, threshold=1.0).resample(rewards, final=True)
            assert look.rows.tolist() == list(range(6))
            assert look.effective.tolist() == pytest.approx([n] * (6 // n))


def test_one_particle_that_is_far_better_takes_all():
    look = population(4).resample(torch.tensor([0.0, 0, 1000, 0, 0, 0, 0, -INF]))
    assert look.rows.tolist() == [2, 2, 2, 2, 4, 5, 6, 7]
    assert look.effective.tolist() == pytest.approx([1, 3])
    look = population(4).resample(torch.tensor([-INF, -INF, -1000, -INF]))
    assert look.rows.tolist() == [2] * 4


def test_threshold_and_the_final_look():
    rewards = torch.tensor([0.0, math.log(3)])  # effective size 1.6 of 2
    for threshold, final, effective in ((0.79, False, False), (0.81, False, True), (0.0, True, True)):
        one = population(2, threshold=threshold)
        one.resample(rewards, final)
        assert (one.last_rewards.count_nonzero() > 0) == effective


def test_potentials_multiply_to_the_last_reward():
    """Between two resamplings only the difference counts; without one in between, all of the reward does."""
    first, last = torch.tensor([5.0, 5 + math.log(3)]), torch.tensor([0.0, math.log(9)])
    patient = population(2, threshold=0.0)
    patient.resample(first)
    assert patient.resample(last, final=True).effective.item() == pytest.approx(1 / (0.1**2 + 0.9**2))
    prompt = population(2, threshold=1.0)
    rows = prompt.resample(first).rows
    difference = last[rows] - first[rows]
    assert prompt.resample(last[rows], final=True).effective.item() == pytest.approx(
        float(effective_size(difference.double().softmax(0)))
    )


def test_a_forbidden_estimate_may_recover_if_it_lives_on():
    one = population(2, threshold=0.0)
    one.resample(torch.tensor([-INF, 0.0]))
    assert one.resample(torch.tensor([1.0, 1.0]), final=True).effective.item() == pytest.approx(2)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize("n", [2, 4, 16])
def test_share_of_the_better_of_two_kinds(n, temperature):
    """n particles, each good with probability 1/2: the binomial mean of k e^{r/β} / (k e^{r/β} + n - k)."""
    groups, gain = 40_000, math.exp(1.5 / temperature)
    good = (torch.rand(groups * n, generator=generator(n)) < 0.5).double()
    rows = population(n, temperature).resample(1.5 * good, final=True).rows
    share = lambda k: k * gain / (k * gain + n - k)  # noqa: E731
    expected = sum(math.comb(n, k) / 2**n * share(k) for k in range(n + 1))
    assert float(good[rows].mean()) == pytest.approx(expected, abs=0.006)


def ancestral(reward, n, groups, temperature=1.0, steps=8, threshold=0.5, seed=0):
    """Exact ancestral sampling of x0 ~ N(0, 1) from x = (1-t)·x0 + t·ε, resampled by a reward of the mean E[x0|x] on the way."""
    g = generator(seed)
    draw = lambda: torch.randn(groups * n, generator=g, dtype=torch.float64)  # noqa: E731
    one = Population(n, temperature, g, threshold)
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
    x = draw()
    for t, s in zip(times, times[1:], strict=False):
        total = (1 - t) ** 2 + t**2
        mean = (1 - t) / total * x
        if 0 < t < 1:
            rows = one.resample(reward(mean)).rows
            x, mean = x[rows], mean[rows]
        clean = mean + t / total**0.5 * draw()
        x = (1 - s) * clean + s * draw()
    return x[one.resample(reward(x), final=True).rows]


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
def test_a_large_population_samples_the_tilted_gaussian(threshold):
    """r = x tilts N(0, 1) to N(1/β, 1)."""
    x = ancestral(lambda x: x, n=20_000, groups=1, temperature=0.8, threshold=threshold)
    assert float(x.mean()) == pytest.approx(1.25, abs=0.06)
    assert float(x.var()) == pytest.approx(1, abs=0.1)


def test_misleading_estimates_cost_particles_but_not_correctness():
    """Rewards on the way that have the wrong sign: the last difference makes it good."""
    calls = []

    def reward(x):
        calls.append(1)
        return x if len(calls) == 8 else -x

    x = ancestral(reward, n=100_000, groups=1, temperature=2.0, threshold=1.0)
    assert len(calls) == 8
    assert float(x.mean()) == pytest.approx(0.5, abs=0.06)


def test_the_error_falls_as_one_over_the_number_of_particles():
    errors = {n: 1 - float(ancestral(lambda x: x, n, 200_000 // n, threshold=1.0).mean()) for n in (4, 16, 64)}
    assert errors[4] > 0.05
    assert errors[16] < errors[4] / 2
    assert errors[64] < errors[16] / 2


def test_groups_do_not_feel_each_other():
    rewards = torch.randn(5, 4, generator=generator())
    together = population(4, 0.2).resample(rewards.flatten()).rows.view(5, 4)
    other = rewards.clone()
    other[0] += torch.randn(4, generator=generator(1))
    apart = population(4, 0.2).resample(other.flatten()).rows.view(5, 4)
    assert torch.equal(together[1:], apart[1:])


def test_private_generator_decides_and_leaves_the_global_one_alone():
    rewards = torch.randn(64, generator=generator())
    torch.manual_seed(3)
    expected = torch.randn(4)
    torch.manual_seed(3)
    one, again, other = (population(8, 0.3, seed=seed).resample(rewards).rows for seed in (1, 1, 2))
    assert torch.equal(torch.randn(4), expected)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("bad", [math.nan, INF])
def test_rewards_that_are_no_numbers_are_refused(bad):
    with pytest.raises(GuidanceError, match="not a finite number"):
        population(2).resample(torch.tensor([0.0, bad]))


@pytest.mark.parametrize(("size", "temperature"), [(0, 1.0), (-3, 1.0), (2, 0.0), (2, -1.0), (2, math.nan)])
def test_populations_that_make_no_sense_are_refused(size, temperature):
    with pytest.raises(GuidanceError):
        population(size, temperature)


def test_ranking_puts_copies_last():
    rows = torch.tensor([0, 2, 2, 3])
    scores = torch.tensor([1.0, 9, 2, 7])[rows].tolist()
    assert ranked(rows, scores) == [3, 2, 0, 1]


@pytest.mark.parametrize("highest", [0.8220399618, 0.8999999, -0.0001, 0.82, 1234567.8])
def test_the_threshold_that_is_advised_is_reached(highest):
    """Of a score that rounds up, too."""
    with pytest.raises(GuidanceError, match="Lower the threshold") as refused:
        at_least(torch.tensor([highest]), 1e9)
    assert at_least(torch.tensor([highest]), float(str(refused.value).removesuffix(".").split()[-1])) == [0]


def test_best_and_at_least():
    scores = torch.tensor([1.0, 3, -INF, 3, 2])
    assert best(scores, 1) == [1]
    assert best(scores, 3) == [1, 3, 4]
    assert best(scores, 99) == [1, 3, 4, 0, 2]
    assert at_least(scores, 2) == [1, 3, 4]
    with pytest.raises(GuidanceError, match="No score reaches the threshold of 4; the best is 3"):
        at_least(scores, 4)
    with pytest.raises(GuidanceError, match="Lower the threshold to -inf"):
        at_least(torch.tensor([-INF]), 0)
    for broken, keep, words in (
        (scores, 0, "At least 1"),
        (torch.empty(0), 1, "empty"),
        (torch.tensor([0.0, math.nan]), 1, "Score 1 is not"),
    ):
        with pytest.raises(GuidanceError, match=words):
            best(broken, keep)
