"""LAION's aesthetic head, and the image tower that lies in another file."""

import pytest
import torch
from reward_guidance.guidance.rewards import LoadOptions, RewardError, evaluate, load_reward
from reward_guidance.tests.standins.rewards import HEADS, aesthetic_tower, head, save_aesthetic, transformers_model
from safetensors.torch import save_file

HEAD = "sac+logos+ava1-l14-linearMSE.pth"


@pytest.fixture
def files(tmp_path):
    head_file, tower = tmp_path / "reward_models" / HEAD, tmp_path / "clip_vision" / "l14.safetensors"
    head_file.parent.mkdir()
    save_aesthetic(head_file, tower)
    return head_file, tower


def score(reward):
    return evaluate(reward, torch.linspace(0, 1, 3 * 32 * 32).view(1, 3, 32, 32), "")


def test_the_tower_is_found_beside_the_head_in_a_folder_or_named(files):
    head_file, tower = files
    found = load_reward(head_file, LoadOptions(image_folders=(tower.parent,)))
    assert (found.name, found.needs_prompt, found.differentiable) == (HEAD.removesuffix(".pth"), False, True)
    named = load_reward(head_file, LoadOptions(image_tower=tower))
    deep = head_file.parent / "clip" / "openai" / "anything.safetensors"
    deep.parent.mkdir(parents=True)
    tower.rename(deep)
    beside = load_reward(head_file)
    assert score(found) == score(named) == score(beside)


def test_the_tower_is_found_in_a_folder_that_is_linked(files, tmp_path):
    """As ComfyUI lists it; links that lead round are no trouble."""
    head_file, tower = files
    shared = tmp_path / "models" / "clip_vision" / "shared"
    shared.parent.mkdir(parents=True)
    shared.symlink_to(tower.parent, target_is_directory=True)
    (tower.parent / "round").symlink_to(shared.parent, target_is_directory=True)
    found = load_reward(head_file, LoadOptions(image_folders=(shared.parent,)))
    assert score(found) == score(load_reward(head_file, LoadOptions(image_tower=tower)))


def test_the_tower_may_be_a_checkpoint_or_a_folder(files, tmp_path):
    head_file, tower = files
    expected = score(load_reward(head_file, LoadOptions(image_tower=tower)))
    state = aesthetic_tower().state_dict()
    torch.save(state, tmp_path / "whole.pt")
    vision = {key: value for key, value in state.items() if key.startswith("vis")}
    (tmp_path / "folder").mkdir()
    save_file(vision, tmp_path / "folder" / "model.safetensors", HEADS)
    in_folder = load_reward(head_file, LoadOptions(image_folders=(tmp_path / "folder",)))
    assert torch.allclose(score(in_folder), expected)
    tower.unlink()
    (tmp_path / "folder" / "model.safetensors").unlink()
    assert load_reward(head_file, LoadOptions(image_folders=(tmp_path,))).tower is not None


def test_other_towers_are_passed_over(files):
    """LAION's L/14 has the same shapes but another space; in open_clip's layout only OpenAI's own archive, or the name, says whose it is."""
    from reward_guidance.guidance.rewards.clip_checkpoint import to_open_clip_layout

    head_file, tower = files
    expected = score(load_reward(head_file, LoadOptions(image_tower=tower)))
    folder = tower.parent
    save_file(transformers_model().state_dict(), folder / "another_size.safetensors")
    laion = to_open_clip_layout(aesthetic_tower().state_dict())
    save_file(laion, folder / "clip.safetensors")
    save_file(aesthetic_tower().state_dict(), folder / "clip-vit-l-14-laion2b.safetensors")
    save_file({"vision_model.embeddings.patch_embedding.weight": torch.zeros(())}, folder / "damaged.safetensors")
    (folder / "broken.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{broken")
    (folder / "legacy.pt").write_bytes(b"\x80\x02.")
    assert score(load_reward(head_file, LoadOptions(image_folders=(folder,)))) == expected
    tower.unlink()
    with pytest.raises(RewardError, match="needs the image tower"):
        load_reward(head_file, LoadOptions(image_folders=(folder,)))
    for name, sizes in (("ViT-L-14.pt", {"input_resolution": torch.tensor(32)}), ("ViT-L-14-openai.pt", {})):
        torch.save(laion | sizes, folder / name)
        reward = load_reward(head_file, LoadOptions(image_folders=(folder,)))
        assert reward.description == f"LAION aesthetic, with the image tower of {name.removesuffix('.pt')}"
        (folder / name).unlink()


def test_a_missing_tower_is_asked_for(files, tmp_path):
    head_file, tower = files
    words = "it needs the image tower of OpenAI's CLIP ViT-L/14; put model.safetensors of openai/clip-vit-large-patch14 (Hugging Face) into"
    for options, folder in (
        (LoadOptions(), head_file.parent),
        (LoadOptions(image_folders=(tmp_path / "none",)), tmp_path / "none"),
    ):
        with pytest.raises(RewardError) as caught:
            load_reward(head_file, options)
        assert str(caught.value) == f"{HEAD}: {words} {folder}."


def test_a_tower_that_does_not_fit_is_refused(files, tmp_path):
    head_file, _ = files
    save_file({"a": torch.zeros(1)}, tmp_path / "none.safetensors")
    with pytest.raises(
        RewardError, match="none.safetensors has no image tower that ends in 16 numbers; it needs that of OpenAI's"
    ):
        load_reward(head_file, LoadOptions(image_tower=tmp_path / "none.safetensors"))


GOOD = head(16).state_dict()
HEADS_THAT_ARE_NONE = {
    "with activations between": (
        {f"layers.{i}.{part}": torch.zeros(1) for i in (0, 3, 6, 9, 11) for part in ("weight", "bias")},
        "is not a reward",
    ),
    "of five numbers": (
        GOOD | {"layers.7.weight": torch.zeros(5, 4), "layers.7.bias": torch.zeros(5)},
        "its head ends in 5 numbers",
    ),
    "that does not chain": (GOOD | {"layers.4.weight": torch.zeros(8, 99)}, "do not follow each other"),
    "of one dimension": (
        GOOD | {"layers.0.weight": torch.zeros(20)},
        "the layers of its head do not follow each other",
    ),
    "of no dimension": (GOOD | {"layers.7.weight": torch.zeros(())}, "do not follow each other"),
}


@pytest.mark.parametrize(("state", "message"), HEADS_THAT_ARE_NONE.values(), ids=HEADS_THAT_ARE_NONE)
def test_heads_that_are_none(tmp_path, state, message):
    torch.save(state, tmp_path / HEAD)
    with pytest.raises(RewardError, match=message) as caught:
        load_reward(tmp_path / HEAD)
    assert "\n" not in str(caught.value)
