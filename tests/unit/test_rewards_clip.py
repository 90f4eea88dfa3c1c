"""CLIP rewards against open_clip and transformers themselves, on small random weights in the published layouts."""

import itertools
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import skimage
import torch
import transformers
from PIL import Image
from reward_guidance.guidance.rewards import ClipImageSimilarity, RewardError, evaluate, load_reward
from reward_guidance.guidance.rewards.clip import preprocess
from reward_guidance.guidance.rewards.clip_checkpoint import build, infer_architecture, to_open_clip_layout
from safetensors.torch import save_file

PROMPTS = ["a large red circle on a blue ground", "two cats, 8k, masterpiece"]
PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png")


def tiny_open_clip(quick_gelu=False):
    torch.manual_seed(0)
    vision = open_clip.model.CLIPVisionCfg(layers=2, width=32, head_width=16, patch_size=8, image_size=24, mlp_ratio=2.0)
    text = open_clip.model.CLIPTextCfg(context_length=12, width=24, heads=3, layers=2)
    model = open_clip.model.CLIP(16, vision, text, quick_gelu=quick_gelu).eval()
    with torch.no_grad():
        model.token_embedding.weight.mul_(10)
    return model


def tiny_transformers(hidden_act="gelu"):
    torch.manual_seed(1)
    shared = {"num_hidden_layers": 2, "intermediate_size": 40, "hidden_act": hidden_act}
    vision = {"hidden_size": 32, "num_attention_heads": 2, "image_size": 24, "patch_size": 8, **shared}
    text = {"hidden_size": 24, "num_attention_heads": 3, "max_position_embeddings": 12, **shared}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()


HINTS = {"vision_heads": "2", "text_heads": "3"}


def open_clip_scores(model, pixels, prompts):
    tokens = open_clip.tokenizer.tokenize(prompts, context_length=12)
    image_logits, _ = model.get_logits(pixels, tokens)
    return image_logits.diag()


def transformers_scores(model, pixels, prompts):
    tokens = open_clip.tokenizer.tokenize(prompts, context_length=12)
    return model(input_ids=tokens, pixel_values=pixels).logits_per_image.diag()


def save_open_clip(path, quick_gelu=False):
    model = tiny_open_clip(quick_gelu)
    save_file(model.state_dict(), path, HINTS | {"quick_gelu": str(quick_gelu)})
    return model


def save_checkpoint(path):
    model = tiny_open_clip()
    torch.save({"epoch": 3, "state_dict": {f"module.{key}": value for key, value in model.state_dict().items()}}, path)
    return model


CASES = {
    "open_clip": ("tiny.safetensors", save_open_clip, open_clip_scores),
    "open_clip, QuickGELU": ("tiny.safetensors", lambda path: save_open_clip(path, quick_gelu=True), open_clip_scores),
    "transformers folder": ("tiny", lambda path: saved_folder(path, "gelu"), transformers_scores),
    "transformers folder, QuickGELU": ("tiny", lambda path: saved_folder(path, "quick_gelu"), transformers_scores),
}


def saved_folder(path, hidden_act):
    model = tiny_transformers(hidden_act)
    model.save_pretrained(path)
    return model


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES.keys())
def loaded_and_reference(request, tmp_path_factory):
    name, save, scores = request.param
    path = tmp_path_factory.mktemp("reward") / name
    model = save(path)
    return load_reward(path), lambda pixels, prompts: scores(model, preprocess(pixels, 24), prompts)


def test_scores_and_gradients_equal_the_library(loaded_and_reference):
    reward, reference = loaded_and_reference
    pixels = torch.rand(2, 3, 40, 31, requires_grad=True)
    ours, theirs = reward(pixels, PROMPTS), reference(pixels, PROMPTS)
    assert torch.allclose(ours, theirs, atol=1e-4)
    assert ours.std() > 1e-3
    (our_gradient,) = torch.autograd.grad(ours.sum(), pixels)
    (their_gradient,) = torch.autograd.grad(theirs.sum(), pixels)
    assert (our_gradient - their_gradient).norm() < 1e-4 * their_gradient.norm()


def test_gradient_equals_finite_differences(loaded_and_reference):
    reward, _ = loaded_and_reference
    pixels = torch.rand(1, 3, 24, 24, requires_grad=True)
    (gradient,) = torch.autograd.grad(reward(pixels, PROMPTS[:1]), pixels)
    step = 0.02 * gradient / gradient.norm()
    with torch.no_grad():
        difference = (reward(pixels + step, PROMPTS[:1]) - reward(pixels - step, PROMPTS[:1])) / 2
    assert (gradient * step).sum().item() == pytest.approx(difference.item(), rel=1e-2)


