"""What goes wrong is said in a sentence, and the queue goes on."""

import math
import os
import pickle
import shutil

import pytest
import torch
from reward_guidance.tests.harness.guided import (
    broken,
    latents,
    one_box,
    reward_file,
    seeds_of,
    statistic,
    two_nodes,
    wired,
)
from safetensors.torch import save_file

SEEDS = seeds_of(__file__)


@pytest.fixture
def refused_guided(refused):
    """A guided prompt that must fail with these words. options: of the guided node."""

    def queue(family, words, guide=one_box, **options):
        refused(latents(family, guide(**{"decoder": "latent_rgb"} | options), seed=next(SEEDS)), words)

    return queue


@pytest.fixture
def reward_folder(server):
    folder = server.base / "models" / "reward_models"
    folder.mkdir(exist_ok=True)
    return folder


def test_reward_file_of_unknown_architecture(refused_guided, reward_folder):
    save_file({"some.weight": torch.zeros(2)}, reward_folder / "unknown.safetensors")
    refused_guided(
        "flux", "unknown.safetensors is not a reward that can be read", reward=reward_file("unknown.safetensors")
    )


def test_truncated_reward_file(refused_guided, reward_folder):
    save_file({"visual.conv1.weight": torch.zeros(1000)}, reward_folder / "truncated.safetensors")
    os.truncate(reward_folder / "truncated.safetensors", 900)
    refused_guided(
        "flux", "truncated.safetensors is damaged or only half downloaded", reward=reward_file("truncated.safetensors")
    )


def test_empty_reward_file(refused_guided, reward_folder):
    (reward_folder / "empty.safetensors").touch()
    refused_guided("flux", "empty.safetensors is empty", reward=reward_file("empty.safetensors"))


class RunsCode:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def pickled(protocol):
    return lambda thing, path: path.write_bytes(pickle.dumps(thing, protocol))


@pytest.mark.parametrize(
    ("save", "words"),
    [
        (pickled(2), "code.pt contains code"),
        (pickled(5), "is damaged or contains code, which is not run"),
        (torch.save, "code.pt contains code"),
    ],
    ids=["protocol 2", "protocol 5", "checkpoint"],
)
def test_reward_file_with_code_does_not_run_it(refused_guided, reward_folder, tmp_path, save, words):
    save(RunsCode(str(tmp_path / "code_was_run")), reward_folder / "code.pt")
    refused_guided("flux", words, reward=reward_file("code.pt"))
    assert not (tmp_path / "code_was_run").exists()


@pytest.fixture
def vae_approx(server):
    """The folder of tiny autoencoders, put back afterwards."""
    folder = server.base / "models" / "vae_approx"
    kept = server.base / "vae_approx_kept"
    shutil.copytree(folder, kept, symlinks=True)
    yield folder
    shutil.rmtree(folder)
    kept.rename(folder)


def test_tiny_autoencoder_with_other_channels(refused_guided, vae_approx):
    (vae_approx / "taesd3_decoder.safetensors").unlink()
    shutil.copy(vae_approx / "taesd_decoder.safetensors", vae_approx / "taesd3_decoder.safetensors")
    refused_guided(
        "sd3",
        "taesd3_decoder.safetensors is not a tiny autoencoder for this model's 16 latent channels",
        decoder="taesd",
    )


@pytest.mark.parametrize(
    ("family", "file"), [("sd3", "taesd3_decoder.safetensors"), ("wan", "lighttaew2_1.safetensors")]
)
@pytest.mark.parametrize("content", [b"", b"<html>Sign in</html>", None], ids=["empty", "web page", "truncated"])
def test_damaged_tiny_autoencoder(refused_guided, vae_approx, family, file, content):
    content = (vae_approx / file).read_bytes()[:100_000] if content is None else content
    (vae_approx / file).unlink()
    (vae_approx / file).write_bytes(content)
    refused_guided(family, f"{file} is not a tiny autoencoder", decoder="taesd")


def test_tiny_autoencoder_of_another_kind(refused_guided, vae_approx):
    """A picture's in place of a video's: the names can be mixed up."""
    (vae_approx / "lighttaew2_1.safetensors").unlink()
    shutil.copy(vae_approx / "taef1_decoder.safetensors", vae_approx / "lighttaew2_1.safetensors")
    refused_guided("wan", "lighttaew2_1.safetensors is not a tiny autoencoder", decoder="taesd")


def test_missing_tiny_autoencoder(refused_guided, bench, vae_approx):
    (vae_approx / "taesd3_decoder.safetensors").unlink()
    refused_guided("sd3", "Put taesd3_decoder.safetensors into models/vae_approx", decoder="taesd")
    automatic = bench.run(latents("sd3", one_box(decoder="auto"), seed=next(SEEDS)))
    assert automatic.outputs["sampler"]["reward_guidance"][0]["decoder"] == "latent_rgb"


