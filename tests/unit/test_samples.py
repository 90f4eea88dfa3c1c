"""Collections of labelled samples: whole or absent, resumable, and refused where they do not fit."""

import dataclasses
import math
import shutil
import subprocess
import sys

import pytest
import torch
from reward_guidance.guidance.data import collection as collections
from reward_guidance.guidance.data.batches import FreshPairs, StoredPairs
from reward_guidance.guidance.data.collection import SHARD, Collection
from reward_guidance.guidance.data.description import Description, was_and_is
from reward_guidance.guidance.data.samples import Sample, Texts, states
from reward_guidance.guidance.errors import GuidanceError
from reward_guidance.guidance.network.card import Base
from reward_guidance.guidance.network.unet import Architecture, Text
from reward_guidance.guidance.process import Flow, column
from reward_guidance.guidance.rewards import CombinedReward, Reward
from reward_guidance.guidance.training.labels import label
from reward_guidance.guidance.training.loop import Training, fit
from reward_guidance.guidance.training.objectives import Plan, Task
from reward_guidance.guidance.training.report import overview
from reward_guidance.tests.unit.shared import CHECKOUT, collected, random_sample

DESCRIPTION = Description(
    base=Base("SD3", "SD3", 4, "Flow"), shape=(4, 8, 8), levels=2, prompts=("a cat", "a dog", "a hat"), rewards=("likes", "blue"),
    reward_means=(1.0, 0.0), reward_stds=(2.0, 1.0), seed=11, settings="likes.safetensors\n20 steps",
)  # fmt: skip
TEXT = Text(torch.randn(3, 5, 6), torch.randn(3, 7))


def sample(number: int) -> Sample:
    return random_sample(number, DESCRIPTION)


def collect(folder, count: int, description: Description = DESCRIPTION) -> Collection:
    return collected(folder, description, TEXT, count)


