"""Collections and checkpoints that were damaged, mixed up or taken away: one sentence says what to do, and doing that helps."""

import dataclasses
import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from reward_guidance.guidance.data.batches import StoredPairs
from reward_guidance.guidance.data.collection import SHARD, Collection
from reward_guidance.guidance.data.description import Description
from reward_guidance.guidance.data.samples import Sample
from reward_guidance.guidance.errors import GuidanceError
from reward_guidance.guidance.network.card import Base
from reward_guidance.guidance.network.unet import Text
from reward_guidance.guidance.process import Flow, process_named
from reward_guidance.guidance.training.checkpoint import KEPT
from reward_guidance.guidance.training.loop import fit
from reward_guidance.guidance.training.recipe import plan_for, prepare
from reward_guidance.tests.unit.shared import collected, random_sample
from safetensors.torch import load_file, save_file

DESCRIPTION = Description(
    base=Base("SD3", "SD3", 4, "Flow"), shape=(4, 4, 4), levels=2, prompts=("a cat", "a dog"), rewards=("likes", "blue"),
    reward_means=(0.0, 0.0), reward_stds=(1.0, 1.0), seed=3, reward_weights=(1.0, 0.5),
)  # fmt: skip
TEXT = Text(torch.randn(2, 3, 6), torch.randn(2, 5))
COUNT = SHARD + 8


def sample(number: int) -> Sample:
    return random_sample(number, DESCRIPTION)


def collect(folder: Path, description: Description = DESCRIPTION, count: int = COUNT) -> Collection:
    return collected(folder, description, TEXT, count)


@pytest.fixture
def folder(tmp_path) -> Path:
    return collect(tmp_path / "likes").folder


def all_of(folder: Path) -> torch.Tensor:
    """Every sample of a collection, trained on as it is read."""
    samples = Collection.open(folder).load()
    StoredPairs(samples, torch.ones(len(samples)), Flow()).batch(64, (1,))
    return samples.clean[torch.arange(len(samples))]


def again(folder: Path, name: str) -> None:
    collect(folder)


def taken_away(folder: Path, name: str) -> None:
    path = folder / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    collect(folder)


def changed(**parts):
    """Tensors of a file changed, added, or taken out by None."""

    def damage(path: Path) -> None:
        tensors = load_file(path)
        for name, change in parts.items():
            tensors[name.replace("__", ".")] = change(tensors.get(name)) if change else None
        save_file({name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}, path)

    return damage


def instead(content: bytes):
    return lambda path: path.write_bytes(content)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def copied(name: str):
    return lambda path: shutil.copy(path.with_name(name), path)


def of_others(path: Path) -> None:
    """Of the same shapes, as prompts and rewards may have."""
    shutil.copy(collect(path.parents[1] / "others", dataclasses.replace(DESCRIPTION, seed=4)).path(0), path)


