"""From a folder of samples to a saved network, in this process and by the command line: one result, whatever stops it on the way."""

import dataclasses
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from reward_guidance.guidance.__main__ import main
from reward_guidance.guidance.data.collection import SHARD, Collection
from reward_guidance.guidance.data.description import Description
from reward_guidance.guidance.data.samples import Rows, Sample
from reward_guidance.guidance.errors import GuidanceError
from reward_guidance.guidance.network.card import Base
from reward_guidance.guidance.network.file import load_network
from reward_guidance.guidance.network.unet import Architecture, GuidanceNetwork, Text
from reward_guidance.guidance.one_step import tilted_noise
from reward_guidance.guidance.training.labels import label
from reward_guidance.guidance.training.loop import Training, fit
from reward_guidance.guidance.training.objectives import OBJECTIVES, Plan
from reward_guidance.guidance.training.recipe import HELD_OUT, WIDTHS, plan_for, prepare, weights_from
from reward_guidance.guidance.training.report import overview
from reward_guidance.tests.unit.shared import CHECKOUT, collected

DESCRIPTION = Description(
    base=Base("SD3", "SD3", 4, "Flow"), shape=(4, 4, 4), levels=2, prompts=("a cat", "a dog"), rewards=("likes", "blue"),
    reward_means=(0.0, 0.0), reward_stds=(1.0, 1.0), seed=3, reward_weights=(1.0, 0.0),
)  # fmt: skip
TEXT = Text(torch.randn(2, 3, 6), torch.randn(2, 5))
COUNT = 3 * SHARD
FEW_STEPS = ("--steps", "30", "--batch", "16", "--size", "small")
MORE_STEPS = ("--steps", "60")
"""Enough of them that a training can be killed in between."""


def sample(number: int, description: Description) -> Sample:
    """The first reward likes the first channel."""
    rng = torch.Generator().manual_seed(number)
    clean = torch.randn(description.shape, generator=rng)
    sigma = torch.rand(description.levels, generator=rng) * 0.9 + 0.05
    scores = torch.stack([clean[0].mean(), torch.rand((), generator=rng)])
    return Sample(clean, scores, sigma, torch.zeros(description.levels, *description.shape))


def collect(folder: Path, description: Description = DESCRIPTION, count: int = COUNT) -> Collection:
    return collected(folder, description, TEXT, count, sample)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return collect(tmp_path_factory.mktemp("data") / "likes").folder


NOISE = dataclasses.replace(DESCRIPTION, base=dataclasses.replace(DESCRIPTION.base, target="noise"), levels=0)


def quick(description: Description = DESCRIPTION, **options) -> Plan:
    return plan_for(description, **{"steps": 10, "batch": 8, "check_every": 5} | options)


def test_sizes_are_of_one_to_ten_million():
    sizes = [
        sum(p.numel() for p in GuidanceNetwork(Architecture(4, tokens=768, pooled=768, width=w)).parameters())
        for w in WIDTHS.values()
    ]
    assert 1e6 < sizes[0] < sizes[1] < sizes[2] < 10e6


@pytest.mark.parametrize(
    ("description", "options", "form"),
    [
        (DESCRIPTION, {}, "potential"), (DESCRIPTION, {"form": "shift"}, "shift"), (NOISE, {}, "noise"),
        (NOISE, {"objective": "reward_gradient"}, "leap"),
        (DESCRIPTION, {"objective": "weighted"}, "correction"), (DESCRIPTION, {"objective": "potential"}, "potential"),
    ],
)  # fmt: skip
def test_a_plan_has_the_form_that_fits(description, options, form):
    assert plan_for(description, **options).form == form


def test_noise_has_objectives_of_its_own():
    with pytest.raises(GuidanceError, match="tilted by the objectives weighted and reward_gradient, not by potential"):
        plan_for(NOISE, objective="potential")


@pytest.mark.parametrize(("description", "objective"), [(NOISE, "weighted"), (DESCRIPTION, "potential")])
def test_a_form_is_not_overruled_in_silence(description, objective):
    with pytest.raises(GuidanceError, match="has a form of its own: leave the form at correction, not at shift"):
        plan_for(description, objective, form="shift")


