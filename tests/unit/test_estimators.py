"""Estimators against closed forms of Gaussian mixtures, and what each setting promises."""

import pytest
import torch
from reward_guidance.guidance.errors import GuidanceError
from reward_guidance.guidance.estimators import ESTIMATORS, NotFiniteError, Settings, Smoothing, tilt_gradient
from reward_guidance.guidance.process import Diffusion, Flow
from reward_guidance.tests.standins.mixture import Mixture, energy_distance, resample
from reward_guidance.tests.unit.shared import generator

PLAIN = Smoothing(samples=0)
LEVELS = [(Flow(), 0.2), (Flow(), 0.9), (Diffusion(), 0.5), (Diffusion(), 8.0)]
CASES = [(dims, process, sigma) for dims in (2, 64) for process, sigma in LEVELS]


def setup(dims, process, sigma, seed=0):
    """A mixture, its denoiser at sigma, noised samples x (16,d), and a linear reward's direction."""
    g = generator(seed)
    mixture = Mixture.random(6, dims, g)
    x = process.add_noise(mixture.sample(16, g), torch.randn(16, dims, generator=g, dtype=torch.float64), sigma)
    direction = torch.randn(dims, generator=g, dtype=torch.float64)
    return mixture, lambda point: mixture.denoised(point, process, sigma), x, direction


def estimator(name, process, reward, **settings):
    return ESTIMATORS[name](
        process,
        reward,
        Settings(**{"smoothing": PLAIN, "cap": 1e9, "momentum": 0.0, "variance": 1.0, **settings}),
        generator(1),
    )


@pytest.mark.parametrize(("dims", "process", "sigma"), CASES)
@pytest.mark.parametrize("seed", range(3))
def test_shift_equals_the_closed_form_of_a_linear_tilt(dims, process, sigma, seed):
    mixture, denoise, x, direction = setup(dims, process, sigma, seed)
    temperature = 2.0
    exact = mixture.denoised(x, process, sigma, tilt=(direction / temperature).expand_as(x))
    linear = lambda point: point @ direction  # noqa: E731
    two_pass = estimator("shift_two_pass", process, linear, temperature=temperature)
    assert (two_pass(denoise, x, sigma) - exact).abs().max() < 1e-6
    lagged = estimator("shift", process, linear, temperature=temperature)
    assert torch.equal(lagged(denoise, x, sigma), denoise(x))
    assert (lagged(denoise, x, sigma) - exact).abs().max() < 1e-6