FIRST, SECOND, PROMPTS = "shard-00000.safetensors", "shard-00001.safetensors", "prompts.safetensors"
REDONE, ELSEWHERE = (
    "is damaged: collect again, which replaces only that shard, or delete it",
    "belongs to another collection: move it away",
)
ANEW = "is missing or damaged: collect again, which rewrites it"
INFINITE = "has values that are not finite numbers: delete that file and collect again"
DAMAGES = {
    "empty": (FIRST, instead(b""), REDONE, again),
    "half": (FIRST, lambda path: os.truncate(path, 3000), REDONE, again),
    "a web page": (FIRST, instead(b"<html>" * 100), REDONE, again),
    "too long": (FIRST, lambda path: path.write_bytes(path.read_bytes() + b"more"), REDONE, taken_away),
    "nothing in it": (FIRST, lambda path: save_file({}, path), REDONE, again),
    "fewer scores": (FIRST, changed(scores=lambda part: part[:-1]), REDONE, again),
    "fewer latents": (FIRST, changed(clean=lambda part: part[:-1]), "Its tensors have 31 and 32 rows", again),
    "one row of noise levels": (FIRST, changed(sigma=lambda part: part[:1]), REDONE, taken_away),
    "no rows": (FIRST, lambda path: changed(**dict.fromkeys(("clean", "scores", "sigma", "denoised"), lambda part: part[:0]))(path), REDONE, again),
    "more rows than a shard has": (FIRST, lambda path: changed(
        **dict.fromkeys(("clean", "scores", "sigma", "denoised"), lambda part: torch.cat([part, part[:1]])))(path), REDONE, again),
    "no scores": (FIRST, changed(scores=None), REDONE, again),
    "no latents": (FIRST, changed(clean=None), REDONE, again),
    "whole numbers": (FIRST, changed(scores=lambda part: part.int()), "It must have floating point tensors", again),
    "small numbers": (FIRST, changed(clean=lambda part: part.to(torch.float8_e4m3fn)), REDONE, again),
    "no score that is a number": (FIRST, changed(scores=lambda part: part * math.nan), "None of its samples has a score", again),
    "negative noise levels": (FIRST, changed(sigma=lambda part: -part), "It has impossible noise levels", again),
    "no noise": (FIRST, changed(sigma=lambda part: part * 0), REDONE, again),
    "infinite noise": (FIRST, changed(sigma=lambda part: part / 0), REDONE, again),
    "more than all noise": (FIRST, changed(sigma=lambda part: part + 1), REDONE, again),
    "the last of several": (SECOND, instead(b"half"), "collect again, with a count above 32, which replaces only that shard", again),
    "other shapes": (FIRST, changed(clean=lambda part: part[..., :2]), ELSEWHERE, taken_away),
    "more in it": (FIRST, changed(more=lambda part: torch.zeros(32)), ELSEWHERE, taken_away),
    "no dimension": (FIRST, changed(scores=lambda part: torch.zeros(())), ELSEWHERE, taken_away),
    "of other samples": (FIRST, of_others, ELSEWHERE, taken_away),
    "twice": (SECOND, copied(FIRST), "belongs to another place in this collection: move it away", taken_away),
    "a folder": (FIRST, a_folder, "cannot be read (Is a directory): correct that, or move it away", taken_away),
    "latents that are no numbers": (FIRST, changed(clean=lambda part: part * math.nan), INFINITE, taken_away),
    "answers that are no numbers": (FIRST, changed(denoised=lambda part: part / 0), INFINITE, taken_away),
    "no text": (PROMPTS, lambda path: path.unlink(), ANEW, again),
    "half a text": (PROMPTS, instead(b"half"), ANEW, again),
    "a text too many": (PROMPTS, changed(tokens__2=lambda part: torch.zeros(3, 6)), ANEW, again),
    "a text too few": (PROMPTS, changed(**{"pooled.1": None}), ANEW, again),
    "a text of another encoder": (PROMPTS, changed(**{"tokens.1": lambda part: part[:, :2]}), ANEW, again),
    "a flat text": (PROMPTS, changed(**{"tokens.1": lambda part: part[0]}), ANEW, again),
    "a text of whole numbers": (PROMPTS, changed(**{"tokens.0": lambda part: part.int(), "tokens.1": lambda part: part.int()}), ANEW, again),
    "a text that is no numbers": (PROMPTS, changed(**{"tokens.0": lambda part: part * math.nan}), INFINITE, taken_away),
    "vectors that are no numbers": (PROMPTS, changed(**{"pooled.0": lambda part: part * math.nan}), ANEW, again),
    "text of other prompts": (PROMPTS, lambda path: shutil.copy(
        collect(path.parents[1] / "others", dataclasses.replace(DESCRIPTION, prompts=("a", "b"))).folder / PROMPTS, path), ANEW, again),
}  # fmt: skip


