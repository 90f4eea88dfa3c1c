"""The guidance network: no guidance before training, any latent shape, and files that say what they belong to."""

import dataclasses
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from reward_guidance.guidance.errors import GuidanceError
from reward_guidance.guidance.network.card import Base, Card
from reward_guidance.guidance.network.file import load_network, save_network
from reward_guidance.guidance.network.forms import FORMS
from reward_guidance.guidance.network.unet import Architecture, GuidanceNetwork, Standardized, Text
from reward_guidance.guidance.process import Diffusion, Flow
from reward_guidance.guidance.tensors import read_header
from reward_guidance.tests.standins.files import run_with_little_memory, sparse
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

SMALL = Architecture(channels=4, width=16, levels=2, blocks=1, tokens=6, pooled=5)
BASE = Base(model="SD15", latents="SD15", channels=4, process="Diffusion")
CARD = Card(
    base=BASE, form="correction", objective="weighted", temperature=0.5, rewards=("PickScore", "aesthetic"), reward_weights=(1.0, 0.5),
    reward_mean=0.1, reward_std=0.9, prompts="ab12", samples=640, steps=4000, effective=0.3, curve=((200, -0.1), (400, -0.2), (4000, 0.7)),
    best=(400, -0.2),
)  # fmt: skip


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network(architecture: Architecture = SMALL, random_head: bool = True) -> GuidanceNetwork:
    torch.manual_seed(1)
    made = GuidanceNetwork(architecture)
    if random_head:
        torch.nn.init.normal_(made.last.weight)
    return made.eval().requires_grad_(False)


def text(batch: int, words: int = 3) -> Text:
    return Text(randn(batch, words, 6, seed=2), randn(batch, 5, seed=3))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("process", [Diffusion(), Flow()])
def test_an_untrained_network_is_exactly_no_guidance(form, process):
    architecture = dataclasses.replace(SMALL, inputs=FORMS[form].inputs, scalar=form == "potential")
    x, sigma = randn(2, 4, 8, 8), torch.tensor([0.3, 0.9])
    denoise = lambda point: torch.tanh(point) * 0.7  # noqa: E731
    tilted = FORMS[form](network(architecture, random_head=False), process, denoise, x, sigma, text(2))
    assert torch.equal(tilted, denoise(x))


@pytest.mark.parametrize("form", FORMS)
def test_strength_multiplies_and_zero_is_exactly_no_guidance(form):
    architecture = dataclasses.replace(SMALL, inputs=FORMS[form].inputs, scalar=form == "potential")
    x, sigma = randn(2, 4, 8, 8), torch.tensor([0.3, 0.9])
    guided = [
        FORMS[form](network(architecture), Flow(), lambda point: 0.7 * point, x, sigma, text(2), s)
        for s in (0.0, 1.0, 2.0)
    ]
    assert torch.equal(guided[0], 0.7 * x) and not torch.allclose(guided[1], 0.7 * x)
    torch.testing.assert_close(guided[2] - guided[0], 2 * (guided[1] - guided[0]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(8, 8), (5, 7), (1, 1), (3, 16, 9), (1, 2, 2)])
def test_any_latent_shape(shape):
    x = randn(2, 4, *shape)
    assert network()((x, x), torch.rand(2), text(2)).shape == x.shape
    scalar = network(dataclasses.replace(SMALL, scalar=True))
    assert scalar((x, x), torch.rand(2), text(2)).shape == (2,)


def test_a_scalar_network_predicts_the_denoised_estimate_on_request():
    scalar, x = network(dataclasses.replace(SMALL, scalar=True, inputs=1)), randn(2, 4, 3, 8, 8)
    angle, words = torch.tensor([0.3, 0.9]), text(2)
    value, denoised = scalar((x,), angle, words, with_denoised=True)
    assert value.shape == (2,) and denoised.shape == x.shape and denoised.any()
    assert torch.equal(value, scalar((x,), angle, words))
    torch.testing.assert_close(scalar((x[:1],), angle[:1], words[:1]), value[:1], rtol=1e-4, atol=1e-5)


