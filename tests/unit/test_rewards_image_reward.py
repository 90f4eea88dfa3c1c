"""ImageReward: its prompts, and the vocabulary that must lie beside the weights."""

import json
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from reward_guidance.guidance.rewards import RewardError, evaluate, load_reward
from reward_guidance.guidance.rewards.blip import encode_text, text_encoder, vision_encoder
from reward_guidance.guidance.rewards.image_reward import find_vocabulary
from reward_guidance.tests.standins.rewards import WORDS, bert_tokenizer, save_image_reward, save_vocabulary
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

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


@pytest.fixture(scope="module")
def word_pieces():
    """BERT's tokenizer, put together from its parts."""
    tokenizer = Tokenizer(WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    return tokenizer


@pytest.fixture(scope="module")
def vocabulary(folder):
    return find_vocabulary(folder, len(WORDS) + 2)


PIECES = st.sampled_from([*WORDS, *TEXTS, " ", "\n", "Red", "É", "\u0301", "ﬁ", "İ", "ß", "\ufeff", "𝐚", "-", "!?"])


@settings(max_examples=100, deadline=None)
@given(st.one_of(st.text(max_size=80), st.lists(PIECES, max_size=40).map("".join)))
def test_tokens_and_their_places_are_those_of_word_pieces(vocabulary, word_pieces, text):
    read = word_pieces.encode(text.encode("utf-8", "replace").decode(), add_special_tokens=False)
    assert vocabulary(text)[1:-1] == read.ids[:33]
    start = read.offsets[33][0] if len(read.ids) > 33 else len(text)
    assert vocabulary.truncated_text(text) == text[start:].strip()


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
    assert [record.getMessage().endswith(f"does not read: {end}") for record in caplog.records] == [True]


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
    tensors = [*reward.parameters(), *reward.buffers()]
    assert not any(tensor.is_meta or tensor.is_inference() or tensor.requires_grad for tensor in tensors)


def encoder_state(folder, part):
    prefix = f"blip.{part}_encoder."
    return {
        key.removeprefix(prefix): tensor
        for key, tensor in state(folder).items()
        if key.startswith(prefix) and not key.endswith("position_ids")
    }


@pytest.mark.parametrize(
    ("part", "build", "heads"), [("visual", vision_encoder, "vision_heads"), ("text", text_encoder, "text_heads")]
)
def test_encoders_take_over_the_tensors(folder, part, build, heads):
    tensors = encoder_state(folder, part)
    built = build(tensors, {heads: 2 if part == "visual" else 3}).state_dict()
    assert built.keys() == tensors.keys()
    assert all(built[key].data_ptr() == tensor.data_ptr() for key, tensor in tensors.items())


def layer(state, number):
    prefix = f"encoder.layer.{number}."
    return {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}


def linear(state, name, x):
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def normalise(state, name, x):
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.LayerNorm.weight"], state[f"{name}.LayerNorm.bias"], 1e-12)


def attend(state, name, x, source, heads, mask=None):
    """(B,N,C), (B,M,D) and a mask (B,1,1,M) -> (B,N,C), with the residual and the norm."""
    parts = (linear(state, f"{name}.self.{part}", y) for part, y in (("query", x), ("key", source), ("value", source)))
    query, key, value = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in parts)
    read = F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).flatten(2)
    return normalise(state, f"{name}.output", x + linear(state, f"{name}.output.dense", read))


def blip_text(state, tokens, mask, picture, layers=2, heads=3):
    """BLIP's text encoder, written out: each token attends to all tokens, then to the picture."""
    embeddings = "embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight"
    words, places = (state[name] for name in embeddings)
    x = normalise(state, "embeddings", words[tokens] + places[: tokens.shape[1]])
    for parts in (layer(state, number) for number in range(layers)):
        x = attend(parts, "attention", x, x, heads, mask[:, None, None])
        x = attend(parts, "crossattention", x, picture, heads)
        inner = F.gelu(linear(parts, "intermediate.dense", x))
        x = normalise(parts, "output", x + linear(parts, "output.dense", inner))
    return x


def test_the_text_encoder_equals_its_equations(folder):
    """In float64, so that nothing but a different equation exceeds the tolerance."""
    tensors = {key: tensor.double() for key, tensor in encoder_state(folder, "text").items()}
    encoder = text_encoder(tensors, {"text_heads": 3})
    tokens, mask = torch.arange(26).view(2, 13), torch.arange(13) < torch.tensor([[13], [6]])
    random = torch.Generator().manual_seed(0)
    picture = torch.randn(2, 10, 32, generator=random, dtype=torch.float64, requires_grad=True)
    ours = encode_text(encoder, tokens, mask, picture)[mask]
    expected = blip_text(tensors, tokens, mask, picture)[mask]
    assert (ours - expected).abs().max() < 1e-10
    weights = torch.randn(expected.shape, generator=random, dtype=torch.float64)
    gradients = [torch.autograd.grad((states * weights).sum(), picture)[0] for states in (ours, expected)]
    assert (gradients[0] - gradients[1]).norm() < 1e-10 * gradients[1].norm()


def test_a_missing_timm_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.models.vision_transformer", None)
    with pytest.raises(RewardError, match="needs the package timm; install it with: pip install timm"):
        load_reward(folder / "ImageReward.safetensors")
