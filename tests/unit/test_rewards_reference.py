"""Every reward that has weights, against the library it comes from: scores, gradients, preprocessing, precision and memory."""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import open_clip
import pytest
import skimage
import torch
import transformers
from PIL import Image
from reward_guidance.guidance.rewards import (
    CLIP_KINDS,
    AestheticReward,
    ClipReward,
    ImageReward,
    LoadOptions,
    Reward,
    clip,
    evaluate,
    image_reward,
    load_reward,
)
from reward_guidance.guidance.rewards.clip import preprocess
from reward_guidance.guidance.rewards.image_reward import find_vocabulary
from reward_guidance.tests.standins import rewards as standins
from reward_guidance.tests.unit.shared import PROMPTS
from timm.models.vision_transformer import VisionTransformer
from torch.profiler import ProfilerActivity, profile

PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png")


def as_stored(dtype):
    return dtype


@dataclass(frozen=True)
class Case:
    reward: Reward
    reference: standins.Reference
    size: int = standins.SIZE
    whole: bool = False

    def expected(self, pixels, prompts):
        return self.reference(preprocess(pixels, self.size, self.whole), prompts)


def one_file(name, save, folder, precision=as_stored, **case):
    reference = save(folder / name)
    return Case(load_reward(folder / name, LoadOptions(precision=precision)), reference, **case)


def two_towers(folder, precision=as_stored):
    """An image tower as in models/clip_vision and a text tower as in models/text_encoders."""
    vision, text = folder / "vision" / "clip_vision_l.safetensors", folder / "text" / "clip_l.safetensors"
    reference = standins.save_towers(vision, text)
    return Case(load_reward(vision, LoadOptions(text_folders=(text.parent,), precision=precision)), reference)


def aesthetic(folder, precision=as_stored):
    head, tower = (
        folder / "sac+logos+ava1-l14-linearMSE.pth",
        folder / "clip_vision" / "clip-vit-large-patch14.safetensors",
    )
    reference = standins.save_aesthetic(head, tower)
    return Case(load_reward(head, LoadOptions(image_folders=(tower.parent,), precision=precision)), reference, size=32)


CASES = {
    "open_clip": partial(one_file, "clip.safetensors", standins.save_open_clip),
    "open_clip, QuickGELU": partial(one_file, "clip.safetensors", partial(standins.save_open_clip, quick_gelu=True)),
    "transformers folder": partial(one_file, "clip", standins.save_transformers),
    "transformers folder, QuickGELU": partial(
        one_file, "clip", partial(standins.save_transformers, hidden_act="quick_gelu")
    ),
    "two towers": two_towers,
    "HPS": partial(one_file, "hps.safetensors", standins.save_hps, whole=True),
    "aesthetic": aesthetic,
    "ImageReward": partial(one_file, "ImageReward.safetensors", standins.save_image_reward),
}


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES.keys())
def make(request):
    return request.param


@pytest.fixture(scope="module")
def case(make, tmp_path_factory):
    return make(tmp_path_factory.mktemp("reward"))


def test_scores_and_gradients_equal_the_library(case):
    pixels = torch.rand(2, 3, 40, 31, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ours, theirs = case.reward(pixels, PROMPTS), case.expected(pixels, PROMPTS)
    assert ours.shape == (2,)
    assert (ours - theirs).abs().max() < 1e-4
    our_gradient, their_gradient = (torch.autograd.grad(scores.sum(), pixels)[0] for scores in (ours, theirs))
    assert their_gradient.norm() > 1e-3
    assert (our_gradient - their_gradient).norm() < 1e-4 * their_gradient.norm()


def test_gradient_equals_finite_differences(case):
    pixels = torch.rand(1, 3, case.size, case.size, generator=torch.Generator().manual_seed(1)).requires_grad_()
    (gradient,) = torch.autograd.grad(case.reward(pixels, PROMPTS[:1]), pixels)
    step = 0.02 * gradient / gradient.norm()
    with torch.no_grad():
        difference = (case.reward(pixels + step, PROMPTS[:1]) - case.reward(pixels - step, PROMPTS[:1])) / 2
    assert (gradient * step).sum().item() == pytest.approx(difference.item(), rel=1e-2)


def test_each_picture_is_scored_for_itself(case):
    pixels = torch.rand(3, 3, 33, 45)
    together = evaluate(case.reward, pixels, "a red circle")
    alone = torch.cat([evaluate(case.reward, pixels[i : i + 1], "a red circle") for i in range(3)])
    assert together == pytest.approx(alone, abs=1e-4)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 0.25), (torch.float16, 0.03)], ids=["bfloat16", "float16"]
)
def test_half_precision_towers_score_in_float32(make, case, tmp_path, dtype, tolerance):
    """Tolerances are in units of the reward's spread."""
    half = make(tmp_path, precision=lambda stored: dtype).reward
    pixels = torch.rand(2, 3, 40, 31, generator=torch.Generator().manual_seed(0)).requires_grad_()
    scores, exact = half(pixels, PROMPTS), case.reward(pixels, PROMPTS)
    assert scores.dtype == torch.float32
    assert (scores - exact).abs().max() < tolerance * case.reward.reference_std
    gradient, exact_gradient = (torch.autograd.grad(each.sum(), pixels)[0] for each in (scores, exact))
    assert torch.cosine_similarity(gradient.flatten(), exact_gradient.flatten(), dim=0) > 0.98


