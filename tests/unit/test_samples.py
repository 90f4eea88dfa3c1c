"""Collections of labelled samples: whole or absent, resumable, and refused where they do not fit."""

import dataclasses

import pytest
import torch
from reward_guidance.guidance import samples
from reward_guidance.guidance.errors import GuidanceError
from reward_guidance.guidance.files import Base
from reward_guidance.guidance.network import Architecture, Text
from reward_guidance.guidance.process import Flow
from reward_guidance.guidance.samples import SHARD, Collection, Description, Sample, StoredPairs
from reward_guidance.guidance.training import Plan, Task, Training, fit, label

DESCRIPTION = Description(
    base=Base("SD3", "SD3", 4, "Flow"), shape=(4, 8, 8), levels=2, prompts=("a cat", "a dog", "a hat"), rewards=("likes", "blue"),
    reward_means=(1.0, 0.0), reward_stds=(2.0, 1.0), seed=11,
)  # fmt: skip
TEXT = Text(torch.randn(3, 5, 6), torch.randn(3, 7))


def sample(number: int) -> Sample:
    rng = torch.Generator().manual_seed(number)
    draw = lambda *shape: torch.randn(shape, generator=rng)  # noqa: E731
    return Sample(draw(4, 8, 8), draw(2), torch.rand(2, generator=rng) * 0.9 + 0.05, draw(2, 4, 8, 8))


def collect(folder, count: int, description: Description = DESCRIPTION) -> Collection:
    collection = Collection.create(folder, description, TEXT)
    for numbers in collection.missing(count):
        collection.add(numbers, [sample(number) for number in numbers])
    return collection


def test_samples_come_back_in_half_precision(tmp_path):
    loaded = collect(tmp_path, SHARD + 3).load()
    assert len(loaded.clean) == SHARD + 3 and loaded.prompts.tolist()[:4] == [0, 1, 2, 0]
    expected = sample(SHARD + 1)
    torch.testing.assert_close(loaded.clean[SHARD + 1].float(), expected.clean, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(loaded.denoised[SHARD + 1].float(), expected.denoised, rtol=1e-3, atol=1e-3)
    assert torch.equal(loaded.scores[SHARD + 1], expected.scores) and torch.equal(loaded.sigma[SHARD + 1], expected.sigma)
    torch.testing.assert_close(loaded.text.tokens.float(), TEXT.tokens, rtol=1e-3, atol=1e-3)


def test_rewards_are_weighted_sums_of_standardized_scores(tmp_path):
    loaded = collect(tmp_path, 5).load()
    torch.testing.assert_close(loaded.rewards((1.0, -0.5)), (loaded.scores[:, 0] - 1) / 2 - 0.5 * loaded.scores[:, 1])


def test_a_collection_goes_on_where_it_was_stopped(tmp_path):
    collection = collect(tmp_path, SHARD)
    assert list(collection.missing(SHARD)) == []
    assert list(collection.missing(2 * SHARD + 5)) == [range(SHARD, 2 * SHARD), range(2 * SHARD, 2 * SHARD + 5)]
    whole = collect(tmp_path / "other", 2 * SHARD + 5).load()
    assert torch.equal(collect(tmp_path, 2 * SHARD + 5).load().clean, whole.clean)


def test_a_short_last_shard_is_filled_up_when_more_are_wanted(tmp_path):
    collection = collect(tmp_path, SHARD + 2)
    assert list(collection.missing(SHARD + 9)) == [range(SHARD, SHARD + 9)]
    assert list(collection.missing(SHARD + 1)) == []


def test_a_truncated_shard_is_named_and_redone(tmp_path):
    collection = collect(tmp_path, 2 * SHARD)
    path = collection.path(0)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(GuidanceError, match="shard-00000.safetensors.*damaged"):
        collection.load()
    assert list(collection.missing(2 * SHARD)) == [range(SHARD)]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"base": Base("Flux", "Flux", 16, "Flow")}, "made for SD3.*the model is Flux"),
        ({"prompts": ("a cat",)}, "another prompts"),
        ({"seed": 12, "settings": "euler"}, "another seed, settings"),
    ],
)  # fmt: skip
def test_another_collection_is_not_mixed_in(tmp_path, change, said):
    collect(tmp_path, 3)
    with pytest.raises(GuidanceError, match=said):
        Collection.create(tmp_path, dataclasses.replace(DESCRIPTION, **change), TEXT)