@pytest.mark.parametrize(("name", "damage", "said", "advice"), DAMAGES.values(), ids=DAMAGES)
def test_what_a_message_says_helps(folder, name, damage, said, advice):
    whole = all_of(folder)
    damage(folder / name)
    with pytest.raises(GuidanceError) as refused:
        all_of(folder)
    told = str(refused.value)
    assert said in told and f"{name} in likes" in told and "\n" not in told and len(told) < 300
    advice(folder, name)
    assert torch.equal(all_of(folder), whole)


@pytest.mark.parametrize(
    "name", [name for name, (file, *_, advice) in DAMAGES.items() if file == FIRST and advice is again]
)
def test_a_damaged_shard_is_missing_and_the_others_are_not(folder, name):
    DAMAGES[name][1](folder / FIRST)
    collection = Collection.open(folder)
    assert list(collection.missing(COUNT)) == [range(SHARD)] and not collection.complete(COUNT)
    assert collection.first(4).numbers.tolist() == [SHARD, SHARD + 1, SHARD + 2, SHARD + 3]


@pytest.mark.parametrize("name", [name for name, (*_, said, _) in DAMAGES.items() if said == ELSEWHERE])
def test_what_is_somebody_elses_is_not_written_over(folder, name):
    DAMAGES[name][1](folder / FIRST)
    before = (folder / FIRST).read_bytes()
    assert not Collection.open(folder).complete(COUNT)
    with pytest.raises(GuidanceError, match="move it away"):
        collect(folder)
    with pytest.raises(GuidanceError, match="move it away"):
        Collection.open(folder).add(range(SHARD), [sample(number) for number in range(SHARD)])
    assert (folder / FIRST).read_bytes() == before


def test_a_file_by_another_name_for_a_number_is_no_shard(folder):
    for name in (
        "shard-000000.safetensors",
        "shard-0.safetensors",
        f"shard-{'9' * 30}.safetensors",
        "shard-٠٠٠٠٠.safetensors",
    ):
        shutil.copy(folder / FIRST, folder / name)
    assert len(all_of(folder)) == COUNT


def test_shards_of_older_versions_say_nothing_of_what_they_belong_to(folder):
    whole = all_of(folder)
    for path in folder.glob("*.safetensors"):
        save_file(load_file(path), path)
    assert torch.equal(all_of(folder), whole) and Collection.open(folder).complete(COUNT)


# collection.json


def set_to(**values):
    def damage(content: dict) -> None:
        for name, value in values.items():
            content[name] = value

    return damage


def base_set_to(**values):
    return lambda content: content["base"].update(values)