def test_no_vae(refused_guided):
    refused_guided("flux", "needs a VAE: connect one", decoder="vae")


@pytest.mark.parametrize(
    ("family", "other", "words"),
    [
        ("flux", "vae-ft-mse-840000-ema-pruned.ckpt", "decodes 4 latent channels, but this model has 16"),
        ("sd15", "ae.safetensors", "decodes 16 latent channels, but this model has 4"),
        ("flux", "wan_2.1_vae.safetensors", "belongs to a video model"),
        ("wan", "ae.safetensors", "belongs to a picture model"),
    ],
)
def test_vae_of_another_family(refused_guided, family, other, words):
    def with_vae(**options):
        return lambda graph, inputs: one_box(vae=graph.add("other", "VAELoader", vae_name=other), **options)(
            graph, inputs
        )

    refused_guided(family, words, with_vae, decoder="vae")


BROKEN = {
    "nan": "returned a score that is not a finite number",
    "a list": "returned a list; it must return a tensor of one number for each picture",
    "one number for all": "returned scores of shape (); it must return one number for each of 1 pictures",
    "a number for each pixel": "returned scores of shape (1, 3)",
    "no gradient": "This reward has no gradient to guide by",
    "not differentiable": "brightness has no gradient to guide by",
    "steep": "The reward's gradient is not a finite number",
}


@pytest.mark.parametrize(("breakage", "words"), BROKEN.items(), ids=BROKEN)
@pytest.mark.parametrize("guide", [one_box, two_nodes], ids=["one box", "two nodes"])
def test_reward_that_goes_wrong(refused_guided, guide, breakage, words):
    refused_guided("flux", words, guide, reward=broken(breakage))


def test_combined_reward_that_goes_wrong(refused_guided):
    def half_broken(graph):
        parts = {"reward_1": broken("nan")(graph), "reward_2": statistic("contrast", "other")(graph)}
        return graph.add("combined", "RewardGuidanceCombineRewards", **parts)

    refused_guided("flux", "brightness returned a score that is not a finite number", reward=half_broken)


def test_combination_of_nothing(refused_guided):
    def nothing(graph):
        return graph.add("combined", "RewardGuidanceCombineRewards", reward_1=statistic()(graph), weight_1=0.0)

    refused_guided("flux", "every weight is 0", reward=nothing)


@pytest.mark.parametrize("prompt", ["", " \n "])
def test_empty_prompt_for_a_reward_that_reads_it(refused_guided, clip_reward, prompt):
    refused_guided("flux", "the prompt is empty; write one into the prompt field", reward=clip_reward, prompt=prompt)


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_temperature_that_is_not_positive(refused_guided, value):
    refused_guided("flux", "smaller than min of 0.001 (temperature)", temperature=value)
    refused_guided("flux", f"temperature must be a number from 0.001 to 100.0, not {value}", temperature=wired(value))


@pytest.mark.parametrize("name", ["strength", "temperature", "cap", "target", "end_percent"])
def test_numbers_that_are_none(refused_guided, name):
    """Typed in, where ComfyUI compares them with the limits, and wired in, where it does not."""
    for value in (math.nan, wired(math.nan), wired(1e9)):
        refused_guided("flux", f"{name} must be a number from ", **{name: value})


def test_start_above_the_end(refused_guided):
    refused_guided("flux", "the start must not lie after the end", start_percent=0.8, end_percent=0.2)


def test_likeness_in_meaning_without_a_clip(refused_guided):
    def likeness(graph):
        image = graph.add("image", "EmptyImage", width=64, height=64, batch_size=1, color=0)
        return graph.add("likeness", "RewardGuidanceImageSimilarity", image=image, likeness="meaning")

    refused_guided("flux", "connect Load Reward Model with a CLIP", reward=likeness)


@pytest.mark.parametrize("colour", ["", "blue", "#12", "#gggggg"])
def test_colour_that_is_none(refused_guided, colour):
    refused_guided("flux", "A colour is written as #rrggbb", reward=statistic("colour", colour=colour))


@pytest.mark.parametrize("value", [0, -2])
def test_frames_that_make_no_sense(refused_guided, value):
    refused_guided(
        "wan",
        f"frames must be a whole number from 1 to 64, not {value}",
        frames=wired(value),
    )


@pytest.mark.parametrize("frames", [1, 2, 64])
def test_video_is_rewarded_by_its_frames(bench, frames):
    prompt = latents("wan", one_box(decoder="latent_rgb", frames=frames), batch=2, seed=next(SEEDS))
    prompt["latent"]["inputs"]["length"] = 9
    result = bench.run(prompt)
    assert bench.latent(result).shape[:3] == (2, 16, 3)
    assert [len(step["series"]["reward"]) for step in result.outputs["sampler"]["reward_guidance"]] == [2, 2]