def test_samples_come_back_in_half_precision(tmp_path):
    loaded = collect(tmp_path, SHARD + 3).load()
    assert len(loaded.clean) == SHARD + 3 and loaded.prompts.tolist()[:4] == [0, 1, 2, 0]
    expected = sample(SHARD + 1)
    row, levels = torch.tensor([SHARD + 1]), torch.tensor([1])
    torch.testing.assert_close(loaded.clean[row][0].float(), expected.clean, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(loaded.denoised[row][0].float(), expected.denoised, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(loaded.denoised[row, levels][0].float(), expected.denoised[1], rtol=1e-3, atol=1e-3)
    assert torch.equal(loaded.scores[SHARD + 1], expected.scores) and torch.equal(
        loaded.sigma[SHARD + 1], expected.sigma
    )
    torch.testing.assert_close(loaded.text[torch.arange(3)].tokens.float(), TEXT.tokens, rtol=1e-3, atol=1e-3)


def test_rewards_are_weighted_sums_of_standardized_scores(tmp_path):
    loaded = collect(tmp_path, 5).load()
    torch.testing.assert_close(loaded.rewards((2.0, -1.0)), ((loaded.scores[:, 0] - 1) - loaded.scores[:, 1]) / 5**0.5)


def test_rewards_are_those_of_the_combination(tmp_path):
    """So that a gradient follows what labels say."""
    loaded = collect(tmp_path, 5).load()
    parts = [Reward(), Reward()]
    for part, mean, std in zip(parts, DESCRIPTION.reward_means, DESCRIPTION.reward_stds, strict=True):
        part.reference_mean, part.reference_std = mean, std
    combined = CombinedReward(parts, (3.0, 0.5)).combine(list(zip(parts, loaded.scores.unbind(1), strict=True)))
    torch.testing.assert_close(loaded.rewards((3.0, 0.5)), combined)


def test_a_collection_goes_on_where_it_was_stopped(tmp_path):
    collection = collect(tmp_path, SHARD)
    assert list(collection.missing(SHARD)) == []
    assert list(collection.missing(2 * SHARD + 5)) == [range(SHARD, 2 * SHARD), range(2 * SHARD, 2 * SHARD + 5)]
    whole = collect(tmp_path / "other", 2 * SHARD + 5).load()
    resumed, rows = collect(tmp_path, 2 * SHARD + 5).load(), torch.arange(2 * SHARD + 5)
    assert torch.equal(resumed.clean[rows], whole.clean[rows]) and torch.equal(resumed.numbers, rows)


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
    ("changed", "said"),
    [
        ({"base": Base("Flux", "Flux", 16, "Flow")}, "model was SD3 and is now Flux, latents was SD3 and is now Flux and 1 more"),
        ({"prompts": ("a cat", "a cow", "a hat")}, "prompts was a dog and is now a cow. Choose another folder"),
        ({"prompts": ("a cat",)}, "prompts was a dog and is now none"),
        ({"prompts": ("a cat", "a dog" + 500 * "!", "a hat")}, "prompts was a dog and is now a dog!{55}…. Choose"),
        ({"shape": (4, 8, 16)}, r"shape was \(4, 8, 8\) and is now \(4, 8, 16\)"),
        ({"seed": 12, "settings": "likes.safetensors\n30 steps"}, "seed was 11 and is now 12, settings was 20 steps and is now 30 steps"),
    ],
)  # fmt: skip
def test_another_collection_is_not_mixed_in(tmp_path, changed, said):
    collect(tmp_path, 3)
    with pytest.raises(GuidanceError, match=said):
        Collection.create(tmp_path, dataclasses.replace(DESCRIPTION, **changed), TEXT)


def test_long_prompts_differ_where_they_are_shown():
    before = "masterpiece, best quality, " * 5
    assert (
        was_and_is(before + "a cat", before + "a dog")
        == "was …ce, best quality, a cat and is now …ce, best quality, a dog"
    )


def test_a_folder_that_was_begun_with_other_prompts_is_begun_anew(tmp_path):
    """Stopped between its two first files."""
    collect(tmp_path, 0)
    (tmp_path / "collection.json").unlink()
    other = dataclasses.replace(DESCRIPTION, prompts=("a cow", "a pig"))
    collection = Collection.create(tmp_path, other, Texts([torch.ones(1, 6), torch.ones(2, 6)], torch.zeros(2, 7)))
    assert [len(tokens) for tokens in collection.text().tokens] == [1, 2]


def test_shards_without_a_description_are_not_adopted(tmp_path):
    collect(tmp_path, 3)
    (tmp_path / "collection.json").unlink()
    with pytest.raises(GuidanceError, match="no collection.json that describes them"):
        collect(tmp_path, 3)


@pytest.mark.parametrize(
    "changed",
    [{"shape": (4, 16, 16)}, {"levels": 3}, {"rewards": ("likes",), "reward_means": (0.0,), "reward_stds": (1.0,)}],
)
def test_shards_of_another_collection_are_refused(tmp_path, changed):
    """And collected again once they are taken away."""
    other = collect(tmp_path / "other", SHARD + 3)
    mine = collect(tmp_path / "mine", SHARD + 3, dataclasses.replace(DESCRIPTION, **changed))
    shutil.copy(mine.path(1), other.path(1))
    for look in (other.load, lambda: overview(other)):
        with pytest.raises(
            GuidanceError,
            match="shard-00001.safetensors in other belongs to another collection: move it away and collect again",
        ):
            look()
    other.path(1).unlink()
    assert list(other.missing(SHARD + 3)) == [range(SHARD, SHARD + 3)]


def test_copies_of_shards_do_not_count_twice(tmp_path):
    collection = collect(tmp_path, 3)
    shutil.copy(collection.path(0), tmp_path / "shard-00000 (copy).safetensors")
    assert len(collection.load().numbers) == 3


@pytest.mark.parametrize("damage", ["empty", "no prompts", "broken", "[]", "nothing"])
def test_folders_without_samples_are_refused(tmp_path, damage):
    if damage != "nothing":
        collect(tmp_path, 3 if damage != "empty" else 0)
    if damage == "no prompts":
        (tmp_path / "prompts.safetensors").unlink()
    if damage in ("broken", "[]"):
        (tmp_path / "collection.json").write_text(damage)
    with pytest.raises(GuidanceError, match="holds no samples|missing or damaged|is damaged"):
        Collection.open(tmp_path).load()


def test_the_text_of_the_prompts_is_written_anew(tmp_path):
    collection = collect(tmp_path, 3)
    (tmp_path / "prompts.safetensors").write_bytes(b"half")
    assert not collection.complete(3)
    with pytest.raises(GuidanceError, match="prompts.safetensors in .* collect again, which rewrites it"):
        collection.load()
    assert collect(tmp_path, 3).complete(3) and len(collection.load().numbers) == 3


@pytest.mark.parametrize("part", ["clean", "scores", "sigma", "denoised"])
def test_samples_that_are_not_numbers_are_left_out(tmp_path, part):
    """They keep their place, so that a collection does not end at them, and are no part of what is learned."""
    broken = dataclasses.replace(sample(1), **{part: torch.full_like(getattr(sample(1), part), math.inf)})
    collection = Collection.create(tmp_path, DESCRIPTION, TEXT)
    collection.add(range(4), [sample(0), broken, sample(2), sample(3)])
    loaded = collection.load()
    assert collection.complete(4) and loaded.numbers.tolist() == [0, 2, 3] and loaded.unscored == 1
    torch.testing.assert_close(loaded.clean[torch.tensor([1])][0].float(), sample(2).clean, rtol=1e-3, atol=1e-3)
    assert label(loaded.rewards((1.0, 1.0)), loaded.prompts, 1.0)[0].isfinite().all()
    assert "1 more could not be scored and are left out" in overview(collection)
    with pytest.raises(GuidanceError, match="None of 2 samples is made of finite numbers"):
        collection.add(range(SHARD, SHARD + 2), [broken, broken])
    assert not collection.path(1).exists()


def test_a_full_disk_keeps_what_is_there(tmp_path, monkeypatch):
    collection = collect(tmp_path, SHARD)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(collections, "save_file", full)
    with pytest.raises(GuidanceError, match="No space left.*continues from here"):
        collection.add(range(SHARD, SHARD + 1), [sample(SHARD)])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "collection.json",
        "prompts.safetensors",
        "shard-00000.safetensors",
    ]
    assert len(collection.load().clean) == SHARD


