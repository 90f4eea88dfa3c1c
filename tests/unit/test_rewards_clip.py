"""CLIP rewards: what is read off shapes, metadata and names, and how prompts are treated."""

import itertools

import open_clip
import pytest
import torch
import transformers
from reward_guidance.guidance.rewards import (
    CLIP_KINDS,
    ClipImageSimilarity,
    LoadOptions,
    RewardError,
    evaluate,
    load_reward,
)
from reward_guidance.guidance.rewards.clip import preprocess, recognise_kind
from reward_guidance.guidance.rewards.clip_checkpoint import build, infer_text, infer_vision, to_open_clip_layout
from reward_guidance.guidance.rewards.files import Weights
from reward_guidance.guidance.rewards.image import resize_shortest_side
from reward_guidance.tests.standins.rewards import (
    HEADS,
    open_clip_model,
    open_clip_scores,
    save_hps,
    save_open_clip,
    save_towers,
    save_transformers,
    tokens,
    transformers_model,
)
from reward_guidance.tests.unit.shared import PROMPTS
from safetensors.torch import load_file, save_file


def test_both_layouts_agree(tmp_path):
    model = transformers_model()
    save_file(to_open_clip_layout(model.state_dict()), tmp_path / "a.safetensors", HEADS)
    older = {f"{tower}_model.embeddings.position_ids": torch.arange(12)[None] for tower in ("text", "vision")}
    save_file(model.state_dict() | older, tmp_path / "b.safetensors", HEADS | {"quick_gelu": "false"})
    pixels = torch.rand(2, 3, 24, 24)
    a, b = (load_reward(tmp_path / name)(pixels, PROMPTS) for name in ("a.safetensors", "b.safetensors"))
    assert torch.allclose(a, b, atol=1e-5)


def test_training_checkpoint_without_hints_falls_back_to_64_wide_heads(tmp_path):
    state = {f"module.{key}": value for key, value in open_clip_model().state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "epoch_3.pt")
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
    vision = open_clip.model.CLIPVisionCfg(**config["vision_cfg"])
    inferred = infer_vision(state, {})
    assert (inferred.image_size, inferred.patch_size) == (vision.image_size, vision.patch_size)
    assert inferred.heads == vision.width // vision.head_width
    assert infer_text(state, {}).heads == config["text_cfg"]["heads"]
    built = build(state, {}, quick_gelu=False).state_dict()
    assert {key: value.shape for key, value in built.items()} == {key: value.shape for key, value in state.items()}


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
    assert (
        isinstance(reward.model.visual.transformer.resblocks[0].mlp.gelu, open_clip.transformer.QuickGELU) == quick_gelu
    )
    assert reward.model.visual.transformer.resblocks[0].attn.num_heads == 16
    assert (reward.reference_mean, reward.reference_std) == pytest.approx((mean, std), rel=1e-3)


H14 = {"visual.conv1.weight": torch.empty(1280, 3, 14, 14)}
H14_TRANSFORMERS = {"vision_model.embeddings.patch_embedding.weight": torch.empty(1280, 3, 14, 14)}
L14 = {"visual.conv1.weight": torch.empty(1024, 3, 14, 14)}


@pytest.mark.parametrize(
    ("path", "state", "wrapper", "hints", "kind"),
    [
        ("HPS_v2.1_compressed.pt", H14, ("state_dict",), {}, "HPS v2.1"),
        ("HPS_v2_compressed.pt", H14, ("state_dict",), {}, "HPS v2"),
        ("downloaded.pt", H14, ("state_dict",), {}, "HPS v2.1"),
        ("HPS_v2.1_compressed.safetensors", H14, (), {}, "HPS v2.1"),
        ("HPSv2-hf/model.safetensors", H14_TRANSFORMERS, (), {}, "HPS v2"),
        ("epoch_10.pt", H14, ("epoch", "name", "state_dict", "optimizer"), {}, "CLIP score"),
        ("finetuned.pt", L14, ("state_dict",), {}, "CLIP score"),
        ("open_clip_pytorch_model.bin", H14, (), {}, "CLIP score"),
        ("PickScore_v1.safetensors", H14_TRANSFORMERS, (), {}, "PickScore"),
        ("PickScore_v1/model.safetensors", H14_TRANSFORMERS, (), {}, "PickScore"),
        ("preference.safetensors", H14_TRANSFORMERS, (), {}, "PickScore"),
        ("CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors", H14_TRANSFORMERS, (), {}, "CLIP score"),
        ("CLIP-ViT-H-14-laion2B-s32B-b79K/model.safetensors", H14_TRANSFORMERS, (), {}, "CLIP score"),
        ("a.safetensors", H14, (), {"kind": "HPS v2"}, "HPS v2"),
        ("PickScore_v1.safetensors", H14_TRANSFORMERS, (), {"kind": "CLIP score"}, "CLIP score"),
    ],
)
def test_kinds_of_one_architecture_are_told_apart(tmp_path, path, state, wrapper, hints, kind):
    weights = Weights(tmp_path / path, state, hints, wrapper)
    assert recognise_kind(weights) == kind
    assert recognise_kind(weights, "HPS v2") == "HPS v2"