@pytest.mark.parametrize(("dims", "process", "sigma"), CASES)
def test_jacobian_equals_finite_differences(dims, process, sigma):
    _, denoise, x, direction = setup(dims, process, sigma)
    reward = lambda point: torch.sin(point @ direction)  # noqa: E731
    guided = estimator("jacobian", process, reward)(denoise, x, sigma)
    g = torch.cos(denoise(x) @ direction)[:, None] * direction
    step, columns = 1e-5, []
    for axis in torch.eye(dims, dtype=torch.float64):
        columns.append(((denoise(x + step * axis) - denoise(x - step * axis)) / (2 * step) * g).sum(1))
    expected = denoise(x) + process.shift_gain(sigma) * torch.stack(columns, 1)
    assert (guided - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize(("dims", "process", "sigma"), CASES)
def test_one_jacobian_within_another_adds_both_tilts(dims, process, sigma):
    _, denoise, x, direction = setup(dims, process, sigma)
    other = torch.randn(dims, generator=generator(7), dtype=torch.float64)
    inner, outer, both = (
        estimator("jacobian", process, lambda point, slope=slope: point @ slope)
        for slope in (direction, other, direction + other)
    )
    guided = outer(lambda point: inner(denoise, point, sigma), x, sigma)
    assert not guided.requires_grad
    assert torch.allclose(guided, both(denoise, x, sigma))


def test_denoised_adds_the_gradient_times_the_posterior_variance():
    _, denoise, x, direction = setup(2, Flow(), 0.5)
    guided = estimator("denoised", Flow(), lambda point: point @ direction, variance=2.0)(denoise, x, 0.5)
    assert torch.allclose(guided, denoise(x) + Flow().posterior_variance(0.5, 2.0) * direction)


def test_lagged_gradient_is_taken_at_the_untilted_estimate():
    mixture = Mixture(torch.zeros(1, 2, dtype=torch.float64), 1.0, torch.zeros(1, dtype=torch.float64))
    seen = []

    def reward(point):
        seen.append(point.detach().clone())
        return point.sum(1)

    lagged = estimator("shift", Flow(), reward)
    denoise = lambda point: mixture.denoised(point, Flow(), 0.5)  # noqa: E731
    x = torch.randn(4, 2, generator=generator(), dtype=torch.float64)
    lagged(denoise, x, 0.5)
    lagged(denoise, x, 0.5)
    assert torch.allclose(seen[1], denoise(x)), "for Gaussian data untilting is exact"


def test_shift_calls_the_model_once_and_two_pass_twice():
    _, denoise, x, direction = setup(2, Flow(), 0.5)
    for name, expected in {"shift": 1, "denoised": 1, "jacobian": 1, "shift_two_pass": 2}.items():
        calls = []

        def counted(point, calls=calls):
            calls.append(1)
            return denoise(point)

        one = estimator(name, Flow(), lambda point: point @ direction)
        for _ in range(3):
            one(counted, x, 0.5)
        assert len(calls) == 3 * expected


@pytest.mark.parametrize("name", ESTIMATORS)
def test_pure_noise_is_watched_not_guided(name):
    _, denoise, x, direction = setup(2, Flow(), 0.5)
    one = estimator(name, Flow(), lambda point: point @ direction)
    assert torch.equal(one(denoise, x, 1.0), denoise(x))
    assert one.tilt.gradient is not None


@pytest.mark.parametrize("process", [Flow(), Diffusion()])
@pytest.mark.parametrize("sigma", [0.05, 0.5, 0.95])
def test_cap_bounds_the_shift_of_each_sample(process, sigma):
    moved = []
    weak_and_strong = torch.tensor([[1e-6], [1e6]], dtype=torch.float64)
    one = estimator("shift", process, lambda point: (weak_and_strong * point).sum(1), cap=2.0)
    x = torch.zeros(2, 5, dtype=torch.float64)
    for _ in range(2):
        one(lambda point: moved.append(point - x) or point, x, sigma)
    rms = moved[1].pow(2).mean(1).sqrt()
    assert rms[1] == pytest.approx(2.0 * process.noise_std(sigma))
    assert rms[0] == pytest.approx(1e-6 * process.shift_gain(sigma))


LEVELS = (0.9, 0.8, 0.6, 0.5, 0.2, 0.1)


def shifts(rewards, levels=LEVELS, name="shift", dtype=torch.float64, **settings):
    """What x is moved by in units of the noise (levels,B), for constant slopes of 1 and rewards (B,) whatever the estimate; as long as the cap."""
    moved, level = [], torch.tensor(rewards, dtype=dtype)
    one = estimator(
        name, Flow(), lambda point: level + (point - point.detach()).sum(1), strength=100.0, cap=0.5, **settings
    )
    x = torch.zeros(len(rewards), 3, dtype=torch.float64)
    for sigma in (levels[0], *levels):
        one(lambda point, sigma=sigma: moved.append((point - x)[:, 0] / sigma) or point, x, sigma)
    return torch.stack(moved[1:])


def test_a_target_that_is_far_changes_nothing():
    rewards = [-3.0, 0.0]
    assert torch.allclose(shifts(rewards), shifts(rewards, target=5.0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_shift_that_reached_its_target_fades_with_the_noise(dtype):
    missed, half, reached = shifts([-1.0, 0.3, 2.0], target=0.8, dtype=dtype).unbind(1)
    assert torch.allclose(missed, missed[0].expand(len(LEVELS)))
    angles = Flow().angle(torch.tensor(LEVELS, dtype=torch.float64))
    assert torch.allclose(reached, 0.3 * missed * (3 * (angles - angles[0])).exp())
    assert (missed > half).all() and (half > reached).all()


@pytest.mark.parametrize("every", [1, 3])
def test_it_fades_alike_however_often_the_model_is_asked(every):
    twice = shifts([2.0], [level for level in LEVELS for _ in range(2)], target=0.8, every=every)
    assert torch.equal(twice[1::2], shifts([2.0], target=0.8))


def test_every_reuses_and_momentum_blends_gradients():
    calls = []

    def reward(point):
        calls.append(1)
        return len(calls) * point.sum(1)

    x = torch.zeros(1, 3, dtype=torch.float64)
    one = estimator("denoised", Flow(), reward, every=3)
    for _ in range(7):
        one(lambda point: point, x, 0.5)
    assert len(calls) == 3
    calls.clear()
    one = estimator("denoised", Flow(), reward, momentum=0.5)
    for expected in (1.0, 1.5, 2.25):
        one(lambda point: point, x, 0.5)
        assert one.tilt.gradient.flatten().tolist() == pytest.approx([expected] * 3)


def test_two_passes_ask_twice_only_where_a_gradient_is_due():
    _, denoise, x, direction = setup(2, Flow(), 0.5)
    asked = []
    one = estimator("shift_two_pass", Flow(), lambda point: point @ direction, every=3)
    for _ in range(7):
        one(lambda point: asked.append(1) or denoise(point), x, 0.5)
    assert len(asked) == 7 + 3


def test_smoothed_gradient_is_the_gradient_of_the_log_mean_exponential():
    g = generator()
    point = torch.randn(2, 3, generator=g, dtype=torch.float64)
    offsets = [torch.randn(2, 3, generator=g, dtype=torch.float64) for _ in range(5)]
    reward = lambda p: torch.sin(3 * p[:, 0]) - p.pow(2).sum(1)  # noqa: E731
    value = lambda p: 0.7 * (torch.stack([reward(p + o) for o in offsets]) / 0.7).exp().mean(0).log()  # noqa: E731
    gradient, scores = tilt_gradient(reward, point, offsets, 0.7)
    variable = point.clone().requires_grad_()
    (expected,) = torch.autograd.grad(value(variable).sum(), variable)
    assert torch.allclose(gradient, expected / 0.7)
    assert torch.allclose(scores, value(point))


def test_low_pass_noise_has_unit_variance_and_no_fine_detail():
    noise = Smoothing(1, 1.0, grid=4).noise(torch.zeros(2, 16, 32, 32), generator())
    assert noise.std() == pytest.approx(1.0, abs=0.01)
    fine = noise.diff(dim=-1).pow(2).mean()
    assert fine < 0.1, "neighbours are nearly alike; white noise has 2"
    video = Smoothing(1, 1.0, grid=4).noise(torch.zeros(1, 16, 5, 32, 32), generator())
    assert video.shape == (1, 16, 5, 32, 32)


def test_private_generator_leaves_the_global_one_alone():
    torch.manual_seed(3)
    expected = torch.randn(4)
    torch.manual_seed(3)
    Smoothing(4).offsets(torch.zeros(1, 4, 16, 16), 1.0, generator())
    assert torch.equal(torch.randn(4), expected)


NAN, INFINITY = float("nan"), float("inf")
NONSENSE = {
    "temperature": (0.0, -1.0, NAN),
    "every": (0,),
    "momentum": (1.0, -0.1, NAN),
    "cap": (-1.0, NAN, INFINITY),
    "strength": (-1.0, NAN, INFINITY),
    "variance": (-1.0, NAN),
    "target": (NAN,),
}


@pytest.mark.parametrize("broken", [{name: value} for name, values in NONSENSE.items() for value in values], ids=str)
def test_settings_refuse_what_makes_no_sense(broken):
    with pytest.raises(GuidanceError, match="gradient" if "every" in broken else next(iter(broken))):
        Settings(**broken)


@pytest.mark.parametrize(
    "broken", [{"samples": -1}, {"radius": -0.1}, {"radius": NAN}, {"radius": INFINITY}, {"grid": -1}], ids=str
)
def test_smoothing_refuses_what_makes_no_sense(broken):
    with pytest.raises(GuidanceError):
        Smoothing(**broken)


@pytest.mark.parametrize("reward", [lambda p: p.detach().sum(1), lambda p: (p - p).sqrt().sum(1)])
def test_rewards_without_a_usable_gradient_are_refused(reward):
    with pytest.raises(GuidanceError):
        estimator("denoised", Flow(), reward)(lambda point: point, torch.ones(1, 2), 0.5)


CENTRE = torch.tensor([1.2, 0.9], dtype=torch.float64)


def ring_reward(point):
    return -0.6 * (point - CENTRE).pow(2).sum(1) + 0.5 * torch.sin(3 * point[:, 0])


def sample_ring(ring, seed, guide=None, count=2000, steps=20):
    """Euler steps of a shift-3 flow."""
    x = torch.randn(count, 2, generator=generator(seed), dtype=torch.float64)
    time = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    sigmas = (3 * time / (1 + 2 * time)).tolist()
    for sigma, lower in zip(sigmas, sigmas[1:], strict=False):
        denoise = lambda point, sigma=sigma: ring.denoised(point, Flow(), sigma)  # noqa: E731
        denoised = guide(denoise, x, sigma) if guide else denoise(x)
        x = x + (lower - sigma) * (x - denoised) / sigma
    return x


@pytest.mark.parametrize("seed", range(3))
def test_guidance_samples_the_reward_weighted_ring(seed):
    ring = Mixture.ring(radius=1.5, std=0.15)
    g = generator(seed + 50)
    candidates = ring.sample(100_000, g)
    truth = resample(candidates, ring_reward(candidates), 2000, g)
    settings = {"smoothing": Smoothing(4, 1.0, grid=0), "variance": 1.15, "cap": 8.0}
    assert energy_distance(sample_ring(ring, seed), truth) > 0.5
    for name in ("shift", "jacobian"):
        guided = sample_ring(ring, seed, estimator(name, Flow(), ring_reward, **settings))
        assert energy_distance(guided, truth) < 0.03


@pytest.mark.parametrize("samples", [0, 4])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_step_waits_for_the_device_only_at_its_end(name, samples):
    """Of tensors on the meta device no number can be read, as none is from a GPU without waiting for it."""
    pending = []
    watching = estimator(
        name,
        Flow(),
        lambda point: point.square().flatten(1).mean(1),
        smoothing=Smoothing(samples),
        momentum=0.5,
        cap=1.0,
    )
    watching.tilt.check_pending = lambda: pending.append(watching.tilt.pending)
    for sigma in (0.9, 0.6):
        assert watching(lambda point: 0.5 * point, torch.empty(2, 4, 8, 8, device="meta"), sigma).shape == (2, 4, 8, 8)
    assert [(each.device.type, each.shape) for each in pending] == [("meta", (3,))] * 2


@pytest.mark.parametrize("slope", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_gradient_that_is_not_finite_is_refused_within_its_step(name, slope):
    slopes = [1.0, slope]
    watching = estimator(name, Flow(), lambda point: (slopes[0] * point).sum(1))
    watching(lambda point: 0 * point, torch.zeros(2, 3), 0.9)
    assert watching.tilt.rewards.tolist() == [0, 0]
    slopes.pop(0)
    with pytest.raises(NotFiniteError, match="not a finite number"):
        watching(lambda point: 0 * point + 1, torch.zeros(2, 3), 0.8)


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.5}, {"target": 0.0}, {"every": 2}], ids=str)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_what_is_made_block_by_block_is_guided_as_each_block_alone(name, settings):
    """As samplers of long videos do: a block goes all the way from noise, then the next, the last of which may be shorter."""
    mixture, draw = Mixture.random(6, 8, generator()), generator(1)
    blocks = [
        torch.randn(4, 8, generator=draw, dtype=torch.float64),
        torch.randn(4, 8, generator=draw, dtype=torch.float64),
    ]
    blocks.append(torch.randn(2, 8, generator=draw, dtype=torch.float64))

    def run(one, x):
        for sigma, following in zip((*LEVELS, 0.0), (*LEVELS[1:], 0.0), strict=False):
            x = (
                x
                + (following - sigma)
                * (x - one(lambda point, s=sigma: mixture.denoised(point, Flow(), s), x, sigma))
                / sigma
            )
        return x

    make = lambda: estimator(name, Flow(), lambda point: point.sin().sum(1), **settings)  # noqa: E731
    together = make()
    for block in blocks:
        assert torch.equal(run(together, block), run(make(), block))


def test_a_climb_in_noise_keeps_the_gradient():
    """Restart sampling goes up and down again on the way: its samples stay what they are."""
    _, denoise, x, direction = setup(2, Flow(), 0.5)
    one = estimator("shift", Flow(), lambda point: point @ direction)
    for sigma in (0.8, 0.5, 0.7):
        guided = one(denoise, x, sigma)
    assert not torch.equal(guided, denoise(x))