def test_weights_are_numbers_with_commas():
    assert weights_from("1, -0.5") == (1.0, -0.5) and weights_from("  ") == ()
    with pytest.raises(GuidanceError, match="numbers separated by commas"):
        weights_from("1; 2")


@pytest.mark.parametrize(
    ("description", "objective"), [(DESCRIPTION, "weighted"), (DESCRIPTION, "potential"), (NOISE, "weighted")]
)
def test_a_network_says_what_it_was_trained_on(tmp_path, description, objective):
    samples = collect(tmp_path, description).load()
    fitting = prepare(samples, quick(description, objective=objective, temperature=0.5), "small")
    network, card = fit(fitting.training), fitting.card()
    assert any(parameter.any() for parameter in network.last.parameters())
    assert (card.base, card.temperature, card.samples, card.steps) == (description.base, 0.5, COUNT, 10)
    assert card.rewards == ("likes", "blue") and card.reward_weights == (1.0, 0.0)
    assert card.curve == tuple(fitting.training.curve) and len(card.curve) == 2 and card.best in card.curve
    assert "likes" in fitting.report() and "best at step" in fitting.report()


def test_a_network_knows_what_the_prompts_have_in_common(tmp_path, folder):
    samples = Collection.open(folder).load()
    network = prepare(samples, quick(), "small").network()
    torch.testing.assert_close(network.embed.standardized.mean, samples.text.pooled.float().mean(0))


def test_weights_can_be_changed_without_sampling_again(tmp_path):
    description = dataclasses.replace(DESCRIPTION, reward_weights=())
    collect(tmp_path, description, SHARD)
    again = Collection.create(tmp_path, DESCRIPTION, lambda: pytest.fail("the text is on disk"))
    samples = again.load()
    scores = samples.scores
    assert torch.equal(samples.rewards(), scores[:, 0]) and torch.equal(
        Collection.open(tmp_path).load().rewards(), scores[:, 0]
    )
    torch.testing.assert_close(samples.rewards((1.0, 2.0)), (scores[:, 0] + 2 * scores[:, 1]) / 5**0.5)


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ("1, 1, 1", "scores of likes, blue: give one weight for each reward, not 3 in all"), ("1", "not 1 in all"), ("nan, 1", "finite numbers"),
        ("1, -inf", "finite numbers"), ("0, 0", "not all 0, not 0, 0"),
    ],
)  # fmt: skip
def test_weights_that_make_no_reward_are_refused(folder, weights, said):
    with pytest.raises(GuidanceError, match=said):
        prepare(Collection.open(folder).load(), quick(), "small", weights_from(weights))


def test_trainings_of_other_settings_or_samples_have_checkpoints_of_their_own(tmp_path, folder):
    samples = Collection.open(folder).load()
    more = collect(tmp_path / "more", count=COUNT + 1).load()
    prepared = [
        prepare(samples, quick(), "small", checkpoints=tmp_path),
        prepare(samples, quick(seed=1), "small", checkpoints=tmp_path),
        prepare(samples, quick(), "medium", checkpoints=tmp_path),
        prepare(samples, quick(), "small", (1.0, 1.0), checkpoints=tmp_path),
        prepare(more, quick(), "small", checkpoints=tmp_path),
    ]
    assert len({fitting.training.checkpoint for fitting in prepared}) == len(prepared)
    assert (
        prepare(samples, quick(), "small", checkpoints=tmp_path).training.checkpoint == prepared[0].training.checkpoint
    )


def test_many_held_out_samples_are_looked_at_and_models_and_rewards_are_spared(tmp_path):
    samples = collect(tmp_path, count=6 * COUNT).load()
    held_out = len(samples.split(HELD_OUT)[1])
    assert held_out // 2 > Training.held_out_batches
    assert prepare(samples, quick(batch=2), "small").training.held_out_batches == held_out // 2
    assert prepare(samples, quick(batch=64), "small").training.held_out_batches == Training.held_out_batches
    asked = prepare(
        samples,
        quick(batch=2, objective="reward_gradient"),
        "small",
        reward=lambda latents, batch: latents.flatten(1).mean(1),
    )
    assert asked.training.held_out_batches == Training.held_out_batches