def test_stored_states_are_one_for_each_sample_and_noise_level(tmp_path):
    """x = (1-σ)·x0 + σ·ε, with an ε that is the same in every batch, and has nothing in common with that of other states."""
    loaded = collect(tmp_path, 6).load()
    clean, denoised = loaded.clean[torch.arange(6)].float(), loaded.denoised[torch.arange(6)].float()
    drawn: dict[tuple[int, int], torch.Tensor] = {}
    for step in range(4):
        batch = StoredPairs(loaded, torch.ones(6), Flow()).batch(16, (3, step))
        for i, sigma in enumerate(batch.sigma.tolist()):
            row = int((clean - batch.clean[i]).flatten(1).norm(dim=1).argmin())
            level = int((loaded.sigma[row] - sigma).abs().argmin())
            noise = (batch.x[i] - (1 - sigma) * clean[row]) / sigma
            torch.testing.assert_close(noise, drawn.setdefault((row, level), noise), rtol=0, atol=1e-4)
            assert torch.equal(batch.denoised[i], denoised[row, level])
            assert torch.equal(batch.text.tokens[i], loaded.text.tokens[row % 3].float())
    states = torch.stack(list(drawn.values())).flatten(1)
    assert len(states) == 12 and states.std() == pytest.approx(1, abs=0.1)
    assert (torch.corrcoef(states) - torch.eye(12)).abs().max() < 0.3