DAMAGED = "is damaged ("
WRONG = {
    "no base": lambda content: content.pop("base"),
    "no prompts": lambda content: content.pop("prompts"),
    "a base that is a text": set_to(base="SD3"),
    "a model that is a list": base_set_to(model=["SD3"]),
    "channels that are a text": base_set_to(channels="4"),
    "no channels": base_set_to(channels=0),
    "an unknown process": base_set_to(process="Bridge"),
    "a process of no scale": base_set_to(process="Flow nan"),
    "a process that is none": base_set_to(process=None),
    "an unknown target": base_set_to(target="text"),
    "null": set_to(shape=None),
    "a shape of texts": set_to(shape=["4", 4, 4]),
    "a nested shape": set_to(shape=[[4], 4, 4]),
    "a shape of nothing": set_to(shape=[]),
    "a shape with 0": set_to(shape=[4, 0, 4]),
    "a negative shape": set_to(shape=[4, -4, 4]),
    "a shape of truth": set_to(shape=[True, 4, 4]),
    "a shape of two": set_to(shape=[4, 4]),
    "negative levels": set_to(levels=-1),
    "no levels": set_to(levels=0),
    "half a level": set_to(levels=2.5),
    "levels without end": set_to(levels=10**400),
    "empty prompts": set_to(prompts=[]),
    "a prompt": set_to(prompts="a cat"),
    "nested prompts": set_to(prompts=[["a cat"], "a dog"]),
    "numbers of prompts": set_to(prompts=[1, 2]),
    "no rewards": set_to(rewards=[]),
    "more rewards": set_to(rewards=["likes", "blue", "red"]),
    "fewer means": set_to(reward_means=[0.0]),
    "a mean that is none": set_to(reward_means=[None, 0.0]),
    "a mean that is no number": set_to(reward_means=[math.nan, 0.0]),
    "a mean without end": set_to(reward_means=[1e300, 0.0]),
    "a mean of many digits": set_to(reward_means=[10**400, 0.0]),
    "a spread of 0": set_to(reward_stds=[0.0, 1.0]),
    "a negative spread": set_to(reward_stds=[1.0, -1.0]),
    "an infinite spread": set_to(reward_stds=[math.inf, 1.0]),
    "too small a spread": set_to(reward_stds=[1e-300, 1.0]),
    "more weights": set_to(reward_weights=[1.0, 1.0, 1.0]),
    "a weight that is no number": set_to(reward_weights=[math.nan, 1.0]),
    "a seed of 65 bits": set_to(seed=2**64),
    "a seed that is a text": set_to(seed="3"),
    "settings that are a number": set_to(settings=7),
    "a megabyte": set_to(seed="3" * 2**20),
    "megabytes of prompts": set_to(prompts={"a" * 2**20: "b" * 2**20}),
}


def refusal(folder: Path) -> str:
    with pytest.raises(GuidanceError) as refused:
        Collection.open(folder).load()
    with pytest.raises(GuidanceError):
        collect(folder)
    told = str(refused.value)
    assert (
        "collection.json in likes" in told
        and "collect into another folder" in told
        and "\n" not in told
        and len(told) < 400
    )
    assert len(all_of(collect(folder.with_name("another")).folder)) == COUNT
    return told


@pytest.mark.parametrize("damage", WRONG.values(), ids=WRONG)
def test_a_description_of_wrong_values_is_refused(folder, damage):
    path = folder / "collection.json"
    copy = path.read_text()
    content = json.loads(copy)
    damage(content)
    path.write_text(json.dumps(content))
    assert DAMAGED in refusal(folder)
    path.write_text(copy)
    assert len(all_of(folder)) == COUNT


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"null", b'"a"', b"7", b"\xff\xfe", b"{}", b"[" * 100_000, b'{"seed": 1, "seed": 2}', b'{"seed": ' + b"9" * 5000 + b"}",
        b'{"a": NaN' + b" " * 2**20,
    ],
    ids=lambda content: str(content[:12]),
)  # fmt: skip
def test_what_is_no_description_is_refused(folder, content):
    (folder / "collection.json").write_bytes(content)
    assert DAMAGED in refusal(folder)


@pytest.mark.parametrize("change", [set_to(captions=["a"]), base_set_to(scale=2)])
def test_a_description_by_a_newer_version_says_so(folder, change):
    content = json.loads((folder / "collection.json").read_text())
    change(content)
    (folder / "collection.json").write_text(json.dumps(content))
    assert "does not know: update the pack, or" in refusal(folder)


def test_a_description_that_is_a_folder(folder):
    a_folder(folder / "collection.json")
    assert "cannot be read (Is a directory)" in refusal(folder)


@pytest.mark.parametrize("seed", [-5, 2**64 - 1])
def test_seeds_that_could_be_collected_with_still_can(tmp_path, seed):
    assert len(all_of(collect(tmp_path / "likes", dataclasses.replace(DESCRIPTION, seed=seed)).folder)) == COUNT


@pytest.mark.parametrize("name", ["", "Flow x", "Flow 0", "Flow -1", "Flow inf", "flow", "Diffusion 2", "x" * 2**20])
def test_processes_that_are_not_known_are_named(name):
    with pytest.raises(GuidanceError, match="does not know the noising process") as refused:
        process_named(name)
    assert len(str(refused.value)) < 200


