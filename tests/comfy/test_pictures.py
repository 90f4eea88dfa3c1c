"""What nodes make of pictures and precisions, inside this process."""

import sys
from dataclasses import replace

import pytest
from reward_guidance.tests.harness.inprocess import load_comfyui

load_comfyui()

import comfy.model_management
import folder_paths
import torch
from reward_guidance.guidance.errors import GuidanceError
from reward_guidance.guidance.rewards import CombinedReward, ImageStatistic, Reward, load_reward
from reward_guidance.nodes.wiring import folders, memory, public
from reward_guidance.nodes.wiring.captions import SMALLEST, Line, caption
from reward_guidance.nodes.wiring.loaded import LoadedReward, manage_reward
from reward_guidance.nodes.wiring.scoring import MOST_PICTURES, score_images, score_parts, to_pixels
from reward_guidance.tests.standins.rewards import save_open_clip


@pytest.mark.parametrize(("channels", "expected"), [(1, [0, 0, 0]), (2, [0, 0, 0]), (3, [0, 1, 2]), (4, [0, 1, 2])])
def test_grey_and_transparent_pictures(channels, expected):
    images = torch.arange(float(channels)).expand(2, 5, 7, channels)
    assert to_pixels(images).shape == (2, 3, 5, 7)
    assert to_pixels(images)[0, :, 0, 0].tolist() == expected


def test_an_empty_batch_is_refused():
    with pytest.raises(GuidanceError, match="There is no picture to score: the batch is empty"):
        score_images(torch.zeros(0, 8, 8, 3), LoadedReward(ImageStatistic("brightness")), "")


@pytest.mark.parametrize("size", [(0, 8), (8, 0)])
def test_pictures_without_a_pixel_are_refused(size):
    with pytest.raises(GuidanceError, match="brightness scores pictures of shape"):
        score_images(torch.zeros(2, *size, 3), LoadedReward(ImageStatistic("brightness")), "")