def test_kind_can_be_chosen_and_misspelt(tmp_path):
    save_hps(tmp_path / "a.safetensors")
    hps, clip = (load_reward(tmp_path / "a.safetensors", LoadOptions(kind=kind)) for kind in (None, "CLIP score"))
    assert (hps.scale, hps.reference_mean, hps.reference_std) == (1, 0.285, 0.03)
    assert clip.scale == pytest.approx(1 / 0.07, rel=1e-3)
    square = torch.rand(2, 3, 24, 24)
    assert torch.allclose(clip(square, PROMPTS), clip.scale * hps(square, PROMPTS), atol=1e-5)
    save_file(open_clip_model().state_dict(), tmp_path / "b.safetensors", HEADS | {"kind": "HPSv9"})
    with pytest.raises(
        RewardError, match=r"b\.safetensors: there is no kind of CLIP reward called 'HPSv9'; choose one of CLIP score"
    ):
        load_reward(tmp_path / "b.safetensors")


def test_wide_pictures_are_seen_whole_by_hps_and_in_the_middle_by_clip(tmp_path):
    save_hps(tmp_path / "a.safetensors")
    picture = torch.rand(1, 3, 24, 72)
    changed = picture.clone()
    changed[..., :20] = 1 - changed[..., :20]
    for kind, sees in (("HPS v2.1", True), ("CLIP score", False)):
        reward = load_reward(tmp_path / "a.safetensors", LoadOptions(kind=kind))
        assert (abs(reward(picture, PROMPTS[:1]) - reward(changed, PROMPTS[:1])).item() > 1e-4) == sees


def test_every_kind_has_a_reference():
    assert all(kind.cosine_mean > 5 * kind.cosine_std > 0 for kind in CLIP_KINDS.values())


def test_openai_archive_means_quick_gelu(tmp_path):
    sizes = {name: torch.tensor(12) for name in ("input_resolution", "context_length", "vocab_size")}
    torch.save(open_clip_model().state_dict() | sizes, tmp_path / "a.pt")
    assert isinstance(
        load_reward(tmp_path / "a.pt").model.transformer.resblocks[0].mlp.gelu, open_clip.transformer.QuickGELU
    )


@pytest.mark.parametrize(
    ("name", "quick_gelu"),
    [
        ("{}.safetensors", None),
        ("CLIP-ViT-L-14-laion2B-s32B-b82K-{}.safetensors", False),
        ("laion {}/clip.safetensors", False),
        ("ViT-L-14-openai-{}.safetensors", True),
        ("OpenAI/{}.safetensors", True),
        ("vit_b_32-quickgelu-laion400m_e31-{}.safetensors", True),
    ],
)
@pytest.mark.parametrize("layout", ["open_clip", "transformers"])
def test_the_name_tells_the_activation_where_the_file_does_not(tmp_path, name, quick_gelu, layout):
    """By the layout, weights of these sizes count as OpenAI's in transformers', and as LAION's in open_clip's."""
    path = tmp_path / "models" / name.format(layout)
    path.parent.mkdir(parents=True)
    state = transformers_model().state_dict()
    expected = (layout == "transformers") if quick_gelu is None else quick_gelu
    state = state if layout == "transformers" else to_open_clip_layout(state)
    for hints, quick in (({}, expected), ({"quick_gelu": "true"}, True), ({"quick_gelu": "false"}, False)):
        save_file(state, path, HEADS | hints)
        reward = load_reward(path)
        assert isinstance(reward.model.transformer.resblocks[0].mlp.gelu, open_clip.transformer.QuickGELU) == quick
        assert reward.description == f"CLIP score, with {'QuickGELU' if quick else 'GELU'}"


def test_a_config_decides_before_the_name(tmp_path):
    folder = tmp_path / "laion"
    save_transformers(folder, "quick_gelu")
    assert load_reward(folder).description == "CLIP score, with QuickGELU"


