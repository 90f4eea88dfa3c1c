"""From a folder of samples to a saved network, in this process and by the command line: one result, whatever stops it on the way."""

import dataclasses
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from reward_guidance.guidance.__main__ import main
from reward_guidance.guidance.errors import GuidanceError
from reward_guidance.guidance.files import Base, load_network
from reward_guidance.guidance.fitting import WIDTHS, overview, plan_for, prepare, weights_from
from reward_guidance.guidance.network import Architecture, GuidanceNetwork, Text
from reward_guidance.guidance.samples import SHARD, Collection, Description, Sample
from reward_guidance.guidance.training import Plan, fit

CHECKOUT = Path(__file__).resolve().parents[2]
DESCRIPTION = Description(
    base=Base("SD3", "SD3", 4, "Flow"), shape=(4, 4, 4), levels=2, prompts=("a cat", "a dog"), rewards=("likes", "blue"),
    reward_means=(0.0, 0.0), reward_stds=(1.0, 1.0), seed=3, reward_weights=(1.0, 0.0),
)  # fmt: skip
TEXT = Text(torch.randn(2, 3, 6), torch.randn(2, 5))
COUNT = 3 * SHARD
FEW_STEPS = ("--steps", "30", "--batch", "16", "--size", "small")


def sample(number: int, description: Description) -> Sample:
    """The first reward likes the first channel."""
    rng = torch.Generator().manual_seed(number)
    clean = torch.randn(description.shape, generator=rng)
    sigma = torch.rand(description.levels, generator=rng) * 0.9 + 0.05
    scores = torch.stack([clean[0].mean(), torch.rand((), generator=rng)])
    return Sample(clean, scores, sigma, torch.zeros(description.levels, *description.shape))


def collect(folder: Path, description: Description = DESCRIPTION, count: int = COUNT) -> Collection:
    collection = Collection.create(folder, description, TEXT)
    for numbers in collection.missing(count):
        collection.add(numbers, [sample(number, description) for number in numbers])
    return collection


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return collect(tmp_path_factory.mktemp("data") / "likes").folder


NOISE = dataclasses.replace(DESCRIPTION, base=dataclasses.replace(DESCRIPTION.base, target="noise"), levels=0)


def quick(description: Description = DESCRIPTION, **options) -> Plan:
    return plan_for(description, **{"steps": 10, "batch": 8, "check_every": 5} | options)


def test_sizes_are_of_one_to_ten_million():
    sizes = [sum(p.numel() for p in GuidanceNetwork(Architecture(4, tokens=768, pooled=768, width=w)).parameters()) for w in WIDTHS.values()]
    assert 1e6 < sizes[0] < sizes[1] < sizes[2] < 10e6


@pytest.mark.parametrize(
    ("description", "options", "form"),
    [
        (DESCRIPTION, {}, "potential"), (DESCRIPTION, {"form": "shift"}, "shift"), (NOISE, {}, "noise"),
        (DESCRIPTION, {"objective": "weighted"}, "correction"), (DESCRIPTION, {"objective": "potential"}, "potential"),
    ],
)  # fmt: skip
def test_a_plan_has_the_form_that_fits(description, options, form):
    assert plan_for(description, **options).form == form


def test_noise_is_tilted_by_one_objective():
    with pytest.raises(GuidanceError, match="tilted by the objective weighted, not by potential"):
        plan_for(NOISE, objective="potential")


def test_weights_are_numbers_with_commas():
    assert weights_from("1, -0.5") == (1.0, -0.5) and weights_from("  ") == ()
    with pytest.raises(GuidanceError, match="numbers with commas"):
        weights_from("1; 2")


@pytest.mark.parametrize(("description", "objective"), [(DESCRIPTION, "weighted"), (DESCRIPTION, "potential"), (NOISE, "weighted")])
def test_a_network_says_what_it_was_trained_on(tmp_path, description, objective):
    samples = collect(tmp_path, description).load()
    fitting = prepare(samples, quick(description, objective=objective, temperature=0.5), "small")
    network, card = fit(fitting.training), fitting.card()
    assert any(parameter.any() for parameter in network.last.parameters())
    assert (card.base, card.temperature, card.samples, card.steps) == (description.base, 0.5, COUNT, 10)
    assert card.rewards == ("likes", "blue") and card.reward_weights == (1.0, 0.0)
    assert card.curve == tuple(fitting.training.curve) and len(card.curve) == 2
    assert "likes" in fitting.report() and "best at step" in fitting.report()


def test_a_network_knows_what_the_prompts_have_in_common(tmp_path, folder):
    samples = Collection.open(folder).load()
    network = prepare(samples, quick(), "small").network()
    torch.testing.assert_close(network.embed.standardized.mean, samples.text.pooled.float().mean(0))


