"""Image statistics and weightless likeness: gradients, invariances, and the reference values measured on photographs."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import skimage
import torch
import torch.nn.functional as F
from reward_guidance.guidance.rewards import (
    LIKENESSES,
    STATISTICS,
    ColourReward,
    ImageSimilarity,
    ImageStatistic,
    RewardError,
    evaluate,
)

PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png")


def photograph(name):
    pixels = skimage.io.imread(Path(skimage.__file__).parent / "data" / name)[..., :3]
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255


@pytest.fixture(scope="module")
def photographs():
    return [photograph(name) for name in PHOTOGRAPHS]


def quarters(picture):
    height, width = picture.shape[-2] // 2, picture.shape[-1] // 2
    return [
        picture[..., i * height :, j * width :][..., :height, :width] for i, j in itertools.product((0, 1), repeat=2)
    ]


def picture(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


REWARDS = {
    **{name: lambda name=name: ImageStatistic(name) for name in STATISTICS},
    "mean colour": lambda: ColourReward((0.9, 0.1, 0.2)),
    "every pixel": lambda: ColourReward((0.9, 0.1, 0.2), every_pixel=True),
    **{name: lambda name=name: ImageSimilarity(picture(1, 3, 20, 12, seed=5), name) for name in LIKENESSES},
}
each_reward = pytest.mark.parametrize("make", REWARDS.values(), ids=REWARDS.keys())


@each_reward
def test_gradient_equals_finite_differences(make):
    reward, pixels, direction = make(), picture(2, 3, 9, 7), picture(2, 3, 9, 7, seed=1) - 0.5
    pixels.requires_grad_()
    (gradient,) = torch.autograd.grad(reward(pixels, ["", ""]).sum(), pixels)
    h = 1e-5
    with torch.no_grad():
        difference = (reward(pixels + h * direction, ["", ""]) - reward(pixels - h * direction, ["", ""])).sum() / (
            2 * h
        )
    assert (gradient * direction).sum().item() == pytest.approx(difference.item(), rel=1e-5)
    assert (gradient.flatten(1).norm(dim=1) > 0).all()


@each_reward
@pytest.mark.parametrize("value", [0.0, 0.5, 1.0, -0.3, 1.7])
def test_flat_and_out_of_range_pictures_have_finite_gradients(make, value):
    pixels = torch.full((1, 3, 8, 8), value, requires_grad=True)
    score = make()(pixels, [""])
    (gradient,) = torch.autograd.grad(score.sum(), pixels)
    assert score.isfinite().all()
    assert gradient.isfinite().all()


@each_reward
def test_one_pixel_half_precision_and_batches(make):
    reward = make()
    assert evaluate(reward, torch.rand(1, 3, 1, 1), "").isfinite().all()
    pixels = picture(3, 3, 10, 10).float()
    scores = evaluate(reward, pixels, "")
    assert torch.allclose(scores[1:2], evaluate(reward, pixels[1:2], ""), atol=1e-6)
    assert torch.allclose(evaluate(reward, pixels.bfloat16(), ""), scores, atol=0.02)


@each_reward
def test_resolution_matters_little(make, photographs):
    reward = make()
    for photo in photographs[:2]:
        large = F.interpolate(photo, scale_factor=1.7, mode="bicubic")
        limit = 1.0 if reward.name == "sharpness" else 0.15
        assert abs(reward(photo, [""]) - reward(large, [""])) < limit * reward.reference_std


@pytest.mark.parametrize("name", STATISTICS)
def test_flips_change_nothing(name, photographs):
    reward = ImageStatistic(name)
    assert reward(photographs[0].flip(3), [""]).item() == pytest.approx(reward(photographs[0], [""]).item(), abs=1e-4)


def test_statistics_mean_what_they_say(photographs):
    photo = photographs[0]
    grey = photo.mean((1, 2, 3), keepdim=True)
    worse = {
        "brightness": photo * 0.8,
        "contrast": grey + 0.5 * (photo - grey),
        "saturation": photo.mean(1, keepdim=True).expand_as(photo),
        "sharpness": F.avg_pool2d(photo, 5, 1, 2),
    }
    for name, pixels in worse.items():
        assert ImageStatistic(name)(pixels, [""]) < ImageStatistic(name)(photo, [""])
    assert ImageStatistic("brightness")(photo + 0.1, [""]).item() == pytest.approx(
        ImageStatistic("brightness")(photo, [""]).item() + 0.1, abs=1e-5
    )
    assert ImageStatistic("contrast")(photo + 0.1, [""]).item() == pytest.approx(
        ImageStatistic("contrast")(photo, [""]).item(), abs=1e-5
    )


def test_colour_reward_is_highest_at_its_colour():
    red, blue = torch.zeros(2, 1, 3, 8, 8)
    red[:, 0], blue[:, 2] = 1, 1
    half = torch.cat([red[..., :4], blue[..., :4]], dim=3)
    for every_pixel in (False, True):
        reward = ColourReward((1, 0, 0), every_pixel)
        assert reward(red, [""]).item() == pytest.approx(0, abs=2e-3)
        assert reward(red, [""]) > reward(half, [""]) > reward(blue, [""])
    purple = ColourReward((0.5, 0, 0.5))
    assert purple(half, [""]).item() == pytest.approx(0, abs=2e-3)
    assert ColourReward((0.5, 0, 0.5), every_pixel=True)(half, [""]) < -0.1


def test_likeness_to_itself_is_the_highest(photographs):
    for likeness, best in (("colour", 0.0), ("structure", 1.0)):
        scores = torch.cat([ImageSimilarity(photographs[0], likeness)(photo, [""]) for photo in photographs])
        assert scores[0].item() == pytest.approx(best, abs=0.01)
        assert scores[1:].max() < scores[0] - 0.15
    structure = ImageSimilarity(photographs[0], "structure")
    assert structure(photographs[0] * 0.5 + 0.2, [""]).item() == pytest.approx(1, abs=0.01)


def assert_reference(scores, reward):
    assert np.mean(scores) == pytest.approx(reward.reference_mean, abs=0.2 * reward.reference_std)
    assert np.std(scores, ddof=1) == pytest.approx(reward.reference_std, rel=0.1)


@pytest.mark.parametrize("name", STATISTICS)
def test_reference_values_are_those_of_photographs(name, photographs):
    reward = ImageStatistic(name)
    pieces = (
        photographs if name == "sharpness" else [piece for photo in photographs for piece in (photo, *quarters(photo))]
    )
    assert_reference([reward(piece, [""]).item() for piece in pieces], reward)


@pytest.mark.parametrize("every_pixel", [False, True])
def test_colour_reference_values_are_those_of_photographs(every_pixel, photographs):
    pieces = [piece[..., ::4, ::4] for photo in photographs for piece in (photo, *quarters(photo))]
    rewards = [ColourReward(corner, every_pixel) for corner in itertools.product((0.0, 1.0), repeat=3)]
    scores = np.array([[reward(piece, [""]).item() for piece in pieces] for reward in rewards])
    assert scores.mean() == pytest.approx(rewards[0].reference_mean, abs=0.01)
    assert scores.std(1, ddof=1).mean() == pytest.approx(rewards[0].reference_std, rel=0.1)


@pytest.mark.parametrize("likeness", LIKENESSES)
def test_likeness_reference_values_are_those_of_photographs(likeness, photographs):
    pieces = [[piece[..., ::2, ::2] for piece in (photo, *quarters(photo))] for photo in photographs]
    pairs = [(a, b) for first, second in itertools.permutations(pieces, 2) for a in first[::2] for b in second[::2]]
    assert_reference(
        [ImageSimilarity(a, likeness)(b, [""]).item() for a, b in pairs], ImageSimilarity(photographs[0], likeness)
    )


def test_made_inside_inference_mode_still_has_gradients():
    with torch.inference_mode():
        rewards = [make() for make in REWARDS.values()]
    pixels = torch.rand(1, 3, 8, 8, requires_grad=True)
    for reward in rewards:
        (gradient,) = torch.autograd.grad(reward(pixels, [""]).sum(), pixels)
        assert gradient.norm() > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ImageStatistic("beauty"), "choose one of brightness"),
        (lambda: ColourReward((1, 0)), "three numbers from 0 to 1"),
        (lambda: ColourReward((255, 0, 0)), "three numbers from 0 to 1"),
        (lambda: ImageSimilarity(torch.rand(1, 3, 8, 8), "taste"), "choose one of colour"),
        (lambda: ImageSimilarity(torch.rand(1, 3, 8, 8), "x" * 10**6), "no image likeness called 'x{79}…; choose"),
        (lambda: ImageStatistic("x" * 10**6), "no image statistic called 'x{79}…;"),
        (lambda: ColourReward("abc"), "not 'abc'"),
        (lambda: ColourReward((None, 0.1, 0.2)), "three numbers from 0 to 1"),
        (lambda: ColourReward((float("nan"), 0.1, 0.2)), "three numbers from 0 to 1"),
        (lambda: ImageSimilarity(torch.rand(2, 3, 8, 8)), "one picture"),
        (lambda: ImageSimilarity(torch.full((1, 3, 8, 8), float("nan"))), "The reference picture has values"),
        (lambda: ImageSimilarity(torch.rand(3, 8, 8)), "one picture"),
    ],
)
def test_bad_arguments_are_said_in_a_sentence(make, message):
    with pytest.raises(RewardError, match=message) as refusal:
        make()
    assert len(str(refusal.value)) < 300
