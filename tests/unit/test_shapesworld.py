"""ShapesWorld: the pictures, the oracle, and that the compact weights say the same as the files made from them."""

import pytest
import torch
from reward_guidance.tests.standins.shapesworld import autoencoder, clip, compact, oracle, text, world
from reward_guidance.tests.unit.shared import generator


def scenes(n: int, seed: int = 0) -> torch.Tensor:
    every = world.all_scenes()
    return every[torch.randint(len(every), (n,), generator=generator(seed))]


def test_captions_and_scenes_are_the_same_thing():
    for scene in world.all_scenes():
        assert world.parse(world.caption(scene)) == tuple(scene.tolist())
    assert [world.caption(world.parse(prompt)) for prompt in world.PROMPTS] == list(world.PROMPTS)


def test_the_benchmark_asks_for_the_usual_as_often_as_captions_do():
    typical = world.is_typical(torch.tensor([world.parse(prompt) for prompt in world.PROMPTS]))
    assert typical.tolist() == [True] * 20 + [False] * 12
    assert len(set(world.PROMPTS)) == len(world.PROMPTS)
    assert set(world.DEMO_PROMPTS) <= set(world.PROMPTS)
    drawn = world.is_typical(world.wishes(10_000, generator(0))).float().mean()
    assert float(drawn) == pytest.approx(typical.float().mean().item(), abs=0.1)


def test_the_same_seed_draws_the_same_pictures():
    first, again, other = (world.render(scenes(8), generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_pictures_follow_habits():
    asked = world.wishes(4000, generator())
    same = (world.depicted(asked, generator(1)) == asked).all(1).float()
    typical = world.is_typical(asked)
    assert same[typical].mean() > 0.9
    assert 0.1 < same[~typical].mean() < 0.35


def test_the_oracle_reads_every_drawn_picture():
    asked = scenes(3000, seed=3)
    pictures = torch.cat([world.render(part, generator(i)) for i, part in enumerate(asked.split(250))])
    assert torch.equal(oracle.read(pictures), asked)


def test_the_oracle_sees_nothing_where_nothing_is():
    noise = torch.rand(64, 3, 64, 64, generator=generator())
    clouds = torch.nn.functional.interpolate(
        torch.rand(64, 3, 5, 5, generator=generator()), size=64, mode="bicubic"
    ).clamp(0, 1)
    empty = torch.rand(64, 3, 1, 1, generator=generator()).expand(-1, -1, 64, 64)
    for pictures in (noise, clouds, empty):
        assert (oracle.read(pictures) == oracle.NOTHING).float().mean() > 0.95


@pytest.mark.parametrize("part", [autoencoder.Encoder, autoencoder.Decoder])
def test_widening_keeps_the_function(part):
    narrow, wide = part().eval(), part(autoencoder.FORMAT_WIDTH).eval()
    wide.load_state_dict(autoencoder.widen(narrow.state_dict()))
    x = torch.rand(2, 3, 32, 32) if part is autoencoder.Encoder else torch.randn(2, 16, 4, 4)
    torch.testing.assert_close(wide(x), narrow(x), rtol=1e-5, atol=1e-5)


def test_the_autoencoder_keeps_what_the_picture_shows():
    weights = compact.load("autoencoder")
    both = torch.nn.ModuleDict({"encoder": autoencoder.Encoder(), "decoder": autoencoder.Decoder()})
    both.load_state_dict(weights)
    asked = scenes(128, seed=4)
    pictures = world.render(asked, generator(4))
    with torch.no_grad():
        latents = both["encoder"](pictures)
        decoded = both["decoder"](latents)
    assert (decoded - pictures).square().mean() < 1e-3
    assert (oracle.read(decoded) == asked).all(1).float().mean() > 0.95
    assert latents.mean().abs() < 0.3 and 0.7 < latents.std() < 1.3


@pytest.mark.parametrize("kind", ["guide", "heldout"])
def test_rewards_prefer_the_caption_that_is_true(kind):
    asked = scenes(96, seed=5)
    pictures = world.render(asked, generator(5))
    wrong = asked.clone()
    wrong[:, 2] = (wrong[:, 2] + 1) % len(world.SHAPES)
    score = clip.Scorer(compact.load(kind), kind)
    true, false = (score(pictures, [world.caption(scene) for scene in which]) for which in (asked, wrong))
    assert (true > false).float().mean() > 0.95


def test_the_full_vocabulary_holds_the_trained_words():
    full = clip.full_vocabulary(compact.load("guide"))
    assert full["token_embedding.weight"].shape == (clip.VOCABULARY, 64)
    assert full["token_embedding.weight"].any(1).nonzero()[:, 0].tolist() == clip.word_ids()


def test_compact_weights_are_close():
    weight = torch.randn(32, 16, 3, 3, generator=generator())
    packed = compact.pack("w", weight)
    assert packed["w"].dtype == torch.int8
    torch.testing.assert_close(compact.unpack(packed["w"], packed["w/scale"]).float(), weight, rtol=0, atol=0.02)


def test_a_difference_in_four_bits_is_close():
    origin = torch.randn(32, 18, generator=generator()).half()
    weight = origin + 0.1 * torch.randn(32, 18, generator=generator(1))
    packed = compact.pack("w", weight, origin)
    assert packed["w"].dtype == torch.uint8 and packed["w"].numel() == weight.numel() // 2
    error = compact.unpack(packed["w"], packed["w/scale"], origin).float() - weight
    assert error.square().mean() < 0.15**2 * (weight - origin).square().mean()


def test_all_weights_together_stay_small():
    assert sum(file.stat().st_size for file in compact.FOLDER.iterdir()) < 12e6


def test_the_text_encoder_is_the_same_every_time():
    first, again = text.clip_l(2), text.clip_l(2)
    assert all(torch.equal(first[key], again[key]) for key in first)
    places = first["text_model.embeddings.position_embedding.weight"]
    assert (places[text.CONTEXT - 1 :] == places[-1]).all()