def test_fresh_noise_is_new_in_every_batch_at_levels_of_the_collection(tmp_path):
    loaded = collect(tmp_path, 6).load()
    pairs = FreshPairs(loaded, torch.ones(6), Flow())
    first, second = (pairs.batch(16, (3, step)) for step in range(2))
    drawn = [
        (batch.x - (1 - column(batch.sigma, batch.x)) * batch.clean) / column(batch.sigma, batch.x)
        for batch in (first, second)
    ]
    assert torch.cdist(drawn[0].flatten(1), drawn[1].flatten(1)).min() > 10
    assert set(first.sigma.tolist()) <= set(loaded.sigma.flatten().tolist())
    assert torch.equal(first.denoised, first.clean)


def test_states_are_noised_from_the_precision_they_are_stored_in(tmp_path):
    """What the model was asked about is what training shows the network."""
    asked, scores, seeds = [], torch.randn(6, 2), [DESCRIPTION.seed_of(i) for i in range(6)]
    sigmas = torch.rand(6, 2) * 0.9 + 0.05

    def denoise(x, sigma):
        asked.append((x, sigma))
        return x / 2

    collection = Collection.create(tmp_path, DESCRIPTION, TEXT)
    collection.add(range(6), states(torch.randn(6, 4, 8, 8), scores, seeds, sigmas, Flow(), denoise))
    batch = StoredPairs(collection.load(), torch.ones(6), Flow()).batch(16, (3, 4))
    points = {float(level): point for x, sigma in asked for point, level in zip(x, sigma, strict=True)}
    for x, sigma in zip(batch.x, batch.sigma.tolist(), strict=True):
        assert torch.equal(x, points[sigma])


def test_texts_are_as_long_as_the_longest_of_them():
    texts = Texts([torch.ones(2, 3), torch.ones(5, 3), torch.ones(1, 3)], torch.arange(3.0)[:, None])
    some = texts[torch.tensor([2, 0])]
    assert (
        some.tokens.shape == (2, 2, 3)
        and some.tokens.any(2).sum(1).tolist() == [1, 2]
        and some.pooled.flatten().tolist() == [2, 0]
    )


def test_what_is_not_asked_for_is_not_read(tmp_path):
    """Of 64 MB on disk, a batch reads what it needs."""
    description = dataclasses.replace(DESCRIPTION, shape=(16, 64, 64), levels=15)
    collection = Collection.create(tmp_path, description, TEXT)
    one = Sample(torch.ones(16, 64, 64), torch.ones(2), torch.rand(15), torch.ones(15, 16, 64, 64))
    collection.add(range(SHARD), [one] * SHARD)
    script = f"""
import resource, runpy, torch
runpy.run_path({str(CHECKOUT / "tests" / "conftest.py")!r})
from pathlib import Path
from reward_guidance.guidance.process import Flow, column
from reward_guidance.guidance.data.batches import StoredPairs
from reward_guidance.guidance.data.collection import Collection
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
loaded = Collection(Path({str(tmp_path)!r}), Collection.open(Path({str(tmp_path)!r})).description).load()
StoredPairs(loaded.rows(torch.arange(16)), torch.ones(16), Flow()).batch(4, (1,))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 24


@pytest.mark.parametrize("kind", [StoredPairs, FreshPairs])
def test_parts_of_a_batch_make_the_batch(tmp_path, kind):
    pairs = kind(collect(tmp_path, 6).load(), torch.ones(6), Flow())
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
    network = fit(
        Training(
            StoredPairs(loaded, weights, Flow()), task, Architecture(4, tokens=6, pooled=7, width=16).fitted((4, 8, 8))
        )
    )
    assert any(parameter.any() for parameter in network.last.parameters())