def test_both_layouts_agree(tmp_path):
    model = tiny_transformers()
    save_file(to_open_clip_layout(model.state_dict()), tmp_path / "a.safetensors", HINTS)
    older = {f"{tower}_model.embeddings.position_ids": torch.arange(12)[None] for tower in ("text", "vision")}
    save_file(model.state_dict() | older, tmp_path / "b.safetensors", HINTS | {"quick_gelu": "false"})
    pixels = torch.rand(2, 3, 24, 24)
    a, b = (load_reward(tmp_path / name)(pixels, PROMPTS) for name in ("a.safetensors", "b.safetensors"))
    assert torch.allclose(a, b, atol=1e-5)


def test_training_checkpoint_without_hints_falls_back_to_64_wide_heads(tmp_path):
    save_checkpoint(tmp_path / "epoch_3.pt")
    reward = load_reward(tmp_path / "epoch_3.pt")
    assert reward.name == "epoch_3"
    assert reward.model.visual.transformer.resblocks[0].attn.num_heads == 1
    assert evaluate(reward, torch.rand(2, 3, 24, 24), PROMPTS).shape == (2,)


PUBLISHED = [
    name
    for name in open_clip.list_models()
    if name.startswith("ViT-")
    and not any(other in name for other in ("SigLIP", "CLIPA", "worldwide", "alt", "quickgelu"))
    and "timm_model_name" not in open_clip.get_model_config(name)["vision_cfg"]
]


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_vit_is_inferred_from_its_shapes(name):
    config = open_clip.get_model_config(name)
    with torch.device("meta"):
        state = open_clip.model.CLIP(**config).state_dict()
    architecture = infer_architecture(state, {}, quick_gelu=False)
    vision = open_clip.model.CLIPVisionCfg(**config["vision_cfg"])
    assert (architecture.image_size, architecture.patch_size) == (vision.image_size, vision.patch_size)
    assert architecture.vision_heads == vision.width // vision.head_width
    assert architecture.text_heads == config["text_cfg"]["heads"]
    assert {key: value.shape for key, value in build(state, architecture).state_dict().items()} == {k: v.shape for k, v in state.items()}


@pytest.mark.parametrize(("width", "quick_gelu", "mean", "std"), [(1024, True, 25, 3), (1280, False, 21.5, 1.3)])
def test_transformers_layout_without_config_follows_the_published_models(tmp_path, width, quick_gelu, mean, std):
    vision = {
        "hidden_size": width,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 16,
        "image_size": 28,
        "patch_size": 14,
    }
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8, logit_scale_init_value=4.6052)
    )
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    reward = load_reward(tmp_path / "a.safetensors")
    assert isinstance(reward.model.visual.transformer.resblocks[0].mlp.gelu, open_clip.transformer.QuickGELU) == quick_gelu
    assert reward.model.visual.transformer.resblocks[0].attn.num_heads == 16
    assert (reward.reference_mean, reward.reference_std) == pytest.approx((mean, std), rel=1e-3)


def test_openai_archive_means_quick_gelu(tmp_path):
    sizes = {name: torch.tensor(12) for name in ("input_resolution", "context_length", "vocab_size")}
    torch.save(tiny_open_clip().state_dict() | sizes, tmp_path / "a.pt")
    assert isinstance(load_reward(tmp_path / "a.pt").model.transformer.resblocks[0].mlp.gelu, open_clip.transformer.QuickGELU)


def test_open_clip_folder(tmp_path):
    save_file(tiny_open_clip().state_dict(), tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(
        '{"model_cfg": {"embed_dim": 16, "vision_cfg": {"width": 32, "head_width": 16}, "text_cfg": {"heads": 3}}}'
    )
    pixels = torch.rand(2, 3, 24, 24)
    expected = open_clip_scores(tiny_open_clip(), preprocess(pixels, 24), PROMPTS)
    assert torch.allclose(load_reward(tmp_path)(pixels, PROMPTS), expected, atol=1e-4)


def test_metadata_states_the_reference(tmp_path):
    save_file(tiny_open_clip().state_dict(), tmp_path / "a.safetensors", HINTS | {"reference_mean": "-1.5", "reference_std": "0.25"})
    reward = load_reward(tmp_path / "a.safetensors")
    assert (reward.reference_mean, reward.reference_std) == (-1.5, 0.25)
    assert (reward.name, reward.needs_prompt, reward.differentiable) == ("a", True, True)


@pytest.fixture
def reward(tmp_path):
    save_open_clip(tmp_path / "tiny.safetensors")
    return load_reward(tmp_path / "tiny.safetensors")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.15), (torch.float16, 0.03)])
def test_half_precision_towers_score_in_float32(tmp_path, reward, dtype, tolerance):
    state = {key: value.to(dtype) for key, value in tiny_open_clip().state_dict().items()}
    save_file(state | {"ln_final.weight": state["ln_final.weight"].float()}, tmp_path / "half.safetensors", HINTS)
    half = load_reward(tmp_path / "half.safetensors")
    pixels = torch.rand(2, 3, 24, 24, requires_grad=True)
    scores = half(pixels, PROMPTS)
    assert scores.dtype == torch.float32
    assert torch.allclose(scores, reward(pixels, PROMPTS), atol=tolerance)
    assert torch.autograd.grad(scores.sum(), pixels)[0].norm() > 0