def test_a_pause_keeps_what_was_reached_since_the_last_look(tmp_path, folder):
    fitting = prepare(Collection.open(folder).load(), quick(check_every=200), "small", checkpoints=tmp_path)
    for progress in fitting.training:
        if progress.step == 7:
            break
    fitting.training.pause()
    assert [step for step, _ in fitting.training.curve] == [7]
    assert "stopped at step 7 of 10" in fitting.report()
    again = prepare(Collection.open(folder).load(), quick(check_every=200), "small", checkpoints=tmp_path)
    assert again.training.step == 7


def test_with_fresh_noise_the_models_answers_do_not_matter(folder):
    samples = Collection.open(folder).load()
    others = dataclasses.replace(samples, denoised=Rows.of([torch.ones(COUNT, *samples.denoised.shape[1:])]))
    values = [fit(prepare(each, quick(fresh=True), "small").training).state_dict() for each in (samples, others)]
    assert any(value.any() for name, value in values[0].items() if name.startswith("value.last"))
    assert all(torch.equal(one, other) for one, other in zip(*(state.values() for state in values), strict=True))


def test_fresh_noise_is_for_potentials():
    with pytest.raises(GuidanceError, match="weighted needs the model's predictions"):
        quick(objective="weighted", fresh=True)


def test_the_form_that_asks_the_model_needs_it(folder):
    with pytest.raises(GuidanceError, match="train it in the graph"):
        prepare(Collection.open(folder).load(), quick(form="shift"))


def test_the_form_that_asks_the_model_is_told_the_prompts(folder):
    asked = []

    def denoise(x, sigma, prompts):
        asked.append(prompts)
        return x * sigma.view(-1, 1, 1, 1)

    fitting = prepare(Collection.open(folder).load(), quick(form="shift"), "small", denoise=denoise)
    assert any(parameter.any() for parameter in fit(fitting.training).last.parameters())
    assert {len(prompts) for prompts in asked} == {8} and {int(p) for prompts in asked for p in prompts} == {0, 1}


def test_a_gradient_objective_is_told_the_prompts(folder):
    seen = set()

    def reward(latents, batch):
        seen.update(batch.prompts.tolist())
        return latents.flatten(1).mean(1)

    fit(prepare(Collection.open(folder).load(), quick(objective="reward_gradient"), "small", reward=reward).training)
    assert seen == {0, 1}


def test_noise_that_leaps_needs_no_labels_but_their_spread(tmp_path):
    samples = collect(tmp_path, NOISE).load()
    plan = quick(NOISE, objective="reward_gradient", temperature=0.1)
    fitting = prepare(samples, plan, "small", reward=lambda noise, batch: noise.flatten(1).mean(1))
    network, card = fit(fitting.training), fitting.card()
    assert card.form == "leap" and card.best is not None and fitting.report()
    noise = samples.clean[torch.arange(4)].float()
    moved = tilted_noise(network, noise, samples.text[samples.prompts[:4]].to(noise.device), form="leap")
    assert moved.flatten(1).mean(1).gt(noise.flatten(1).mean(1)).all()


def test_one_unit_of_temperature_serves_all_objectives(folder):
    """What the labels weigh and what a gradient follows is one reward: of the same weights, in its spread within a prompt."""
    samples, weights = Collection.open(folder).load(), (3.0, -1.0)
    combined = samples.rewards(weights)
    asked = lambda latents, batch: combined  # noqa: E731
    fitting = prepare(samples, quick(objective="reward_gradient", temperature=0.5), "small", weights, reward=asked)
    labels, _ = label(combined, samples.prompts, 0.5)
    logits = fitting.training.task.reward(None, None) / fitting.training.task.plan.temperature
    for prompt in range(2):
        own = samples.prompts == prompt
        torch.testing.assert_close(logits[own].diff(), labels[own].log().diff(), rtol=1e-3, atol=1e-4)


