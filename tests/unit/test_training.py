"""Labels, objectives against closed forms, and that training is repeatable, resumable and shareable."""

import dataclasses
import math

import pytest
import torch
from reward_guidance.guidance.data.batches import Batch
from reward_guidance.guidance.errors import GuidanceError
from reward_guidance.guidance.network.unet import Architecture, Text
from reward_guidance.guidance.process import Diffusion, Flow
from reward_guidance.guidance.training.labels import label
from reward_guidance.guidance.training.loop import Training, fit
from reward_guidance.guidance.training.objectives import OBJECTIVES, Plan, Task, in_chunks
from reward_guidance.tests.standins import objectives
from reward_guidance.tests.standins.batches import LivePairs
from reward_guidance.tests.standins.mixture import Mixture
from reward_guidance.tests.unit.shared import generator

TINY = Architecture(channels=2, width=16, levels=1, blocks=1, kernel=1)


def test_effective_sample_size_of_gaussian_rewards_is_known():
    """exp(-1/β²) of the samples count, for rewards of spread 1."""
    rewards = torch.randn(200_000, generator=generator())
    for temperature in (1.0, 2.0, 4.0):
        weights, health = label(rewards, torch.zeros(200_000), temperature)
        assert weights.mean() == pytest.approx(1, abs=1e-4)
        assert health.effective == pytest.approx(math.exp(-1 / temperature**2), rel=0.05)


def test_few_effective_samples_are_warned_of():
    rewards = torch.randn(10_000, generator=generator())
    assert not label(rewards, torch.zeros(10_000), 1.0)[1].warnings()
    (share,) = label(rewards, torch.zeros(10_000), 0.5)[1].warnings()
    assert "of 10000 samples count at this temperature: raise it" in share and "collect" not in share


def test_more_samples_raise_the_number_that_counts_and_not_its_share():
    """One in e at temperature 1: of 100 too few to learn from, of 1000 enough."""
    rewards = torch.randn(1000, generator=generator())
    few, many = (label(rewards[:count], torch.zeros(count), 1.0)[1] for count in (100, 1000))
    assert few.effective == pytest.approx(many.effective, rel=0.3) and many.effective_size > 7 * few.effective_size
    (number,) = few.warnings()
    assert f"count as {few.effective_size:.0f}" in number and "collect more" in number and not many.warnings()


def test_temperature_is_in_standard_deviations_of_the_reward():
    rewards, prompts = torch.randn(1000, generator=generator()), torch.zeros(1000)
    torch.testing.assert_close(
        label(100 * rewards - 7, prompts, 0.5)[0], label(rewards, prompts, 0.5)[0], rtol=1e-4, atol=1e-4
    )


def test_prompts_that_are_liked_better_do_not_count_more():
    prompts = torch.arange(4000) % 4
    rewards = torch.randn(4000, generator=generator()) + 10 * prompts
    weights, health = label(rewards, prompts, 1.0)
    assert health.prompts == 4 and health.std == pytest.approx(1, abs=0.05)
    for prompt in range(4):
        assert weights[prompts == prompt].mean() == pytest.approx(1, abs=0.15)


def test_rare_prompts_do_not_decide_everything():
    """32 prompts with 8 samples each, of very different rewards: at a low temperature every prompt still has its say."""
    prompts = torch.arange(256) % 32
    weights, health = label(
        torch.randn(256, generator=generator()) + 2 * torch.randn(32, generator=generator(1))[prompts], prompts, 0.3
    )
    shares = torch.zeros(32).index_add(0, prompts, weights) / 256
    assert shares.max() < 0.15 and health.effective > 0.05


def test_a_prompt_seen_once_is_compared_with_the_others():
    weights, health = label(torch.tensor([0.0, 1.0, 2.0, 3.0]), torch.arange(4), 1.0)
    assert (weights.diff() > 0).all() and health.prompts == 4


@pytest.mark.parametrize(
    ("rewards", "temperature", "said"),
    [
        ([1.0, 1.0, 1.0], 1.0, "nothing to learn"), ([1.0], 1.0, "nothing to learn"), ([1.0, math.nan, 2.0], 1.0, "1 of 3 rewards"),
        ([1.0, 2.0, 3.0], 0.0, "above 0"), ([1.0, 2.0, 3.0], -1.0, "above 0"),
    ],
)  # fmt: skip
def test_labels_with_nothing_to_learn_are_refused(rewards, temperature, said):
    with pytest.raises(GuidanceError, match=said):
        label(torch.tensor(rewards), torch.zeros(len(rewards)), temperature)


class Constant(torch.nn.Module):
    """A constant output, so that an objective's minimiser is one number per channel."""

    def __init__(self, value: torch.Tensor):
        super().__init__()
        self.value = torch.nn.Parameter(value)

    def forward(self, inputs, angle, text, with_denoised=False):
        value = self.value.expand(inputs[0].shape if self.value.ndim else len(inputs[0]))
        return (value, torch.zeros_like(inputs[0])) if with_denoised else value