def test_prompts_are_encoded_once(reward, monkeypatch):
    encoded = []
    original = reward.model.encode_text
    monkeypatch.setattr(reward.model, "encode_text", lambda tokens: encoded.extend(tokens) or original(tokens))
    pixels = torch.rand(3, 3, 24, 24)
    first = reward(pixels, ["a", "b", "a"])
    assert torch.allclose(reward(pixels, ["a", "b", "a"]), first)
    assert len(encoded) == 2
    reward.text_features([str(i) for i in range(300)])
    reward.text_features(["b", "c"])
    assert len(reward._text_features) == 2
    assert torch.allclose(reward(pixels, ["a", "b", "a"]), first)


def test_scores_seen_in_inference_mode_do_not_spoil_later_gradients(tmp_path):
    save_open_clip(tmp_path / "a.safetensors")
    pixels = torch.rand(1, 3, 24, 24, requires_grad=True)
    with torch.inference_mode():
        reward = load_reward(tmp_path / "a.safetensors")
        similarity = ClipImageSimilarity(reward, torch.rand(1, 3, 30, 30))
        reward(pixels, ["a cat"]), similarity(pixels, [""])
    for each in (reward, similarity):
        (gradient,) = torch.autograd.grad(each(pixels, ["a cat"]).sum(), pixels)
        assert gradient.norm() > 0


def test_long_prompts_are_cut_and_say_so(reward, caplog):
    start, end = "one two three four five six seven eight nine ten", "eleven twelve"
    assert reward.unread(start) == ""
    assert reward.unread(f"{start} {end}") == end
    pixels = torch.rand(1, 3, 24, 24)
    assert torch.equal(reward(pixels, [f"{start} {end}"]), reward(pixels, [start]))
    assert [record.getMessage().endswith(f"does not see its end: {end}") for record in caplog.records] == [True]


@pytest.mark.parametrize("prompt", ["日本語の猫 🐈", "<end_of_text> a <start_of_text>", "\x00\ud800", "a" * 5000, "\n\t . "])
def test_any_text_is_a_prompt(reward, prompt):
    assert evaluate(reward, torch.rand(1, 3, 24, 24), prompt).shape == (1,)


def test_empty_prompt_is_refused(reward):
    with pytest.raises(RewardError, match="the prompt is empty"):
        evaluate(reward, torch.rand(1, 3, 24, 24), " ")


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (24, 24), (500, 37)])
def test_any_size_is_scored(reward, size):
    assert evaluate(reward, torch.rand(1, 3, *size), "a cat").shape == (1,)


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_preprocessing_equals_pil_on_photographs(name):
    photo = Image.open(Path(skimage.__file__).parent / "data" / name).convert("RGB")
    theirs = open_clip.transform.image_transform(224, is_train=False)(photo)
    pixels = torch.from_numpy(skimage.io.imread(Path(skimage.__file__).parent / "data" / name)[..., :3].copy()).permute(2, 0, 1)[None] / 255
    difference = (preprocess(pixels, 224)[0] - theirs).abs() * 255 * 0.27
    assert difference.mean() < 0.5
    assert difference.quantile(0.999) < 6


def test_image_similarity(reward, tmp_path):
    pictures = torch.rand(3, 3, 24, 24)
    similarity = ClipImageSimilarity(reward, pictures[:1])
    with torch.no_grad():
        features = reward.model.encode_image(preprocess(pictures, 24), normalize=True)
    assert torch.allclose(evaluate(similarity, pictures, ""), features @ features[0], atol=1e-5)
    with pytest.raises(RewardError, match="one picture"):
        ClipImageSimilarity(reward, pictures)
    pixels = pictures[1:2].requires_grad_()
    (gradient,) = torch.autograd.grad(similarity(pixels, [""]), pixels)
    step = 0.02 * gradient / gradient.norm()
    with torch.no_grad():
        difference = (similarity(pixels + step, [""]) - similarity(pixels - step, [""])) / 2
    assert (gradient * step).sum().item() == pytest.approx(difference.item(), rel=1e-2)


@pytest.mark.parametrize("tower", ["vision", "text"])
def test_impossible_heads_are_refused(tower):
    state = tiny_open_clip().state_dict()
    architecture = infer_architecture(state, HINTS, quick_gelu=False)
    for heads in (0, 5):
        with pytest.raises(RewardError, match=f"state {tower}_heads in the file's metadata"):
            replace(architecture, **{f"{tower}_heads": heads})


def test_loaded_weights_are_frozen_and_real(tmp_path):
    save_open_clip(tmp_path / "a.safetensors")
    reward = load_reward(tmp_path / "a.safetensors")
    tensors = itertools.chain(reward.parameters(), reward.buffers())
    assert not any(tensor.is_meta or tensor.is_inference() or tensor.requires_grad for tensor in tensors)