def test_an_overview_says_what_could_be_learned(tmp_path, folder):
    lines = overview(Collection.open(folder)).splitlines()
    assert lines[0] == f"{COUNT} samples of 2 prompts in likes"
    assert lines[1].startswith("likes: ") and "of the samples count" in lines[3]
    flat = Collection.create(tmp_path, DESCRIPTION, TEXT)
    flat.add(range(4), [dataclasses.replace(sample(number, DESCRIPTION), scores=torch.ones(2)) for number in range(4)])
    assert "the same reward for their prompt: there is nothing to learn" in overview(flat)


def test_a_report_says_what_is_wrong(tmp_path):
    """Of four samples none is kept apart to judge by, and so no loss is reported as if there were."""
    fitting = prepare(collect(tmp_path, count=4).load(), quick(check_every=200), "small")
    assert fitting.training.held_out is None
    for progress in fitting.training:
        if progress.step == 7:
            break
    fitting.training.pause()
    ((step, loss),) = fitting.training.curve
    assert step == 7 and loss == progress.loss and fitting.card().curve == ()
    report = fitting.report()
    assert "too few samples to hold any out" in report and "held-out" not in report and "not trained on" not in report
    assert "count as" in report
    json.dumps(dataclasses.asdict(fitting.card()), allow_nan=False)


def test_a_training_that_diverges_returns_what_was_best_before(tmp_path, folder, monkeypatch):
    objective = OBJECTIVES["potential"]

    def breaking(network, task, batch):
        loss = objective(network, task, batch)
        return loss * math.nan if fitting.training.step == 7 and torch.is_grad_enabled() else loss

    monkeypatch.setitem(OBJECTIVES, "potential", breaking)
    fitting = prepare(Collection.open(folder).load(), quick(), "small", checkpoints=tmp_path)
    network = fit(fitting.training)
    assert [step for step, _ in fitting.training.curve] == [5] and fitting.done
    assert all(value.isfinite().all() for value in network.state_dict().values())
    assert "diverged at step 7 of 10: this is the best network until then. Lower the learning rate" in fitting.report()
    fitting.drop_checkpoint()
    assert not list(tmp_path.iterdir())
    fitting = prepare(Collection.open(folder).load(), quick(check_every=200), "small")
    with pytest.raises(GuidanceError, match="diverged at step 8: lower the learning rate"):
        fit(fitting.training)


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 1},
        {"batch": 1},
        {"batch": COUNT + 1},
        {"learning_rate": 1.0, "objective": "weighted"},
        {"temperature": 0.001},
        {"temperature": 1e6},
    ],
    ids=str,
)
def test_absurd_settings_train_all_the_same(folder, options):
    fitting = prepare(Collection.open(folder).load(), quick(**options), "small")
    network = fit(fitting.training)
    assert all(value.isfinite().all() for value in network.state_dict().values()) and "best at step" in fitting.report()


# The command line


def command(folder: Path, out: Path, *options: str, processes: int = 0) -> list[str]:
    launch = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"] if processes else []
    return [sys.executable, "-m", *launch, "guidance", str(folder), "--out", str(out), *FEW_STEPS, *options]


def trained(folder: Path, out: Path, *options: str, processes: int = 0) -> dict[str, torch.Tensor]:
    done = subprocess.run(
        command(folder, out, *options, processes=processes), cwd=CHECKOUT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "likes" in done.stdout and "best" in done.stdout
    return load_network(out)[0].state_dict()


def here(folder: Path, out: Path, *options: str) -> dict[str, torch.Tensor]:
    assert main([str(folder), "--out", str(out), *FEW_STEPS, *options]) == 0
    return load_network(out)[0].state_dict()


@pytest.fixture(scope="module")
def expected(folder, tmp_path_factory) -> dict[str, torch.Tensor]:
    """The network after few steps, trained without a stop in this process."""
    return here(folder, tmp_path_factory.mktemp("few") / "net.safetensors")


@pytest.fixture(scope="module")
def expected_of_more(folder, tmp_path_factory) -> dict[str, torch.Tensor]:
    return here(folder, tmp_path_factory.mktemp("more") / "net.safetensors", *MORE_STEPS)


def killed(folder: Path, out: Path) -> None:
    """A training of more steps that is killed once it has a checkpoint."""
    process = subprocess.Popen(command(folder, out, *MORE_STEPS), cwd=CHECKOUT, stdout=subprocess.DEVNULL)
    while not list(out.parent.glob("*.checkpoint")):
        assert process.poll() is None, "it was done before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_two_processes_make_what_one_makes(tmp_path, folder, expected):
    two = trained(folder, tmp_path / "net.safetensors", processes=2)
    for name, value in expected.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4)
    assert [path.name for path in tmp_path.iterdir()] == ["net.safetensors"]