MIXTURE = Mixture.random(3, 2, torch.Generator().manual_seed(4), std=0.4)
TILT = torch.tensor([0.8, -0.5], dtype=torch.float64)


def posterior(process, sigma: float, x: torch.Tensor, count: int) -> torch.Tensor:
    """Samples of p(x0|x) for one x (d,)."""
    a, s2, v = process.scale(sigma), process.noise_std(sigma) ** 2, MIXTURE.std**2
    residual = x - a * MIXTURE.means
    chosen = (
        (MIXTURE.logits - residual.pow(2).sum(1) / (2 * (a * a * v + s2)))
        .softmax(0)
        .multinomial(count, True, generator=generator())
    )
    mean = MIXTURE.means + a * v / (a * a * v + s2) * residual
    std = (v * s2 / (a * a * v + s2)) ** 0.5
    return mean[chosen] + std * torch.randn(count, 2, generator=generator(1), dtype=torch.float64)


def batch_at(process, sigma: float, count: int = 400_000) -> tuple[Batch, torch.Tensor]:
    """Posterior samples at one x, with the weights of a linear reward; and (D_q - D)/s in closed form."""
    x = process.add_noise(
        torch.tensor([0.4, -0.3], dtype=torch.float64), torch.tensor([0.2, 0.6], dtype=torch.float64), sigma
    )
    clean = posterior(process, sigma, x, count)
    denoised, tilted = (MIXTURE.denoised(x[None], process, sigma, tilt)[0] for tilt in (None, TILT[None]))
    like = lambda value: value.view(1, 2, 1, 1).expand(count, 2, 1, 1)  # noqa: E731
    weights = (clean @ TILT).exp()
    batch = Batch(
        clean.view(-1, 2, 1, 1),
        like(x),
        torch.full((count,), sigma, dtype=torch.float64),
        like(denoised),
        weights,
        Text.none(count),
    )
    return batch, (tilted - denoised) / process.posterior_variance(sigma) ** 0.5


@pytest.mark.parametrize("process", [Diffusion(), Flow()])
@pytest.mark.parametrize("sigma", [0.3, 0.9])
def test_the_weighted_objective_is_least_at_the_reward_weighted_posterior_mean(process, sigma):
    """400,000 posterior samples: the gradient at the closed form is zero within four standard errors, and there is none to a wrong one."""
    batch, truth = batch_at(process, sigma)
    network = Constant(truth.view(1, 2, 1, 1).clone())
    OBJECTIVES["weighted"](network, Task(process, Plan()), batch).backward()
    target = (batch.clean - batch.denoised) / process.posterior_variance(sigma) ** 0.5
    residual = (
        batch.weights.view(-1, 1, 1, 1) * truth.view(1, 2, 1, 1) - (batch.weights - 1).view(-1, 1, 1, 1) * target
    ).flatten(1)
    error = residual.std(0) / len(residual) ** 0.5
    gradient = network.value.grad.flatten()  # the loss is a mean over 2 channels of twice the residual
    assert (gradient.abs() <= 4 * error).all()
    assert truth.norm() > 20 * error.max()


def test_the_weighted_objective_has_less_noise_than_plain_regression():
    """Gradients of single samples at no guidance, beside those of E[w·|y - G|²], where x says little about the weight."""
    batch, _ = batch_at(Flow(), 0.9, count=50_000)
    batch = dataclasses.replace(batch, weights=batch.weights / batch.weights.mean())
    network = Constant(torch.zeros_like(batch.clean))
    OBJECTIVES["weighted"](network, Task(Flow(), Plan()), batch).backward()
    plain = torch.zeros_like(batch.clean).requires_grad_()
    target = (batch.clean - batch.denoised) / Flow().posterior_variance(0.9) ** 0.5
    (batch.weights.view(-1, 1, 1, 1) * (target - plain).square()).mean().backward()
    assert network.value.grad.var() < 0.7 * plain.grad.var()


@pytest.mark.parametrize(
    ("objective", "right"), [("potential", True), ("potential_square", True), ("potential_log", False)]
)
def test_potentials_are_least_at_the_log_of_the_mean_weight(objective, right, monkeypatch):
    """All but `potential_log`, which is least at the mean of the log."""
    for name, compared in objectives.COMPARED.items():
        monkeypatch.setitem(OBJECTIVES, name, compared)
    batch, _ = batch_at(Flow(), 0.7, count=50_000)
    minimum = batch.weights.mean().log() if right else batch.weights.log().mean()
    network = Constant(minimum.clone())
    OBJECTIVES[objective](network, Task(Flow(), Plan(objective=objective, form="potential")), batch).backward()
    assert float(network.value.grad) == pytest.approx(0, abs=1e-6)


