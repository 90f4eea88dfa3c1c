"""The published files: their full key sets, on the meta device, and how they are packed."""

import re
from collections import OrderedDict
from pathlib import Path

import open_clip
import pytest
import torch
import transformers
from reward_guidance.guidance.rewards import (
    AestheticReward,
    ClipReward,
    CombinedReward,
    ImageReward,
    ImageStatistic,
    LoadOptions,
    aesthetic,
    evaluate,
    evaluate_unchecked,
    loading,
)
from reward_guidance.guidance.rewards.clip import preprocess
from reward_guidance.guidance.rewards.files import Weights
from reward_guidance.tests.standins.published import PUBLISHED
from reward_guidance.tests.standins.rewards import save_image_reward, tokens
from reward_guidance.tests.unit.shared import PROMPTS


def load(name, path, **weights):
    return loading.build_reward(Weights(Path(path), PUBLISHED[name].state(), **weights), LoadOptions())


def shapes_of(module):
    return {key: list(tensor.shape) for key, tensor in module.state_dict().items()}


@pytest.mark.parametrize("published", PUBLISHED.values(), ids=PUBLISHED)
def test_lists_are_as_large_as_the_files(published):
    elements = sum(torch.Size(shape).numel() for key, shape in published.shapes.items())
    assert elements * published.element_size == pytest.approx(published.file_size, rel=5e-3)


@pytest.mark.parametrize(("version", "mean"), [("HPS_v2_compressed", 0.275), ("HPS_v2.1_compressed", 0.285)])
def test_hps(version, mean):
    reward = load("HPS", f"{version}.pt", wrapper=("state_dict",))
    assert isinstance(reward, ClipReward)
    assert (reward.scale, reward.reference_mean, reward.kind.whole) == (1, mean, True)
    assert shapes_of(reward.model) == PUBLISHED["HPS"].shapes
    assert reward.model.visual.conv1.weight.dtype == torch.float16


def test_pickscore():
    reward = load("PickScore", "PickScore_v1.safetensors")
    assert shapes_of(reward.model) == PUBLISHED["HPS"].shapes  # it is the same ViT-H/14
    assert reward.reference_mean / reward.scale == pytest.approx(0.215)
    blocks = reward.model.visual.transformer.resblocks[0], reward.model.transformer.resblocks[0]
    assert [block.attn.num_heads for block in blocks] == [16, 16]
    assert all(isinstance(block.mlp.gelu, torch.nn.GELU) for block in blocks)