class Counting(Reward):
    """Mean brightness; remembers how many pictures came at once."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, pixels, prompts):
        self.seen.append(len(pixels))
        return pixels.mean((1, 2, 3))


@pytest.mark.parametrize(("size", "at_once"), [((8, 8), MOST_PICTURES), ((2048, 4096), 2), ((8192, 4096), 1)])
def test_many_and_large_pictures_are_scored_in_turns(size, at_once):
    counting = Counting()
    images = torch.rand(10, 1, 1, 3).expand(10, *size, 3)
    with torch.inference_mode():
        scores = score_images(images, LoadedReward(counting), "")
    assert max(counting.seen) == at_once
    assert scores == pytest.approx(images[:, 0, 0].mean(1), abs=1e-4)


def test_an_8k_picture_is_scored_by_a_clip(tmp_path):
    save_open_clip(tmp_path / "clip.safetensors")
    with torch.inference_mode():
        loaded = manage_reward(load_reward(tmp_path / "clip.safetensors"))
        assert score_images(torch.rand(1, 4320, 7680, 3), loaded, "a cat").isfinite().all()


@pytest.mark.parametrize("persistent", [True, False])
def test_a_reward_is_managed_for_whatever_tensors_it_has(persistent):
    """Of parameters, or of buffers alone."""
    reward = Counting()
    assert manage_reward(reward).patchers == ()
    reward.register_buffer("target", torch.ones(3), persistent)
    (patcher,) = manage_reward(reward).patchers
    assert patcher.model is reward
    patcher.partially_load(torch.device("meta"))
    assert reward.target.device.type == "meta"


@pytest.mark.parametrize("thing", [Counting, torch.nn.Linear(2, 2), None], ids=["class", "module", "nothing"])
def test_what_is_no_reward_is_not_managed(thing):
    with pytest.raises(GuidanceError, match="manage_reward takes a Reward, not .*; derive a class from Reward"):
        manage_reward(thing)


def test_a_reward_is_frozen_in_evaluation_mode():
    """As modules are made, the score of a picture would depend on the others of its batch."""
    reward = Counting()
    reward.norm = torch.nn.BatchNorm2d(3)
    manage_reward(reward)
    assert not any(module.training for module in reward.modules())
    assert not any(parameter.requires_grad for parameter in reward.parameters())


@pytest.mark.parametrize("spread", [0.0, -1.0, torch.inf, torch.nan])
def test_a_spread_that_is_none_is_refused(spread):
    reward = Counting()
    reward.reference_std = spread
    with pytest.raises(GuidanceError, match=f"reward has a reference_std of {spread}; it must be"):
        manage_reward(reward)


def test_parts_are_scored_once():
    first, second = Counting(), Counting()
    parts = score_parts(torch.rand(3, 8, 8, 3), LoadedReward(CombinedReward([first, second], [1, 2])), "")
    assert [len(scores) for _, scores in parts] == [3, 3, 3]
    assert (first.seen, second.seen) == ([3], [3])


def test_the_same_pictures_are_not_scored_again():
    counting, images = Counting(), torch.rand(3, 8, 8, 3)
    loaded = LoadedReward(counting)
    first = score_images(images, loaded, "")
    assert torch.equal(score_images(images, loaded, ""), first)
    assert counting.seen == [3]
    score_images(images, loaded, "another prompt")
    score_images(images.clone(), loaded, "")
    score_images(images, replace(loaded, reward=counting), "")
    assert counting.seen == [3] * 4
    assert len(loaded.scored) == 1
    del images
    assert len(loaded.scored) == 0


@pytest.mark.parametrize(
    ("wanted", "fast", "stored", "chosen"),
    [
        (None, True, torch.float16, torch.float16),
        (None, False, torch.float16, torch.float32),
        (None, True, torch.bfloat16, torch.bfloat16),
        (None, False, torch.bfloat16, torch.float32),
        (None, True, torch.float32, torch.float32),
        (None, True, torch.float64, torch.float32),
        (torch.float16, False, torch.float32, torch.float16),
        (torch.float32, True, torch.float16, torch.float32),
    ],
)
def test_precision(monkeypatch, wanted, fast, stored, chosen):
    for name in ("should_use_fp16", "should_use_bf16"):
        monkeypatch.setattr(comfy.model_management, name, lambda device: fast)
    assert memory.precision(wanted)(stored) == chosen


def test_extra_folders_of_rewards_are_kept(monkeypatch, tmp_path):
    """As extra_model_paths.yaml adds them, before the pack is imported."""
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", {**folder_paths.folder_names_and_paths})
    folder_paths.add_model_folder_path(folders.REWARDS, str(tmp_path))
    (tmp_path / "PickScore_v1").mkdir()
    for name in ("PickScore_v1/model.safetensors", "PickScore_v1/config.json", "readme.txt", "ImageReward.pt"):
        (tmp_path / name).touch()
    folders.register_folder()
    assert folders.reward_names()[:2] == ["ImageReward.pt", "PickScore_v1/model.safetensors"]
    assert folders.reward_path("ImageReward.pt") == str(tmp_path / "ImageReward.pt")


@pytest.mark.parametrize("size", [(1, 1), (1, 900), (900, 1), (64, 64), (512, 512), (2160, 3840)])
def test_captions_are_legible_at_any_size(size):
    height, width = size
    picture = torch.rand(1, height, width, 3)
    lines = [
        Line("1 · a name that is far too long for a small picture, " * 3, "+0.31"),
        Line("brightness | 猫", "0.4512 (-0.43)"),
    ]
    (sheet,) = caption(picture, [lines])
    wide = max(width, 256)
    assert sheet.shape[1] == wide
    assert sheet.shape[0] >= height + 2 * 1.4 * SMALLEST
    left = (wide - width) // 2
    assert torch.allclose(sheet[:height, left : left + width], picture[0], atol=1 / 254)
    words = (sheet[height:] > 0.5).all(-1)
    assert 0.005 < words.float().mean() < 0.3
    assert not words[:, :3].any()
    assert not words[:, -3:].any()


def test_other_packs_find_the_public_part_by_name(monkeypatch):
    monkeypatch.delitem(sys.modules, public.NAME)
    public.publish()
    module = sys.modules[public.NAME]
    assert (module.Reward, module.manage_reward) == (Reward, manage_reward)
    assert not hasattr(module, "__path__")
    public.publish()
    assert sys.modules[public.NAME] is module