def test_a_potential_learns_to_predict_the_denoised_estimate():
    """The D of a mixture, while the labels hold no information."""
    clean = MIXTURE.sample(4000, generator()).float().view(-1, 2, 1, 1)
    denoise = lambda x, sigma, _: MIXTURE.denoised(x.flatten(1).double(), Flow(), sigma).view_as(x).to(x)  # noqa: E731
    source = LivePairs(clean, torch.ones(4000), Flow(), denoise, lambda time: time.clamp(0.01, 0.99))
    plan = Plan("potential", "potential", 400, batch=128, ema=0.97)
    network = fit(Training(source, Task(Flow(), plan), dataclasses.replace(TINY, width=32, inputs=1, scalar=True)))
    batch = source.batch(1000, (1, 2))
    unit = Flow().unit(batch.x, batch.sigma.view(-1, 1, 1, 1))
    value, denoised = network((unit,), Flow().angle(batch.sigma), batch.text, with_denoised=True)
    assert value.abs().mean() < 0.05
    assert (denoised - batch.denoised).square().mean() < 0.1 * batch.denoised.square().mean()


def test_the_reward_gradient_objective_is_least_at_the_tilt_of_a_linear_reward():
    """-t·(D + sG)/β + |G|²/2 is least at G = s·t/β, the exact tilt of Gaussian data of unit variance."""
    batch, _ = batch_at(Diffusion(), 0.8, count=1)
    std = Diffusion().posterior_variance(0.8) ** 0.5
    network = Constant((std * TILT / 0.5).view(1, 2, 1, 1))
    task = Task(
        Diffusion(), Plan(objective="reward_gradient", temperature=0.5), lambda latents, _: latents.flatten(1) @ TILT
    )
    OBJECTIVES["reward_gradient"](network, task, batch).backward()
    assert network.value.grad.abs().max() < 1e-9


def test_reward_gradient_without_a_reward_is_refused():
    batch, _ = batch_at(Diffusion(), 0.8, count=2)
    with pytest.raises(GuidanceError, match="needs the reward itself"):
        OBJECTIVES["reward_gradient"](
            Constant(torch.zeros(1, 2, 1, 1)), Task(Diffusion(), Plan(objective="reward_gradient")), batch
        )


def test_a_gradient_in_parts_is_that_of_all_at_once():
    points = torch.randn(5, 2, 3, 3, generator=generator(), dtype=torch.float64).requires_grad_()
    weights = torch.arange(5.0, dtype=torch.float64)
    seen = []

    def reward(some, part):
        seen.append(len(some))
        return weights[part] * some.pow(3).flatten(1).sum(1)

    def gone_back(scores):
        (gradient,) = torch.autograd.grad((scores * (1 + weights)).sum(), points)
        return scores, gradient

    whole, parts = gone_back(reward(2 * points, slice(None))), gone_back(in_chunks(reward, 2 * points, 2))
    assert seen == [5, 2, 2, 1]
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=0)
    with torch.no_grad():
        assert torch.equal(in_chunks(reward, 2 * points, 2), whole[0])
    assert not in_chunks(lambda some, part: torch.zeros(len(some)), points, 2).requires_grad


@pytest.mark.parametrize(
    "options", [{"objective": "luck"}, {"form": "luck"}, {"objective": "potential"}, {"form": "potential"}]
)
def test_plans_that_do_not_fit_together_are_refused(options):
    with pytest.raises(GuidanceError, match="Known objectives|does not train"):
        Plan(**options)


def source(seed: int = 0, count: int = 2000) -> LivePairs:
    clean = MIXTURE.sample(count, generator(seed)).float()
    weights, _ = label(clean @ TILT.float(), torch.zeros(count), 1.0)

    def denoise(x: torch.Tensor, sigma: torch.Tensor, text: Text) -> torch.Tensor:
        return x / (1 + sigma.view(-1, 1, 1, 1) ** 2)

    return LivePairs(clean.view(-1, 2, 1, 1), weights, Flow(), denoise, lambda time: 0.02 + 0.96 * time)


def training(steps: int = 30, seed: int = 0, **options) -> Training:
    return Training(
        source(),
        Task(Flow(), Plan(steps=steps, batch=32, check_every=10, seed=seed)),
        TINY,
        held_out=source(1, 500),
        **options,
    )


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


def test_training_is_repeatable_and_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    first, drawn = fit(training()), torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))
    assert same(first, fit(training())) and not same(first, fit(training(seed=1)))


def test_a_killed_training_goes_on_bit_for_bit(tmp_path):
    whole = training()
    expected = fit(whole)
    for progress in training(checkpoint=tmp_path / "net.checkpoint"):
        if progress.step == 17:
            break
    resumed = training(checkpoint=tmp_path / "net.checkpoint")
    assert resumed.step == 10
    assert same(expected, fit(resumed)) and resumed.curve == whole.curve


def test_a_checkpoint_of_another_plan_is_refused(tmp_path):
    for _ in training(checkpoint=tmp_path / "net.checkpoint"):
        pass
    with pytest.raises(GuidanceError, match="other settings"):
        training(steps=40, checkpoint=tmp_path / "net.checkpoint")


def test_the_best_network_is_kept():
    run = training(steps=60)
    marked = [progress.step for progress in run if progress.best]
    assert run.curve[0][0] == 10 and marked[0] == 10
    best = min(run.curve, key=lambda point: point[1])[0]
    assert marked[-1] == best


def test_training_learns():
    run = training(steps=300)
    fit(run)
    assert min(value for _, value in run.curve) < -0.01