def test_weights_can_be_changed_without_sampling_again(tmp_path):
    description = dataclasses.replace(DESCRIPTION, reward_weights=())
    collect(tmp_path, description, SHARD)
    again = Collection.create(tmp_path, DESCRIPTION, lambda: pytest.fail("the text is on disk"))
    samples, scores = again.load(), again.scores()[1]
    assert torch.equal(samples.rewards(), scores[:, 0]) and torch.equal(Collection.open(tmp_path).load().rewards(), scores[:, 0])
    torch.testing.assert_close(samples.rewards((1.0, 2.0)), scores[:, 0] + 2 * scores[:, 1])
    with pytest.raises(GuidanceError, match="scores of likes, blue: give 2 weights, not 3"):
        samples.rewards((1.0, 1.0, 1.0))


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
    assert prepare(samples, quick(), "small", checkpoints=tmp_path).training.checkpoint == prepared[0].training.checkpoint


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


def test_an_overview_says_what_could_be_learned(tmp_path, folder):
    lines = overview(Collection.open(folder)).splitlines()
    assert lines[0] == f"{COUNT} samples of 2 prompts in likes"
    assert lines[1].startswith("likes: ") and "of the samples count" in lines[3]
    flat = Collection.create(tmp_path, DESCRIPTION, TEXT)
    flat.add(range(4), [dataclasses.replace(sample(number, DESCRIPTION), scores=torch.ones(2)) for number in range(4)])
    assert "the same reward for their prompt: there is nothing to learn" in overview(flat)


# The command line


def command(folder: Path, out: Path, *options: str, processes: int = 0) -> list[str]:
    launch = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"] if processes else []
    return [sys.executable, "-m", *launch, "guidance", str(folder), "--out", str(out), *FEW_STEPS, *options]


def trained(folder: Path, out: Path, *options: str, processes: int = 0) -> dict[str, torch.Tensor]:
    done = subprocess.run(command(folder, out, *options, processes=processes), cwd=CHECKOUT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "likes" in done.stdout and "best" in done.stdout
    return load_network(out)[0].state_dict()


def here(folder: Path, out: Path, *options: str) -> dict[str, torch.Tensor]:
    assert main([str(folder), "--out", str(out), *FEW_STEPS, *options]) == 0
    return load_network(out)[0].state_dict()


def test_two_processes_make_what_one_makes(tmp_path, folder):
    one, two = here(folder, tmp_path / "1.safetensors"), trained(folder, tmp_path / "2.safetensors", processes=2)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.safetensors", "2.safetensors"]


def test_a_killed_process_goes_on_bit_for_bit(tmp_path, folder):
    options = ("--steps", "60")
    expected = here(folder, tmp_path / "whole.safetensors", *options)
    process = subprocess.Popen(command(folder, tmp_path / "net.safetensors", *options), cwd=CHECKOUT, stdout=subprocess.DEVNULL)
    while not list(tmp_path.glob("*.checkpoint")):
        assert process.poll() is None, "it was done before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "net.safetensors").exists()
    resumed = here(folder, tmp_path / "net.safetensors", *options)
    assert all(torch.equal(value, resumed[name]) for name, value in expected.items())
    assert not list(tmp_path.glob("*.checkpoint"))


@pytest.mark.parametrize(
    ("options", "said"),
    [(("--temperature", "0"), "must be above 0"), (("--weights", "a"), "numbers with commas"), (("--temperature", "0.01"), "")],
)  # fmt: skip
def test_what_goes_wrong_is_said_in_a_sentence(tmp_path, folder, capsys, caplog, options, said):
    caplog.set_level("INFO")
    status = main([str(folder), "--out", str(tmp_path / "net.safetensors"), *FEW_STEPS, *options])
    assert status == (1 if said else 0)
    assert (said or "samples count at this temperature: raise it") in caplog.text
    assert "Traceback" not in caplog.text + capsys.readouterr().err


def test_a_folder_without_samples(tmp_path, caplog):
    assert main([str(tmp_path / "nothing"), "--out", str(tmp_path / "net.safetensors")]) == 1
    assert "nothing holds no samples" in caplog.text


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, folder, monkeypatch, caplog):
    saves, save = [], torch.save

    def full(state, path):
        saves.append(path)
        if len(saves) == 2:
            raise OSError(28, "No space left on device")
        save(state, path)

    monkeypatch.setattr(torch, "save", full)
    options = [str(folder), "--out", str(tmp_path / "net.safetensors"), *FEW_STEPS]
    assert main(options) == 1
    assert "No space left on device" in caplog.text and "goes on from here" in caplog.text
    assert [path.suffix for path in tmp_path.iterdir()] == [".checkpoint"]
    caplog.set_level("INFO")
    assert main(options) == 0 and "going on at step 10" in caplog.text


def test_a_damaged_checkpoint_is_named(tmp_path, folder, caplog):
    fitting = prepare(Collection.open(folder).load(), quick(), "small", checkpoints=tmp_path)
    fit(fitting.training)
    fitting.training.checkpoint.write_bytes(b"half")
    with pytest.raises(GuidanceError, match="training-.*.checkpoint is damaged; delete it"):
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