def test_a_killed_process_goes_on_bit_for_bit(tmp_path, folder, expected_of_more):
    killed(folder, tmp_path / "net.safetensors")
    assert not (tmp_path / "net.safetensors").exists()
    resumed = here(folder, tmp_path / "net.safetensors", *MORE_STEPS)
    assert all(torch.equal(value, resumed[name]) for name, value in expected_of_more.items())
    assert not list(tmp_path.glob("*.checkpoint"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--temperature", "0"), "must be above 0"), (("--weights", "a"), "numbers separated by commas"), (("--temperature", "0.01"), ""),
        (("--steps", "0"), "at least 1 step"), (("--batch", "0"), "a batch of at least 1"), (("--learning-rate", "nan"), "learning rate above 0"),
        (("--out", "network"), "not a name for a network"), (("--weights", "0, 0"), "not all 0"),
        (("--out", f"{__file__}/net.safetensors"), "net.safetensors.probe could not be written"),
    ],
)  # fmt: skip
def test_what_goes_wrong_is_said_in_a_sentence(tmp_path, folder, capsys, caplog, options, said):
    caplog.set_level("INFO")
    status = main([str(folder), "--out", str(tmp_path / "net.safetensors"), *FEW_STEPS, *options])
    assert status == (1 if said else 0)
    assert (said or "samples count at this temperature: raise it") in caplog.text
    assert "Traceback" not in caplog.text + capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--device", "nonsense", "PyTorch does not know the device 'nonsense'"),
        ("--seed", "9" * 20, "is not between 0 and 2^64"),
    ],
)
def test_an_option_that_cannot_be_is_refused(tmp_path, folder, capsys, option, value, said):
    with pytest.raises(SystemExit):
        main([str(folder), "--out", str(tmp_path / "net.safetensors"), option, value])
    assert said in capsys.readouterr().err


