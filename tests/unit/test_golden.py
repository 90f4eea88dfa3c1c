"""Files that were made by the first release, and the numbers that they rest on: what users have goes on working."""

import json
import shutil

import pytest
import torch
from reward_guidance.guidance import one_step
from reward_guidance.guidance.data.batches import FreshPairs, StoredPairs
from reward_guidance.guidance.data.collection import SHARD, Collection
from reward_guidance.guidance.data.samples import noise, percents
from reward_guidance.guidance.network.file import load_network
from reward_guidance.guidance.network.forms import FORMS
from reward_guidance.guidance.network.unet import Architecture
from reward_guidance.guidance.process import Flow
from reward_guidance.guidance.randomness import generator
from reward_guidance.guidance.training.labels import label
from reward_guidance.guidance.training.loop import Training
from reward_guidance.guidance.training.objectives import Plan, Task
from reward_guidance.tests.unit.fixtures.golden import make

OUTPUTS = json.loads((make.FOLDER / "outputs.json").read_text(encoding="utf-8"))
TRAINED = {
    "weighted": ([-0.827289, -0.198625, 0.692831, 0.811529], -0.02362),
    "potential": ([0.026198, 0.117014, 0.544508, 0.811529], 1.94846),
    "noise": ([-0.872344, -0.074814, 0.129365, 0.811529], 0.00294),
}
"""Two numbers of x, the noise level and the weight of the first state of a training, and its loss after five steps."""


@pytest.fixture(params=make.BASES)
def collection(request, tmp_path) -> Collection:
    """A copy that can be written to."""
    return Collection.open(shutil.copytree(make.FOLDER / request.param, tmp_path / request.param))


@pytest.mark.parametrize("form", FORMS)
def test_a_saved_network_guides_as_it_did(form):
    network, card = load_network(make.FOLDER / f"{form}.safetensors")
    assert card == make.card(form) and form in card.describe()
    torch.testing.assert_close(
        torch.tensor(make.applied(form, network)), torch.tensor(OUTPUTS[form]), rtol=0, atol=1e-6
    )


def test_a_collection_holds_what_it_did(collection):
    target, loaded = collection.description.base.target, collection.load()
    assert collection.description == make.description(target) and loaded.numbers.tolist() == list(range(SHARD))
    for row, expected in enumerate(make.samples(target, range(SHARD))):
        assert torch.equal(loaded.clean[torch.tensor([row])][0], expected.clean.half())
        assert torch.equal(loaded.denoised[torch.tensor([row])][0], expected.denoised.half())
        assert torch.equal(loaded.scores[row], expected.scores) and torch.equal(loaded.sigma[row], expected.sigma)
    assert torch.equal(torch.stack(list(loaded.text.tokens)), make.TEXT.tokens.half())
    assert torch.equal(loaded.text.pooled, make.TEXT.pooled.half())
    assert loaded.seeds[:2] == [11, 12] and loaded.prompts[:4].tolist() == [0, 1, 2, 0]


def test_a_collection_goes_on(collection):
    target = collection.description.base.target
    again = Collection.create(collection.folder, make.description(target), lambda: pytest.fail("the text is on disk"))
    assert again.complete(SHARD) and list(again.missing(SHARD + 3)) == [range(SHARD, SHARD + 3)]
    again.add(range(SHARD, SHARD + 3), make.samples(target, range(SHARD, SHARD + 3)))
    assert again.complete(SHARD + 3) and again.load().numbers.tolist() == list(range(SHARD + 3))


@pytest.mark.parametrize("trained", TRAINED)
def test_a_training_takes_the_steps_it_did(trained):
    """On batches that are what they were."""
    samples = Collection.open(make.FOLDER / ("noise" if trained == "noise" else "data")).load()
    weights, _ = label(samples.rewards(), samples.prompts, 1.0)
    pairs = {
        "weighted": StoredPairs(samples, weights, Flow()),
        "potential": FreshPairs(samples, weights, Flow()),
        "noise": one_step.NoisePairs(samples.clean, weights, samples.text, samples.prompts),
    }[trained]
    options = {
        "potential": {"objective": "potential", "form": "potential", "fresh": True},
        "noise": {"form": "noise"},
    }.get(trained, {})
    plan, process = (
        Plan(steps=5, batch=8, learning_rate=0.01, **options),
        one_step.PROCESS if trained == "noise" else Flow(),
    )
    sizes = Architecture(4, FORMS[plan.form].inputs, 6, 7, width=8, levels=2, blocks=1, scalar=trained == "potential")
    training = Training(pairs, Task(process, plan), sizes, pooled=samples.text.pooled)
    batch = pairs.batch(8, (plan.seed, 0))
    found = [*batch.x.flatten()[:2].tolist(), float(batch.sigma[0]), float(batch.weights[0])]
    assert found == pytest.approx(TRAINED[trained][0], abs=1e-5)
    assert [progress.loss for progress in training][-1] == pytest.approx(TRAINED[trained][1], abs=1e-3)


def test_random_numbers_are_what_they_were():
    """Of them only the seeds lie on disk: the noise of a stored state, its noise level, and what is held out are drawn again."""
    assert noise((2, 2), 3, 1).flatten().tolist() == pytest.approx([2.098817, 0.129911, 0.308666, 1.374812], abs=1e-5)
    assert noise((2,), 2**64 - 1, 0).tolist() == pytest.approx([-0.81754, -0.737626], abs=1e-5)
    assert torch.rand(2, generator=generator(7)).tolist() == pytest.approx([0.344643, 0.256612], abs=1e-5)
    assert torch.rand(2, generator=generator(7, -1, 2)).tolist() == pytest.approx([0.335772, 0.741511], abs=1e-5)
    assert percents(3, 4).tolist() == pytest.approx([0.119608, 0.273121, 0.503595, 0.888721], abs=1e-5)
    assert percents(3, 0).tolist() == []


def test_the_same_samples_are_held_out():
    samples = Collection.open(make.FOLDER / "data").load()
    assert samples.split(0.1)[1].tolist() == [4]
    assert samples.split(0.3)[1].tolist() == [2, 4, 10, 11, 15, 16, 18, 20, 22, 26, 27, 28, 29]
