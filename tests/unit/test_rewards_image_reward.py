"""ImageReward: its prompts, and the vocabulary that must lie beside the weights."""

import json

import pytest
import torch
from reward_guidance.guidance.rewards import RewardError, evaluate, load_reward
from reward_guidance.guidance.rewards.image_reward import find_vocabulary
from reward_guidance.tests.standins.rewards import WORDS, bert_tokenizer, save_image_reward, save_vocabulary
from safetensors.torch import load_file, save_file

TEXTS = (
    "a large red circle", "Héllo WÖRLD, it's 12.5%!", "  spaces\tand\nlines ", "cats sitting", "日本語の猫 🐈", "猫cat",
    "[SEP] red [MASK] [CLS]", "\x00\u200b", "x" * 150, "", "a " * 60, "(a:1.2), [b|c] <lora:x:1>", "naïve café ﬁ",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("reward")
    save_image_reward(path / "ImageReward.safetensors")
    return path


@pytest.fixture(scope="module")
def reward(folder):
    return load_reward(folder / "ImageReward.safetensors")


@pytest.fixture(scope="module")
def bert():
    return bert_tokenizer()


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_are_those_of_bert(folder, bert, text):
    assert find_vocabulary(folder, len(WORDS) + 2)(text) == bert(text, truncation=True, max_length=35).input_ids


def test_vocab_txt_and_tokenizer_json_say_the_same(folder, bert, tmp_path):
    bert.save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").unlink(missing_ok=True)
    ours, theirs = (find_vocabulary(path, len(WORDS) + 2) for path in (folder, tmp_path))
    assert [ours(text) for text in TEXTS] == [theirs(text) for text in TEXTS]


def test_padding_changes_nothing(reward):
    pixels = torch.rand(2, 3, 24, 24)
    together = evaluate(reward, pixels, ["a cat", "a large red circle on the ground"])
    assert together[0].item() == pytest.approx(evaluate(reward, pixels[:1], "a cat").item(), abs=1e-5)


def test_long_prompts_are_cut_and_say_so(reward, caplog):
    start, end = " ".join(["cat"] * 33), "Red circle"
    assert reward.truncated_text(start) == ""
    assert reward.truncated_text(f"{start} {end}") == end
    pixels = torch.rand(1, 3, 24, 24)
    assert torch.equal(reward(pixels, [f"{start} {end}"]), reward(pixels, [start]))
    reward(pixels, [f"{start} {end}"])
    assert [record.getMessage().endswith(f"does not see: {end}") for record in caplog.records] == [True]


@pytest.mark.parametrize("prompt", ["日本語の猫 🐈", "\ud800", "a" * 5000, "\n\t . "])
def test_any_text_is_a_prompt(reward, prompt):
    assert evaluate(reward, torch.rand(1, 3, 24, 24), prompt).shape == (1,)


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (500, 37)])
def test_any_size_is_scored(reward, size):
    assert evaluate(reward, torch.rand(1, 3, *size), "a cat").shape == (1,)


def test_needs_a_prompt(reward):
    assert (reward.needs_prompt, reward.differentiable, reward.reference_mean, reward.reference_std) == (
        True,
        True,
        0,
        1,
    )
    with pytest.raises(RewardError, match="the prompt is empty"):
        evaluate(reward, torch.rand(1, 3, 24, 24), " ")


VOCABULARIES = {
    "missing": (
        None,
        "ImageReward.safetensors: it reads prompts with BERT's vocabulary; put vocab.txt of google-bert/bert-base-uncased .* into ",
    ),
    "of another model": (
        "\n".join(WORDS * 2),
        f"vocab.txt beside it has {2 * len(WORDS)} words and the weights {len(WORDS)}; take",
    ),
    "too short": (
        "\n".join(WORDS[:-7]),
        f"has {len(WORDS) - 7} words and the weights {len(WORDS)}; take vocab.txt of google-bert",
    ),
    "without [SEP]": ("\n".join(["x" if word == "[SEP]" else word for word in WORDS]), "take vocab.txt of google-bert"),
    "empty": ("", "vocab.txt beside it has 0 words"),
    "not text": (b"\xff\xfe\x00", "vocab.txt beside it is damaged; download it again"),
}


@pytest.mark.parametrize(("content", "message"), VOCABULARIES.values(), ids=VOCABULARIES)
def test_vocabularies_that_do_not_fit(folder, tmp_path, content, message):
    (tmp_path / "ImageReward.safetensors").write_bytes((folder / "ImageReward.safetensors").read_bytes())
    if content is not None:
        (tmp_path / "vocab.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RewardError, match=message) as caught:
        load_reward(tmp_path / "ImageReward.safetensors")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content", ["", "{}", "[]", '{"model": {"type": "WordPiece"}}', json.dumps({"version": "1.0", "model": None})]
)
def test_damaged_tokenizer_json(folder, tmp_path, content):
    (tmp_path / "a.safetensors").write_bytes((folder / "ImageReward.safetensors").read_bytes())
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(RewardError, match="tokenizer.json beside it is damaged"):
        load_reward(tmp_path / "a.safetensors")


def state(folder):
    return load_file(folder / "ImageReward.safetensors")


STATES = {
    "a missing weight": (
        lambda s: s.pop("blip.text_encoder.encoder.layer.1.output.dense.bias"),
        "do not fit together .*Missing key",
    ),
    "a missing head": (lambda s: s.pop("mlp.layers.4.weight"), "do not fit together .*layers.4.weight"),
    "a head of two numbers": (
        lambda s: s.update({"mlp.layers.7.weight": torch.zeros(2, 4), "mlp.layers.7.bias": torch.zeros(2)}),
        "its head ends in 2 numbers",
    ),
    "a wrong shape": (
        lambda s: s.update({"blip.visual_encoder.norm.bias": torch.zeros(3)}),
        "do not fit together .*size mismatch",
    ),
    "more of BLIP": (
        lambda s: s.update({"blip.itm_head.weight": torch.zeros(2, 24)}),
        "it holds blip.itm_head.weight, which ImageReward has no",
    ),
    "integers": (
        lambda s: s.update({key: value.to(torch.int8) for key, value in s.items()}),
        "stored as torch.int8; save them as float16",
    ),
    "one that is no weight": (
        lambda s: s.update({"blip.visual_encoder.cls_token": torch.zeros(())}),
        "do not fit together",
    ),
}


@pytest.mark.parametrize(("change", "message"), STATES.values(), ids=STATES)
def test_weights_that_do_not_fit(folder, tmp_path, change, message):
    weights = state(folder)
    change(weights)
    save_file(weights, tmp_path / "a.safetensors", {"vision_heads": "2", "text_heads": "3"})
    save_vocabulary(tmp_path)
    with pytest.raises(RewardError, match=message) as caught:
        load_reward(tmp_path / "a.safetensors")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tower", ["vision", "text"])
def test_impossible_heads_are_refused(folder, tmp_path, tower):
    save_file(
        state(folder), tmp_path / "a.safetensors", {"vision_heads": "2", "text_heads": "3"} | {f"{tower}_heads": "5"}
    )
    save_vocabulary(tmp_path)
    with pytest.raises(RewardError, match=f"a {tower} tower .* wide cannot have 5 heads"):
        load_reward(tmp_path / "a.safetensors")


def test_loaded_weights_are_frozen_and_real(reward):
    assert not any(tensor.is_meta or tensor.is_inference() or tensor.requires_grad for tensor in reward.parameters())