def test_open_clip_folder(tmp_path):
    save_file(open_clip_model().state_dict(), tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(
        '{"model_cfg": {"embed_dim": 16, "vision_cfg": {"width": 32, "head_width": 16}, "text_cfg": {"heads": 3}}}'
    )
    pixels = torch.rand(2, 3, 24, 24)
    expected = open_clip_scores(open_clip_model())(preprocess(pixels, 24), PROMPTS)
    assert torch.allclose(load_reward(tmp_path)(pixels, PROMPTS), expected, atol=1e-4)


def test_metadata_states_the_reference(tmp_path):
    save_file(
        open_clip_model().state_dict(),
        tmp_path / "a.safetensors",
        HEADS | {"reference_mean": "-1.5", "reference_std": "0.25"},
    )
    reward = load_reward(tmp_path / "a.safetensors")
    assert (reward.reference_mean, reward.reference_std) == (-1.5, 0.25)
    assert (reward.name, reward.needs_prompt, reward.differentiable) == ("a", True, True)


@pytest.fixture
def reward(tmp_path):
    save_open_clip(tmp_path / "tiny.safetensors")
    return load_reward(tmp_path / "tiny.safetensors")


def test_prompts_are_encoded_once(reward, monkeypatch):
    encoded = []
    original = reward.model.encode_text
    monkeypatch.setattr(reward.model, "encode_text", lambda tokens: encoded.extend(tokens) or original(tokens))
    pixels = torch.rand(3, 3, 24, 24)
    first = reward(pixels, ["a", "b", "a"])
    assert torch.allclose(reward(pixels, ["a", "b", "a"]), first)
    assert len(encoded) == 2
    reward.text_features([str(i) for i in range(300)])
    assert torch.allclose(reward(pixels, ["a", "b", "a"]), first)
    assert len(encoded) == 2 + 300 + 2, "only a limited number is kept"


def test_remembered_prompts_follow_the_weights(reward):
    pixels = torch.rand(1, 3, 24, 24)
    before = reward(pixels, ["a cat"])
    reward.to(torch.bfloat16)
    halved, text = reward.text_features(["a cat"]), tokens(["a cat"])
    expected = reward.model.encode_text(text).float()
    assert torch.equal(halved, expected / expected.norm(dim=1, keepdim=True))
    assert reward(pixels, ["a cat"]).dtype == torch.float32
    reward.to(torch.float32)
    assert torch.allclose(reward(pixels, ["a cat"]), before, atol=0.2)


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
    assert reward.truncated_text(start) == ""
    assert reward.truncated_text(f"{start} {end}") == end
    pixels = torch.rand(1, 3, 24, 24)
    assert torch.equal(reward(pixels, [f"{start} {end}"]), reward(pixels, [start]))
    assert [record.getMessage().endswith(f"does not read: {end}") for record in caplog.records] == [True]


@pytest.mark.parametrize(
    "prompt", ["日本語の猫 🐈", "<end_of_text> a <start_of_text>", "\x00\ud800", "a" * 5000, "\n\t . "]
)
def test_any_text_is_a_prompt(reward, prompt):
    assert evaluate(reward, torch.rand(1, 3, 24, 24), prompt).shape == (1,)


def test_empty_prompt_is_refused(reward):
    with pytest.raises(RewardError, match="the prompt is empty"):
        evaluate(reward, torch.rand(1, 3, 24, 24), " ")


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("size", [(40, 31), (7, 9)])
def test_pixels_are_neither_clamped_nor_rounded(size, whole):
    """Preprocessing is affine in pixels of any value. The gradient is the same everywhere."""
    pixels = torch.rand(1, 3, *size, dtype=torch.float64).requires_grad_()
    black, once, often = (preprocess(scale * pixels, 24, whole) for scale in (0.0, 1.0, -300.0))
    assert (often - black + 300 * (once - black)).abs().max() < 1e-9
    near, far = (torch.autograd.grad(each.sum(), pixels)[0] for each in (once, often))
    assert (far + 300 * near).abs().max() < 1e-9
    assert near.norm() > 0


@pytest.mark.parametrize(("size", "shape"), [((2, 1000), (24, 384)), ((1000, 2), (384, 24)), ((2, 20), (24, 240))])
def test_only_the_middle_of_a_long_picture_is_resized(size, shape):
    pixels = torch.rand(1, 3, *size)
    resized = resize_shortest_side(pixels, 24)
    assert resized.shape[2:] == shape
    middle = pixels[..., 484:516, :] if size[0] == 1000 else pixels[..., 484:516] if size[1] == 1000 else pixels
    assert torch.equal(resized, resize_shortest_side(middle, 24))


@pytest.mark.parametrize("kind", ["CLIP score", "HPS v2.1"])
@pytest.mark.parametrize("size", [(1, 1), (3, 200), (24, 24), (500, 37), (1, 9000), (4320, 7680)])
def test_any_size_is_scored(tmp_path, kind, size):
    save_open_clip(tmp_path / "tiny.safetensors")
    reward = load_reward(tmp_path / "tiny.safetensors", LoadOptions(kind=kind))
    assert evaluate(reward, torch.rand(1, 3, *size), "a cat").shape == (1,)


def towers(folder, **options):
    vision, text = folder / "clip_vision" / "clip_vision_g.safetensors", folder / "text_encoders" / "clip_g.safetensors"
    save_towers(vision, text)
    return vision, text, LoadOptions(text_folders=(text.parent,), **options)


def test_a_text_tower_is_found_named_or_asked_for(tmp_path):
    vision, text, options = towers(tmp_path)
    save_file({"unrelated": torch.zeros(1)}, text.parent / "a.safetensors")
    (text.parent / "b.safetensors").write_bytes(b"damaged")
    save_open_clip(vision.parent / "whole.safetensors")  # whose text tower was trained with another image tower
    found = load_reward(vision, options)
    named = load_reward(vision, LoadOptions(text_tower=text))
    assert found.scale == named.scale == pytest.approx(100)
    pixels = torch.rand(2, 3, 24, 24)
    assert torch.equal(found(pixels, PROMPTS), named(pixels, PROMPTS))
    text.unlink()
    with pytest.raises(
        RewardError,
        match=f"clip_vision_g.safetensors: it is an image tower alone; .* text_projection to 16 into {text.parent}, or",
    ):
        load_reward(vision, options)


def test_a_text_tower_that_does_not_fit_is_refused(tmp_path):
    vision, text, _ = towers(tmp_path)
    state = load_file(text)
    save_file(
        {key: value for key, value in state.items() if key != "text_projection.weight"}, tmp_path / "clip_l.safetensors"
    )
    save_file(state | {"text_projection.weight": torch.zeros(99, 24)}, tmp_path / "other.safetensors")
    for name, ends in (("clip_l", "no text_projection"), ("other", "a text_projection to 99")):
        with pytest.raises(
            RewardError,
            match=f"the text tower {name}.safetensors has {ends}, but the image tower ends in 16 numbers; use a whole",
        ):
            load_reward(vision, LoadOptions(text_tower=tmp_path / f"{name}.safetensors"))
    with pytest.raises(
        RewardError, match="clip_g.safetensors is a text tower alone; choose the image tower that belongs to it"
    ):
        load_reward(text)


def test_an_image_tower_that_is_no_clips_is_refused(tmp_path):
    vision, _, options = towers(tmp_path)
    state = load_file(vision)
    save_file({key: value for key, value in state.items() if key != "visual_projection.weight"}, vision)
    with pytest.raises(RewardError, match="its image tower has no projection"):
        load_reward(vision, options)


def test_towers_of_different_layouts_fit_together(tmp_path):
    vision, text, options = towers(tmp_path)
    expected = load_reward(vision, options)
    save_file(to_open_clip_layout(load_file(text)), text, {"text_heads": "3"})
    pixels = torch.rand(2, 3, 24, 24)
    assert torch.allclose(load_reward(vision, options)(pixels, PROMPTS), expected(pixels, PROMPTS), atol=1e-4)


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


@pytest.mark.parametrize(("tower", "infer"), [("vision", infer_vision), ("text", infer_text)])
@pytest.mark.parametrize("heads", ["0", "5"])
def test_impossible_heads_are_refused(tower, infer, heads):
    with pytest.raises(RewardError, match=f"state {tower}_heads in the file's metadata"):
        infer(open_clip_model().state_dict(), {f"{tower}_heads": heads})


def test_loaded_weights_are_frozen_and_real(tmp_path):
    save_open_clip(tmp_path / "a.safetensors")
    reward = load_reward(tmp_path / "a.safetensors")
    tensors = itertools.chain(reward.parameters(), reward.buffers())
    assert not any(tensor.is_meta or tensor.is_inference() or tensor.requires_grad for tensor in tensors)