# While it is collected or read


def test_a_description_that_was_deleted_while_collecting_is_written_again(folder):
    collection = Collection.open(folder)
    (folder / "collection.json").unlink()
    collection.add(range(SHARD, 2 * SHARD), [sample(number) for number in range(SHARD, 2 * SHARD)])
    assert Collection.open(folder).description == DESCRIPTION and len(all_of(folder)) == 2 * SHARD


def test_a_folder_that_was_moved_while_collecting_is_not_begun_by_half(folder):
    collection = Collection.open(folder)
    folder.rename(folder.with_name("moved"))
    with pytest.raises(GuidanceError, match="likes was deleted or moved while its samples were collected: queue again"):
        collection.add(range(SHARD, 2 * SHARD), [sample(number) for number in range(SHARD, 2 * SHARD)])
    assert not folder.exists() and len(all_of(folder.with_name("moved"))) == COUNT
    assert len(all_of(collect(folder).folder)) == COUNT


def test_a_folder_that_was_replaced_is_not_mixed_with(folder):
    collection = Collection.open(folder)
    shutil.rmtree(folder)
    collect(folder, dataclasses.replace(DESCRIPTION, prompts=("a cow", "a pig")))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for act in (lambda: collection.add(range(SHARD), [sample(number) for number in range(SHARD)]), collection.load):
        with pytest.raises(GuidanceError, match="likes holds other samples: prompts was a cow and is now a cat"):
            act()
    assert not collection.complete(1) and before == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_collection_whose_description_is_gone_is_not_success(folder):
    collection = Collection.open(folder)
    (folder / "collection.json").unlink()
    assert not collection.complete(COUNT)
    with pytest.raises(GuidanceError, match="holds no samples"):
        collection.load()


@pytest.mark.parametrize(
    "damage",
    [lambda path: os.truncate(path, 900), lambda path: path.unlink(), instead(b"other")],
    ids=["shrunk", "gone", "other"],
)
@pytest.mark.parametrize("name", [FIRST, PROMPTS])
def test_files_that_are_taken_away_while_they_are_read(folder, name, damage):
    """A shard that was mapped would end the process where it shrinks."""
    samples = Collection.open(folder).load()
    damage(folder / name)
    with pytest.raises(
        GuidanceError, match=f"{name} in likes was changed, moved or deleted while it was read: run again"
    ):
        StoredPairs(samples, torch.ones(len(samples)), Flow()).batch(64, (1,))


def test_a_shard_that_is_filled_up_while_it_is_read_goes_on(folder):
    samples = Collection.open(folder).load()
    pairs = StoredPairs(samples, torch.ones(len(samples)), Flow())
    before = pairs.batch(64, (1,))
    collect(folder, count=2 * SHARD)
    assert torch.equal(pairs.batch(64, (1,)).x, before.x) and len(all_of(folder)) == 2 * SHARD


def test_two_servers_that_begin_one_folder_with_other_samples(tmp_path):
    """The second finds no collection when it begins, and one when it writes."""
    other = dataclasses.replace(DESCRIPTION, prompts=("a cow", "a pig"))
    with pytest.raises(GuidanceError, match="likes holds other samples"):
        Collection.create(tmp_path / "likes", other, lambda: (collect(tmp_path / "likes"), TEXT)[1])
    assert len(all_of(tmp_path / "likes")) == COUNT
    same = Collection.create(tmp_path / "new", DESCRIPTION, lambda: (collect(tmp_path / "new"), TEXT)[1])
    assert same.complete(COUNT)


def test_a_server_that_wants_fewer_samples_keeps_those_of_another(tmp_path):
    slow = Collection.create(tmp_path / "likes", DESCRIPTION, TEXT)
    collect(tmp_path / "likes", count=SHARD)
    slow.add(range(4), [sample(number) for number in range(4)])
    assert len(all_of(tmp_path / "likes")) == SHARD