def test_image_reward(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{i}" for i in range(30522 - 5))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    reward = load("ImageReward", tmp_path / "ImageReward.pt")
    assert isinstance(reward, ImageReward)
    encoders = {
        key.removeprefix("blip."): shape
        for key, shape in PUBLISHED["ImageReward"].shapes.items()
        if re.match(r"blip\.\w+_encoder\.", key)
    }
    del encoders["text_encoder.embeddings.position_ids"]
    assert {key: shape for key, shape in shapes_of(reward).items() if key not in ("weight", "bias")} == encoders
    assert reward.visual_encoder.patch_embed.img_size == (224, 224)
    assert reward.visual_encoder.blocks[0].attn.num_heads == 16
    assert reward.text_encoder.encoder.layer[0].crossattention.self.num_attention_heads == 12


@pytest.mark.parametrize("name", ["HPS", "PickScore", "ImageReward"])
def test_no_score_waits_for_the_device(tmp_path, monkeypatch, name):
    """Of tensors on the meta device no number can be read, as none is from a GPU without waiting for it."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{i}" for i in range(30522 - 5))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    reward = load(name, tmp_path / f"{name}.pt", wrapper=("state_dict",) if name == "HPS" else ())
    monkeypatch.setattr(ClipReward, "text_features", lambda self, prompts: torch.zeros(len(prompts), 1024))
    pixels = torch.empty(2, 3, 96, 64, device="meta", requires_grad=True)
    scores = evaluate_unchecked(
        CombinedReward([reward, ImageStatistic("sharpness"), ImageStatistic("saturation")], [1, 1, 1]), pixels, PROMPTS
    )
    (gradient,) = torch.autograd.grad(scores.sum(), pixels)
    assert gradient.shape == pixels.shape
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        evaluate(reward, pixels, PROMPTS)


def test_aesthetic_head_on_openais_tower(monkeypatch):
    """openai/clip-vit-large-patch14, whose sizes are transformers' defaults but for the two towers' widths and depths."""
    vision = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
    }
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    with torch.device("meta"):
        clip = transformers.CLIPModel(
            transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=768)
        ).state_dict()
    tower = Weights(Path("model.safetensors"), clip)
    monkeypatch.setattr(aesthetic, "read", lambda file: tower)
    monkeypatch.setattr(aesthetic, "find", lambda folders, fits: tower.path if fits(tower.path, tower.shapes) else None)
    reward = load("aesthetic", "sac+logos+ava1-l14-linearMSE.pth")
    assert isinstance(reward, AestheticReward)
    assert (list(reward.weight.shape), reward.tower.image_size) == ([768], (224, 224))
    assert isinstance(reward.tower.transformer.resblocks[0].mlp.gelu, open_clip.transformer.QuickGELU)


def thin_h14():
    """As wide as H/14, by which it is told, but with one layer."""
    torch.manual_seed(0)
    vision = open_clip.model.CLIPVisionCfg(
        layers=1, width=1280, head_width=80, patch_size=14, image_size=28, mlp_ratio=0.05
    )
    return (
        open_clip.model.CLIP(16, vision, open_clip.model.CLIPTextCfg(context_length=12, width=64, heads=1, layers=1))
        .eval()
        .requires_grad_(False)
    )


@pytest.mark.parametrize("name", ["HPS_v2.1_compressed.pt", "renamed.pt"])
def test_hps_as_its_authors_pack_it(tmp_path, name):
    model = thin_h14()
    torch.save(
        {"state_dict": OrderedDict((key, tensor.half()) for key, tensor in model.state_dict().items())}, tmp_path / name
    )
    reward = loading.load_reward(tmp_path / name, LoadOptions(precision=lambda stored: torch.float32))
    pixels = torch.rand(2, 3, 40, 31)
    features = (
        model.encode_image(preprocess(pixels, 28, whole=True), normalize=True),
        model.encode_text(tokens(PROMPTS), normalize=True),
    )
    assert reward(pixels, PROMPTS) == pytest.approx((features[0] * features[1]).sum(1), abs=2e-3)
    assert reward.reference_std == 0.03


def test_the_full_checkpoint_of_hps_is_refused_because_of_numpys_numbers(tmp_path):
    """HPS_v2.pt, which holds its optimizer; 'use a safetensors version' is good advice, the compressed one better."""
    import numpy

    torch.save({"state_dict": {}, "metric": numpy.float64(0.8)}, tmp_path / "HPS_v2.pt")
    with pytest.raises(loading.RewardError, match=r"HPS_v2.pt contains code \(numpy.*scalar\), which is not run"):
        loading.load_reward(tmp_path / "HPS_v2.pt")


def test_image_reward_as_its_authors_pack_it(tmp_path):
    """A bare state dict in single precision; the file made here is safetensors, so it is packed anew."""
    from safetensors.torch import load_file

    reference = save_image_reward(tmp_path / "tiny.safetensors")
    torch.save(OrderedDict(load_file(tmp_path / "tiny.safetensors")), tmp_path / "ImageReward.pt")
    (tmp_path / "tiny.safetensors").unlink()
    state = torch.load(tmp_path / "ImageReward.pt", weights_only=True)
    reward = loading.build_reward(
        Weights(tmp_path / "ImageReward.pt", state, {"vision_heads": "2", "text_heads": "3"}), LoadOptions()
    )
    pixels = torch.rand(2, 3, 24, 24)
    assert reward(pixels, PROMPTS) == pytest.approx(reference(preprocess(pixels, 24), PROMPTS), abs=1e-4)