def test_processes_on_machines_of_their_own_go_on_from_the_checkpoint_of_the_first(tmp_path, folder, expected_of_more):
    (tmp_path / "0").mkdir()
    killed(folder, tmp_path / "0" / "net.safetensors")
    here_each = " ".join(command(folder, tmp_path / "$RANK" / "net.safetensors", *MORE_STEPS))
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "--no-python",
        "bash",
        "-c",
        here_each,
    ]
    done = subprocess.run(launch, cwd=CHECKOUT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "continuing at step" in done.stdout, done.stdout + done.stderr[-2000:]
    resumed = load_network(tmp_path / "0" / "net.safetensors")[0].state_dict()
    for name, value in expected_of_more.items():
        torch.testing.assert_close(resumed[name], value, rtol=1e-3, atol=1e-4)
    assert not (tmp_path / "1").exists()


def test_a_folder_without_samples(tmp_path, caplog):
    assert main([str(tmp_path / "nothing"), "--out", str(tmp_path / "net.safetensors")]) == 1
    assert "nothing holds no samples" in caplog.text


def full_from(number: int, monkeypatch) -> None:
    """A disk that takes so many checkpoints and no more."""
    saves, save = [], torch.save

    def full(state, path):
        saves.append(path)
        if len(saves) > number:
            raise OSError(28, "No space left on device")
        save(state, path)

    monkeypatch.setattr(torch, "save", full)


@pytest.mark.parametrize("number", [0, 1])
def test_a_full_disk_does_not_stop_a_training(tmp_path, folder, expected, monkeypatch, caplog, number):
    full_from(number, monkeypatch)
    trained = here(folder, tmp_path / "net.safetensors")
    assert all(torch.equal(value, trained[name]) for name, value in expected.items())
    assert caplog.text.count("No space left on device") == 1 and "continues without it" in caplog.text
    assert not list(tmp_path.glob("*.checkpoint")) and not list(tmp_path.glob("*.partial"))


def test_a_report_says_that_there_is_no_checkpoint(tmp_path, folder, monkeypatch):
    full_from(0, monkeypatch)
    fitting = prepare(Collection.open(folder).load(), quick(), "small", checkpoints=tmp_path)
    for progress in fitting.training:
        if progress.step == 7:
            break
    fitting.training.pause()
    report = fitting.report()
    assert "stopped at step 7 of 10" in report and "continues from there" not in report
    assert "There is no checkpoint to continue from: training-" in report and "No space left on device" in report


def on_a_full_disk(*_) -> None:
    raise OSError(28, "No space left on device")


def test_a_network_that_cannot_be_written_is_not_trained_again(tmp_path, folder, monkeypatch, caplog):
    options = [str(folder), "--out", str(tmp_path / "net.safetensors"), *FEW_STEPS]
    with monkeypatch.context() as patched:
        patched.setattr("reward_guidance.guidance.network.file.save_file", on_a_full_disk)
        assert main(options) == 1
    assert "net.safetensors could not be written" in caplog.text and "run the same command again" in caplog.text
    caplog.set_level("INFO")
    assert main(options) == 0 and "continuing at step 30" in caplog.text


def test_a_network_that_no_disk_took_says_that_its_training_is_lost(tmp_path, folder, monkeypatch, caplog):
    full_from(0, monkeypatch)
    monkeypatch.setattr("reward_guidance.guidance.network.file.save_file", on_a_full_disk)
    assert main([str(folder), "--out", str(tmp_path / "net.safetensors"), *FEW_STEPS]) == 1
    assert "run the same command again: the training is lost." in caplog.text


def test_a_checkpoint_that_cannot_be_deleted_costs_nothing(tmp_path, folder, monkeypatch):
    def read_only(*_, **__):
        raise OSError(30, "Read-only file system")

    fitting = prepare(Collection.open(folder).load(), quick(), "small", checkpoints=tmp_path)
    fit(fitting.training)
    monkeypatch.setattr(Path, "unlink", read_only)
    fitting.drop_checkpoint()
    assert fitting.training.checkpoint.exists()


def test_other_scores_begin_another_training(tmp_path, folder):
    samples = Collection.open(folder).load()
    fit(prepare(samples, quick(), "small", checkpoints=tmp_path).training)
    other = prepare(dataclasses.replace(samples, scores=-samples.scores), quick(), "small", checkpoints=tmp_path)
    assert other.training.step == 0 and prepare(samples, quick(), "small", checkpoints=tmp_path).training.step == 10


def test_a_damaged_checkpoint_is_named(tmp_path, folder, caplog):
    fitting = prepare(Collection.open(folder).load(), quick(), "small", checkpoints=tmp_path)
    fit(fitting.training)
    fitting.training.checkpoint.write_bytes(b"half")
    with pytest.raises(GuidanceError, match="training-.*.checkpoint is damaged: delete it"):
        prepare(Collection.open(folder).load(), quick(), "small", checkpoints=tmp_path)


def test_ctrl_c_keeps_the_best_so_far(tmp_path, folder, monkeypatch):
    import reward_guidance.guidance.__main__ as command_line

    def pressed(text):
        if text.startswith("step 20"):
            raise KeyboardInterrupt

    monkeypatch.setattr(command_line, "say", pressed)
    here(folder, tmp_path / "net.safetensors")
    assert load_network(tmp_path / "net.safetensors")[1].steps == 20
    assert len(list(tmp_path.glob("*.checkpoint"))) == 1
