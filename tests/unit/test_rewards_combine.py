"""Weighted combinations, and what `evaluate` refuses."""

import pytest
import torch
from reward_guidance.guidance.rewards import ColourReward, CombinedReward, ImageStatistic, Reward, RewardError, evaluate


class Constant(Reward):
    """A reward of known scores."""

    def __init__(self, scores, mean=0.0, std=1.0, needs_prompt=False, differentiable=True):
        super().__init__()
        self.scores, self.reference_mean, self.reference_std = scores, mean, std
        self.needs_prompt, self.differentiable = needs_prompt, differentiable

    def forward(self, pixels, prompts):
        return self.scores


def pixels(batch=2):
    return torch.rand(batch, 3, 8, 8)


def test_parts_are_standardised_and_weighted():
    combined = CombinedReward(
        [Constant(torch.tensor([20.0, 23.0]), mean=20, std=1.5), Constant(torch.tensor([0.3, 0.2]), mean=0.1, std=0.1)],
        [3, -4],
    )
    assert torch.allclose(
        evaluate(combined, pixels(), ""), torch.tensor([(3 * 0 - 4 * 2) / 5, (3 * 2 - 4 * 1) / 5]), atol=1e-5
    )


def test_independent_parts_combine_to_unit_spread():
    scores = torch.randn(3, 20000) * torch.tensor([[0.1], [5], [1]]) + torch.tensor([[3.0], [-2], [0]])
    parts = [Constant(row, mean=row.mean().item(), std=row.std().item()) for row in scores]
    combined = CombinedReward(parts, [1, 0.2, -7])
    result = combined(torch.zeros(20000, 3, 1, 1), [""] * 20000)
    assert (combined.reference_mean, combined.reference_std) == (0, 1)
    assert result.mean().item() == pytest.approx(0, abs=0.01)
    assert result.std().item() == pytest.approx(1, abs=0.02)


def test_only_the_ratio_of_weights_matters():
    parts = [ImageStatistic("brightness"), ColourReward((1, 0, 0))]
    batch = pixels()
    assert torch.allclose(
        CombinedReward(parts, [1, 2])(batch, ["", ""]), CombinedReward(parts, [10, 20])(batch, ["", ""])
    )


def test_a_single_part_is_its_standardised_score():
    reward, batch = ImageStatistic("contrast"), pixels()
    assert torch.allclose(
        evaluate(CombinedReward([reward], [0.3]), batch, ""), reward.standardize(evaluate(reward, batch, ""))
    )


def test_a_combination_of_combinations_shows_every_reward():
    names, batch = ("brightness", "contrast", "saturation"), pixels()
    rewards = [ImageStatistic(name) for name in names]
    inner = CombinedReward(rewards[:2], [3, -4])
    outer = CombinedReward([inner, rewards[2]], [2, 1])
    assert list(outer.rewards) == rewards
    sums = [CombinedReward([one], [1])(batch, ["", ""]) for one in rewards]
    expected = (2 * (3 * sums[0] - 4 * sums[1]) / 5 + sums[2]) / 5**0.5
    assert torch.allclose(outer(batch, ["", ""]), expected, atol=1e-6)


def test_parts_show_raw_scores():
    rewards, batch = [ImageStatistic("brightness"), ImageStatistic("contrast")], pixels()
    for reward, (part, scores) in zip(rewards, CombinedReward(rewards, [1, 1]).parts(batch, [""]), strict=True):
        assert part is reward
        assert torch.equal(scores, evaluate(reward, batch, ""))


def test_gradient_is_the_weighted_sum_of_gradients():
    rewards, batch = [ImageStatistic("brightness"), ImageStatistic("saturation")], pixels().requires_grad_()
    (combined,) = torch.autograd.grad(CombinedReward(rewards, [0.6, 0.8])(batch, ["", ""]).sum(), batch)
    brightness, saturation = (
        torch.autograd.grad(reward.standardize(reward(batch, ["", ""])).sum(), batch)[0] for reward in rewards
    )
    assert torch.allclose(combined, 0.6 * brightness + 0.8 * saturation, atol=1e-6)


def test_combinations_nest_and_inherit():
    plain, judge = Constant(torch.zeros(2)), Constant(torch.zeros(2), needs_prompt=True, differentiable=False)
    combined = CombinedReward([plain, CombinedReward([plain, judge], [1, 1])], [1, 1])
    assert (combined.needs_prompt, combined.differentiable) == (True, False)
    assert (CombinedReward([plain], [1]).needs_prompt, CombinedReward([plain], [1]).differentiable) == (False, True)
    with pytest.raises(RewardError, match="the prompt is empty"):
        evaluate(combined, pixels(), "")


@pytest.mark.parametrize("weights", [[], [1], [0, 0], [float("nan"), 1], [float("inf"), 1]])
def test_useless_weights_are_refused(weights):
    with pytest.raises(RewardError, match="as many finite weights"):
        CombinedReward([Constant(torch.zeros(2)), Constant(torch.zeros(2))], weights)


def test_a_damaged_part_is_named():
    broken = Constant(torch.tensor([0.0, torch.nan]))
    broken.name = "the broken one"
    with pytest.raises(RewardError, match="^the broken one returned a score that is not a finite number"):
        evaluate(CombinedReward([ImageStatistic("contrast"), broken], [1, 1]), pixels(), "")


@pytest.mark.parametrize(
    ("batch", "prompts", "message"),
    [
        (torch.rand(3, 8, 8), "", r"not \(3, 8, 8\)"),
        (torch.rand(1, 4, 8, 8), "", r"not \(1, 4, 8, 8\)"),
        (torch.rand(0, 3, 8, 8), "", r"not \(0, 3, 8, 8\)"),
        (torch.rand(1, 3, 5, 8, 8), "", r"not \(1, 3, 5, 8, 8\)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "", "divide by 255"),
        (torch.rand(3, 3, 8, 8), ["a", "b"], "2 prompts for 3 pictures"),
        (torch.rand(1, 3, 8, 8), [], "0 prompts for 1 pictures"),
        (torch.full((1, 3, 8, 8), torch.nan), "", "values that are not finite numbers"),
    ],
)
def test_bad_pictures_and_prompts_are_refused(batch, prompts, message):
    with pytest.raises(RewardError, match=message):
        evaluate(ImageStatistic("brightness"), batch, prompts)


def test_wrong_number_of_scores_is_refused():
    with pytest.raises(RewardError, match="one number for each of 2 pictures"):
        evaluate(Constant(torch.zeros(2, 1)), pixels(), "")