def proportioned_clip():
    """Of H/14 all but the width and the depth."""
    torch.manual_seed(0)
    vision = open_clip.model.CLIPVisionCfg(layers=8, width=320, head_width=80, patch_size=14, image_size=224)
    text = open_clip.model.CLIPTextCfg(context_length=8, width=8, heads=1, layers=1)
    return ClipReward(open_clip.model.CLIP(64, vision, text).eval().requires_grad_(False))


def proportioned_image_reward(folder):
    torch.manual_seed(0)
    vision = VisionTransformer(224, 16, num_classes=0, global_pool="", embed_dim=256, depth=8, num_heads=4)
    config = transformers.BlipTextConfig(
        vocab_size=len(standins.WORDS) + 2,
        hidden_size=192,
        num_hidden_layers=8,
        num_attention_heads=3,
        intermediate_size=768,
        encoder_hidden_size=256,
        initializer_range=0.04,
    )
    text = transformers.BlipTextModel(config, add_pooling_layer=False)
    for encoder in (vision, text):
        encoder.eval().requires_grad_(False)
    standins.save_vocabulary(folder)
    return ImageReward(vision, text, torch.ones(192), torch.zeros(()), find_vocabulary(folder, len(standins.WORDS) + 2))


def peak(function):
    """Bytes: the most that `function` held at once, over what there was before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@pytest.mark.filterwarnings("ignore:.*Profiler clears events")
@pytest.mark.parametrize(
    "make", [lambda folder: proportioned_clip(), proportioned_image_reward], ids=["CLIP", "ImageReward"]
)
def test_declared_memory_is_what_scoring_with_a_graph_takes(make, tmp_path):
    reward, pixels = make(tmp_path), torch.rand(1, 3, 224, 224, requires_grad=True)

    def score():
        return torch.autograd.grad(reward(pixels, PROMPTS[:1]).sum(), pixels)

    score()  # remembers the prompt
    assert 0.7 < peak(score) / reward.activation_bytes < 1.1


def photograph(name):
    """As PIL reads it, and as pixels (1,3,H,W)."""
    path = Path(skimage.__file__).parent / "data" / name
    return Image.open(path).convert("RGB"), torch.from_numpy(skimage.io.imread(path)[..., :3].copy()).permute(2, 0, 1)[
        None
    ] / 255


def of_open_clip(resize_mode):
    return open_clip.transform.image_transform(224, is_train=False, resize_mode=resize_mode, fill_color=0)


def of_transformers(photo):
    return transformers.CLIPImageProcessorPil()(photo, return_tensors="pt").pixel_values[0]


@pytest.mark.parametrize("name", PHOTOGRAPHS)
@pytest.mark.parametrize(
    ("theirs", "options"),
    [
        (of_open_clip("shortest"), {}),
        (of_open_clip("longest"), {"whole": True}),
        (of_transformers, {"rounded": math.floor}),
    ],
    ids=["open_clip", "open_clip, whole", "transformers"],
)
def test_preprocessing_equals_pil_on_photographs(name, theirs, options):
    """CLIP's, which ImageReward and the aesthetic head share, that of HPS: the longest side, and black bars, and that of PickScore."""
    photo, pixels = photograph(name)
    difference = (preprocess(pixels, 224, **options)[0] - theirs(photo)).abs() * 255 * 0.27
    assert difference.mean() < 0.5
    assert difference.quantile(0.999) < 6


def random_clip(kind):
    """At the scale of the published ones."""

    def make(folder):
        model = proportioned_clip().model
        model.logit_scale.fill_(math.log(100))
        return ClipReward(model, CLIP_KINDS[kind])

    return make


def random_aesthetic(folder):
    torch.manual_seed(0)
    return AestheticReward(proportioned_clip().model.visual, torch.randn(64), torch.zeros(()))


def random_image_reward(folder):
    reward = proportioned_image_reward(folder)
    reward.weight.copy_(torch.randn(192, generator=torch.Generator().manual_seed(0)) / 5)
    return reward


ON_PHOTOGRAPHS = {
    "CLIP score": (random_clip("CLIP score"), of_open_clip("shortest"), 0.036),
    "PickScore": (random_clip("PickScore"), of_transformers, 0.036),
    "HPS v2.1": (random_clip("HPS v2.1"), of_open_clip("longest"), 0.0010),
    "LAION aesthetic": (random_aesthetic, of_open_clip("shortest"), 0.020),
    "ImageReward": (random_image_reward, of_open_clip("shortest"), 0.0136),
}
"""Random weights, the preprocessing that the reward was published with, and how far scores of the published weights differ between it and
ports to other libraries, which is how far ours may. Of CLIP there is no such number but PickScore's, which has the same scale."""


@pytest.mark.parametrize(("make", "theirs", "tolerance"), ON_PHOTOGRAPHS.values(), ids=ON_PHOTOGRAPHS)
def test_scores_of_photographs_equal_those_of_the_published_preprocessing(
    tmp_path, monkeypatch, make, theirs, tolerance
):
    """Only where photographs are told apart about as far as published rewards tell pictures apart do the tolerances mean something."""
    reward = make(tmp_path)
    photos, pixels = zip(*map(photograph, PHOTOGRAPHS), strict=True)
    with torch.no_grad():
        ours = torch.cat([reward(each, PROMPTS[:1]) for each in pixels])
        for module in (clip, image_reward):
            monkeypatch.setattr(module, "preprocess", lambda prepared, *_: prepared)
        expected = torch.cat([reward(theirs(photo)[None], PROMPTS[:1]) for photo in photos])
    assert expected.std() > 0.5 * reward.reference_std
    assert (ours - expected).abs().max() < tolerance