# Checkpoints


def begun(folder: Path, **options):
    samples = Collection.open(folder).load()
    plan = plan_for(
        samples.description, **{"steps": 4, "batch": 4, "check_every": 1, "objective": "weighted"} | options
    )
    return prepare(samples, plan, "small", checkpoints=folder).training


def interrupted(folder: Path, **options):
    """Its checkpoint, after two steps."""
    training = begun(folder, **options)
    for progress in training:
        if progress.step == 2:
            break
    return training.checkpoint


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """A collection with the checkpoint of a training."""
    folder = collect(tmp_path_factory.mktemp("stopped") / "likes").folder
    interrupted(folder)
    return folder


def put(*names, value):
    """A value in a state, of the names that lead to it."""

    def damage(state: dict) -> None:
        for name in names[:-1]:
            state = state[name]
        state[names[-1]] = value(state[names[-1]]) if callable(value) else value

    return damage


BEST = "head.weight"
STATES = {
    "no step": lambda state: state.pop("step"),
    "a step that is a text": put("step", value="2"),
    "a step that is none": put("step", value=None),
    "a step that is a tensor": put("step", value=torch.tensor(2)),
    "a negative step": put("step", value=-2),
    "a step behind the end": put("step", value=10**30),
    "another step": put("step", value=1),
    "no network": lambda state: state.pop("network"),
    "a network that is a list": put("network", value=list),
    "an empty network": put("network", value={}),
    "a larger network": put("network", BEST, value=lambda weight: torch.cat([weight, weight])),
    "a network of other numbers": put("network", BEST, value=lambda weight: weight.double()),
    "a network with a text": put("network", BEST, value="weight"),
    "a network that is no numbers": put("network", BEST, value=lambda weight: weight * math.nan),
    "an average that is none": put("average", value=None),
    "an average of another step": put("average", "n_averaged", value=torch.tensor(7)),
    "a best of another network": put("best", BEST, value=lambda weight: weight[:1]),
    "an optimizer that is none": put("optimizer", value=None),
    "an optimizer of nothing": put("optimizer", value={}),
    "an optimizer of another network": put("optimizer", "state", 0, "exp_avg", value=lambda moment: moment[:1]),
    "an optimizer of a larger network": lambda state: state["optimizer"]["state"].update({9999: {}}),
    "an optimizer that is no numbers": put("optimizer", "state", 0, "exp_avg_sq", value=lambda moment: moment / 0 * 0),
    "a curve that is none": put("curve", value=None),
    "an empty curve": put("curve", value=[]),
    "a curve of texts": put("curve", value=[("1", "2")]),
    "a flat curve": put("curve", value=[1, 2]),
    "a curve that is no numbers": put("curve", value=[(1, 0.5), (2, math.nan)]),
    "a curve that goes back": put("curve", value=[(2, 0.5), (1, 0.5), (2, 0.5)]),
    "no plan": lambda state: state.pop("plan"),
}
FILES = {
    "empty": b"", "a text": b"half", "a megabyte": b"x" * 2**20, "half": None, "a list": [1, 2], "a tensor": torch.zeros(3), "none": {},
}  # fmt: skip


def damaged_training(folder: Path, tmp_path: Path, damage) -> str:
    """What is said of a training whose checkpoint was damaged; then that is deleted, and the training runs."""
    shutil.copytree(folder, copy := tmp_path / "likes")
    (path,) = copy.glob("*.checkpoint")
    damage(path)
    with pytest.raises(GuidanceError) as refused:
        begun(copy)
    told = str(refused.value)
    assert path.name in told and "delete it" in told and "\n" not in told and len(told) < 400
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert fit(begun(copy)) is not None
    return told