def test_shards_of_another_shape_are_refused(tmp_path):
    collect(tmp_path / "a", 3)
    other = collect(tmp_path / "b", 3, dataclasses.replace(DESCRIPTION, shape=(4, 16, 16)))
    with pytest.raises(GuidanceError, match="another shape"):
        other.load()


@pytest.mark.parametrize("damage", ["empty", "no prompts", "broken", "nothing"])
def test_folders_without_samples_are_refused(tmp_path, damage):
    if damage != "nothing":
        collect(tmp_path, 3 if damage != "empty" else 0)
    if damage == "no prompts":
        (tmp_path / "prompts.safetensors").unlink()
    if damage == "broken":
        (tmp_path / "collection.json").write_text("{")
    with pytest.raises(GuidanceError, match="holds no samples|missing or damaged|is damaged"):
        Collection.open(tmp_path).load()


def test_rewards_that_are_not_numbers_are_not_written(tmp_path):
    collection = Collection.create(tmp_path, DESCRIPTION, TEXT)
    with pytest.raises(GuidanceError, match="not a finite number"):
        collection.add(range(1), [dataclasses.replace(sample(0), scores=torch.tensor([1.0, float("nan")]))])
    assert list(collection.missing(1)) == [range(1)]


def test_a_full_disk_keeps_what_is_there(tmp_path, monkeypatch):
    collection = collect(tmp_path, SHARD)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(samples, "save_file", full)
    with pytest.raises(GuidanceError, match="No space left.*goes on from here"):
        collection.add(range(SHARD, SHARD + 1), [sample(SHARD)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["collection.json", "prompts.safetensors", "shard-00000.safetensors"]
    assert len(collection.load().clean) == SHARD


def test_stored_states_are_noised_as_they_were_when_collected(tmp_path):
    collection = collect(tmp_path, 6)
    loaded = collection.load()
    batch = StoredPairs(loaded, torch.ones(6), Flow()).batch(16, (3, 4))
    for i in range(16):
        row = int((loaded.clean.float() - batch.clean[i]).flatten(1).norm(dim=1).argmin())
        level = int((loaded.sigma[row] - batch.sigma[i]).abs().argmin())
        drawn = samples.noise((4, 8, 8), DESCRIPTION.seed_of(row), level)
        torch.testing.assert_close(batch.x[i], Flow().add_noise(batch.clean[i], drawn, float(batch.sigma[i])))
        assert torch.equal(batch.denoised[i], loaded.denoised[row, level].float())
        assert torch.equal(batch.text.tokens[i], loaded.text.tokens[row % 3].float())


def test_parts_of_a_batch_make_the_batch(tmp_path):
    pairs = StoredPairs(collect(tmp_path, 6).load(), torch.ones(6), Flow())
    whole, parts = pairs.batch(8, (1,)), [pairs.batch(8, (1,), slice(rank, None, 2)) for rank in range(2)]
    assert torch.equal(whole.x[0::2], parts[0].x) and torch.equal(whole.x[1::2], parts[1].x)


def test_held_out_samples_stay_held_out_when_more_are_collected(tmp_path):
    few, many = (collect(tmp_path, count).load() for count in (SHARD, 2 * SHARD))
    assert few.split(0.2)[1].tolist() == [row for row in many.split(0.2)[1].tolist() if row < SHARD]
    assert 0 < len(many.split(0.2)[1]) < SHARD


def test_training_from_shards(tmp_path):
    loaded = collect(tmp_path, 2 * SHARD).load()
    weights, _ = label(loaded.rewards((1.0, 1.0)), loaded.prompts, 1.0)
    task = Task(Flow(), Plan(steps=5, batch=8))
    network = fit(Training(StoredPairs(loaded, weights, Flow()), task, Architecture(4, tokens=6, pooled=7, width=16).fitted((4, 8, 8))))
    assert any(parameter.any() for parameter in network.last.parameters())