def test_texts_are_told_apart_by_what_they_do_not_share():
    texts = 20 + randn(64, 5, seed=4)
    layer = Standardized(5)
    layer.fit(texts)
    assert layer(texts).mean(0).abs().max() < 1e-4 and layer(texts).square().mean() == pytest.approx(1, rel=1e-4)
    layer.fit(texts[:1].expand(3, 5))
    assert layer(texts[:1]).abs().max() < 1e-4 and layer(texts[1:]).abs().max() < 1
    layer.fit(torch.zeros(2, 5))
    assert torch.equal(layer(texts), texts)


def test_architectures_shrink_to_small_latents():
    assert Architecture(channels=4).fitted((4, 64, 64)).levels == 3
    assert Architecture(channels=16).fitted((16, 8, 8)).levels == 3
    assert Architecture(channels=16).fitted((16, 4, 4)).levels == 2
    assert Architecture(channels=2).fitted((2, 1, 1)) == Architecture(channels=2, levels=1, kernel=1)


@pytest.mark.parametrize(
    "options", [{"width": 12}, {"levels": 0}, {"channels": 0}, {"kernel": 2}, {"width": 2048}, {"blocks": 10**9}]
)
def test_impossible_architectures_are_refused(options):
    ((name, value),) = options.items()
    with pytest.raises(GuidanceError, match=f"{name} .*not {value}"):
        Architecture(**{"channels": 4} | options)


def test_samples_of_a_batch_do_not_see_each_other():
    x, angle, words = randn(3, 4, 8, 8), torch.tensor([0.1, 0.7, 1.5]), text(3)
    whole = network()((x, x), angle, words)
    for i in range(3):
        row = slice(i, i + 1)
        torch.testing.assert_close(
            network()((x[row], x[row]), angle[row], words[row]), whole[row], rtol=1e-4, atol=1e-5
        )


def test_frames_see_each_other():
    x = randn(1, 4, 3, 8, 8)
    changed = x.clone()
    changed[:, :, 2] += 1
    before, after = (network()((part, part), torch.tensor([0.5]), text(1)) for part in (x, changed))
    assert not torch.allclose(before[:, :, 0], after[:, :, 0], atol=1e-6)


def test_padding_words_are_not_read():
    x, angle, words = randn(2, 4, 8, 8), torch.rand(2), text(2)
    longer = Text(torch.nn.functional.pad(words.tokens, (0, 0, 0, 4)), words.pooled)
    torch.testing.assert_close(network()((x, x), angle, longer), network()((x, x), angle, words), rtol=1e-5, atol=1e-5)
    other = Text(words.tokens.flip(2), words.pooled)
    assert not torch.allclose(network()((x, x), angle, other), network()((x, x), angle, words), atol=1e-4)


def test_the_default_size_is_a_few_million():
    made = GuidanceNetwork(Architecture(channels=16, tokens=4096, pooled=2048))
    assert 1e6 < sum(p.numel() for p in made.parameters()) < 10e6


def test_files_come_back_whole(tmp_path):
    path = tmp_path / "networks" / "likes.safetensors"
    saved = network()
    save_network(path, saved, CARD)
    loaded, card = load_network(path)
    assert card == CARD and loaded.architecture == SMALL
    assert all(torch.equal(value, saved.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert "PickScore" in card.describe() and "SD15" in card.describe()


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"model": "SDXL", "latents": "SDXL"}, "made for SD15, but the model is SDXL: use one that was made for it"),
        ({"model": "SD20"}, "made for SD15, but the model is SD20"), ({"process": "Flow"}, "with the noising process Diffusion, but here it is Flow"),
        ({"channels": 9}, "latent channels 4, but here it is 9"), ({"target": "noise"}, "with the target data, but here it is noise"),
    ],
)  # fmt: skip
def test_other_models_are_refused_by_name(other, said):
    BASE.require(dataclasses.replace(BASE), "guidance network")
    with pytest.raises(GuidanceError, match=said):
        BASE.require(dataclasses.replace(BASE, **other), "guidance network")


def test_a_card_says_all_that_it_holds():
    lines = CARD.describe().splitlines()
    assert lines[0] == "correction network for SD15: 1 PickScore + 0.5 aesthetic at temperature 0.5"
    for fact in (
        "640 samples",
        "30.0%",
        "ab12",
        "+0.100",
        "0.900",
        "4000 steps",
        "weighted",
        "step 400",
        "-0.2000",
        "the last was 0.7000",
    ):
        assert any(fact in line for line in lines), fact
    assert "best" not in dataclasses.replace(CARD, curve=(), best=None).describe()