@pytest.mark.parametrize("damage", STATES.values(), ids=STATES)
def test_a_state_that_a_training_cannot_have_left(stopped, tmp_path, damage):
    def change(path: Path) -> None:
        state = torch.load(path, weights_only=True)
        damage(state)
        torch.save(state, path)

    assert "is damaged: delete it to train from the start" in damaged_training(stopped, tmp_path, change)


@pytest.mark.parametrize("content", FILES.values(), ids=FILES)
def test_a_checkpoint_that_is_none(stopped, tmp_path, content):
    def replace(path: Path) -> None:
        if content is None:
            os.truncate(path, path.stat().st_size // 2)
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)

    assert "is damaged: delete it" in damaged_training(stopped, tmp_path, replace)


def test_a_checkpoint_by_a_newer_version(stopped, tmp_path):
    def add(path: Path) -> None:
        torch.save(torch.load(path, weights_only=True) | {"momentum": 1}, path)

    assert (
        "'momentum', which this version of the pack does not know: update the pack, or delete it"
        in damaged_training(stopped, tmp_path, add)
    )


def test_a_checkpoint_that_is_a_folder(stopped, tmp_path):
    shutil.copytree(stopped, copy := tmp_path / "likes")
    (path,) = copy.glob("*.checkpoint")
    a_folder(path)
    with pytest.raises(
        GuidanceError, match=r"cannot be read \(Is a directory\): correct that, or move it away to train from the start"
    ):
        begun(copy)
    path.rmdir()
    assert fit(begun(copy)) is not None


def test_the_last_interrupted_trainings_can_go_on(folder):
    """Older ones begin anew, and what killed saves of any left is gone with them."""
    paths = []
    for seed in range(KEPT + 2):
        paths.append(interrupted(folder, seed=seed))
        left = paths[-1].with_name(f"{paths[-1].name}.partial")
        left.mkdir()
        (left / "whole").write_bytes(b"half")
        os.utime(paths[-1], (1000 + seed, 1000 + seed))
    assert [path.exists() for path in paths] == [False] * 2 + [True] * KEPT
    assert len(list(folder.glob("*.partial"))) == 1, "that which lies there since the last save"
    assert [begun(folder, seed=seed).step for seed in range(KEPT + 2)] == [0] * 2 + [2] * KEPT


def test_going_on_keeps_a_checkpoint(folder):
    """The oldest of all that there is room for, and the one that is being written."""
    for seed in range(KEPT):
        os.utime(interrupted(folder, seed=seed), (1000 + seed, 1000 + seed))
    training = begun(folder, seed=0)
    assert next(iter(training)).step == 3
    interrupted(folder, seed=99)
    assert begun(folder, seed=0).step == 3 and begun(folder, seed=1).step == 0


def test_checkpoints_of_trainings_that_run_are_kept(folder):
    running = [iter(begun(folder, seed=seed)) for seed in range(KEPT + 2)]
    for training in running:
        next(training)
    assert len(list(folder.glob("*.checkpoint"))) == KEPT + 2
    running.clear()
    interrupted(folder, seed=99)
    assert len(list(folder.glob("*.checkpoint"))) == KEPT


def test_other_files_are_no_checkpoints(folder):
    names = ["model.checkpoint", "training.checkpoint", "net.partial"]
    for name in names:
        (folder / name).write_bytes(b"mine")
    for seed in range(KEPT + 1):
        interrupted(folder, seed=seed)
    assert all((folder / name).exists() for name in names)


def test_two_trainings_of_the_same_settings_at_once(folder):
    """Both write one checkpoint; that it is taken away by the one that is done first does not hurt the other."""
    expected = fit(begun(collect(folder.with_name("alone")).folder)).state_dict()
    one, other = begun(folder), begun(folder)
    assert one.checkpoint == other.checkpoint
    for progress, _ in zip(one, other, strict=True):
        if progress.step == 3:
            one.checkpoint.unlink()
    for training in (one, other):
        assert all(torch.equal(value, training.result().state_dict()[name]) for name, value in expected.items())