def damaged(path, kind: str):
    metadata = {
        "format": "reward-guidance-network",
        "version": "1",
        "architecture": json.dumps(dataclasses.asdict(SMALL)),
        "card": "{}",
    }
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "text":
        path.write_text("hello")
    elif kind == "missing":
        path.unlink()
    elif kind == "foreign":
        save_file(tensors, path)
    elif kind == "newer":
        save_file(tensors, path, metadata | {"version": "7"})
    elif kind == "card":
        save_file(tensors, path, metadata)
    elif kind == "tensor":
        tensors.popitem()
        save_file(tensors, path, metadata | {"card": json.dumps(dataclasses.asdict(CARD))})


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("truncated", "an incomplete one"), ("text", "not a safetensors"), ("missing", "not a safetensors"), ("foreign", "not a guidance network"),
        ("newer", "version 7"), ("card", "damaged"), ("tensor", "damaged"),
    ],
)  # fmt: skip
def test_bad_files_are_refused_in_a_sentence(tmp_path, kind, said):
    path = tmp_path / "likes.safetensors"
    save_network(path, network(), CARD)
    damaged(path, kind)
    with pytest.raises(GuidanceError, match=said):
        load_network(path)


class NothingLarge(TorchDispatchMode):
    """Refuses tensors that take memory of more than a megabyte."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.device.type != "meta" and made.nbytes > 2**20:
            raise AssertionError(f"{function} made a tensor of {made.nbytes / 2**20:.0f} MB")
        return made


ABSURD = (
    {"width": 1024}, {"width": 2**40}, {"width": 64.0}, {"width": "64"}, {"width": float("nan")}, {"levels": 8}, {"levels": 64}, {"blocks": 10**9},
    {"channels": 2**62}, {"channels": True}, {"tokens": -1}, {"tokens": 10**400}, {"pooled": None}, {"kernel": 10**6}, {"scalar": 1},
    {"scalar": True}, {"inputs": 1}, {"depth": 3},
)  # fmt: skip


def rewritten(path, **parts) -> None:
    """The same tensors with other metadata."""
    _, metadata = read_header(path)
    save_file(
        load_file(path),
        path,
        metadata | {name: part if isinstance(part, str) else json.dumps(part) for name, part in parts.items()},
    )


@pytest.mark.parametrize("absurd", ABSURD, ids=lambda absurd: str(absurd)[:30])
def test_what_a_file_claims_is_not_built_before_it_is_checked(tmp_path, absurd):
    path = tmp_path / "likes.safetensors"
    save_network(path, network(), CARD)
    rewritten(path, architecture=dataclasses.asdict(SMALL) | absurd)
    with NothingLarge(), pytest.raises(GuidanceError, match="it is damaged .*copy it again") as refusal:
        load_network(path)
    assert len(str(refusal.value)) < 300


CARDS = (
    {"temperature": "1"}, {"temperature": None}, {"temperature": float("nan")}, {"rewards": "PickScore"}, {"rewards": [1, 2]},
    {"rewards": ["PickScore"]}, {"reward_weights": ["1", "2"]}, {"curve": [[1]]}, {"curve": 3}, {"curve": [["200", -0.1]]}, {"best": [1, 2, 3]},
    {"best": 400}, {"steps": 4e3},
    {"base": None}, {"base": {}}, {"base": "SD15"}, {"form": "circle"}, {"form": "noise"}, {"form": ["shift"]},
    {"effective": "x" * 10**6}, {"prompts": 3}, {"curve": []},
    {"shape": [4, 10**5, 10**5]}, {"shape": [4, -1, 8]}, {"shape": [4, 0, 8]}, {"shape": [4]}, {"shape": [8, 8, 8]},
    {"base": dataclasses.asdict(BASE) | {"channels": 8}}, {"base": dataclasses.asdict(BASE) | {"target": "noise"}},
    {"base": dataclasses.asdict(BASE) | {"target": "x"}},
)  # fmt: skip


@pytest.mark.parametrize("wrong", CARDS, ids=lambda wrong: str(wrong)[:30])
def test_cards_that_could_not_be_shown_are_refused(tmp_path, wrong):
    path = tmp_path / "likes.safetensors"
    save_network(path, network(), CARD)
    rewritten(path, card=dataclasses.asdict(CARD) | wrong)
    with pytest.raises(GuidanceError, match="it is damaged .*copy it again") as refusal:
        load_network(path)
    assert len(str(refusal.value)) < 300


@pytest.mark.parametrize("text", ["[]", "null", "3", "{", "[" * 10**5, ""])
@pytest.mark.parametrize("part", ["card", "architecture"])
def test_metadata_that_is_no_record_is_refused(tmp_path, part, text):
    path = tmp_path / "likes.safetensors"
    save_network(path, network(), CARD)
    rewritten(path, **{part: text})
    with pytest.raises(GuidanceError, match="it is damaged"):
        load_network(path)


def test_what_a_newer_card_adds_is_left_out(tmp_path):
    path = tmp_path / "likes.safetensors"
    save_network(path, network(), CARD)
    rewritten(path, card=dataclasses.asdict(CARD) | {"seconds": 3})
    assert load_network(path)[1] == CARD


def test_a_version_of_any_length_is_named_in_short(tmp_path):
    path = tmp_path / "likes.safetensors"
    save_network(path, network(), CARD)
    rewritten(path, version="9" * 10**6)
    with pytest.raises(GuidanceError, match="update the pack") as refusal:
        load_network(path)
    assert len(str(refusal.value)) < 300


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["head.bias", "embed.standardized.mean"])
def test_networks_whose_weights_are_no_numbers_are_refused(tmp_path, name, value):
    path, broken = tmp_path / "likes.safetensors", network()
    broken.state_dict()[name].view(-1)[0] = value
    save_network(path, broken, CARD)
    with pytest.raises(GuidanceError, match="likes.safetensors holds weights that are not finite numbers"):
        load_network(path)


def test_a_loaded_network_is_made_whole(tmp_path):
    """Also of what is in no file; and in single precision, whatever the file has."""
    path, saved = tmp_path / "likes.safetensors", network()
    save_network(path, saved, CARD)
    x, angle, words = randn(2, 4, 8, 8), torch.rand(2), text(2)
    loaded, _ = load_network(path)
    assert torch.equal(loaded((x, x), angle, words), saved((x, x), angle, words))
    save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path, read_header(path)[1])
    loaded, _ = load_network(path)
    torch.testing.assert_close(loaded((x, x), angle, words), saved((x, x), angle, words), rtol=0.05, atol=0.05)


def test_too_little_memory_is_no_damage(tmp_path):
    """A file of 2 GB, none of which is on the disk, in a process that may take little more than it has."""
    path, large = tmp_path / "likes.safetensors", dataclasses.replace(SMALL, width=512)
    save_network(path, network(), CARD)
    _, metadata = read_header(path)
    sparse(
        path,
        GuidanceNetwork.without_weights(large).state_dict(),
        metadata | {"architecture": json.dumps(dataclasses.asdict(large))},
    )
    words = "Memory ran out while likes.safetensors was"
    assert (
        run_with_little_memory("from reward_guidance.guidance.network.file import load_network as load", path) == words
    )


def test_networks_that_are_saved_at_once_are_all_kept(tmp_path):
    """By threads that all have the same name in mind: one has it, the others are told so, and what it wrote stays."""
    path = tmp_path / "likes_00001_.safetensors"
    cards = [dataclasses.replace(CARD, samples=i) for i in range(8)]
    barrier = threading.Barrier(len(cards))

    def save(card: Card) -> bool:
        barrier.wait()
        try:
            save_network(path, network(), card, new=True)
        except FileExistsError:
            return False
        return True

    with ThreadPoolExecutor(len(cards)) as pool:
        saved = list(pool.map(save, cards))
    assert [card for card, done in zip(cards, saved, strict=True) if done] == [load_network(path)[1]]
    with pytest.raises(FileExistsError):
        save_network(path, network(), CARD, new=True)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("reward_guidance.guidance.network.file.save_file", full)
    with pytest.raises(GuidanceError, match="No space left.*save again"):
        save_network(tmp_path / "likes.safetensors", network(), CARD)
    assert not list(tmp_path.iterdir())
