"""Every kind of reward file in the folders of a real ComfyUI, what Score Images says of pictures, and a reward from another pack."""

import io
import json
import os
import re
import time
from urllib.parse import urlencode

import pytest
import torch
from PIL import Image
from reward_guidance.guidance.rewards import evaluate, load_reward
from reward_guidance.guidance.tensors import read_header
from reward_guidance.tests.harness import environment
from reward_guidance.tests.harness.graphs import Graph
from reward_guidance.tests.harness.guided import latents, mean_reward, one_box, reward_file, seeds_of, statistic
from reward_guidance.tests.standins import rewards as standins
from safetensors.torch import load_file, save_file

SEEDS = seeds_of(__file__)
PROMPT = "a large red circle"


@pytest.fixture(scope="module")
def models(server):
    """A file of every kind, where a user would put it."""
    folder = server.base / "models"
    for name in ("reward_models", "clip_vision", "text_encoders"):
        (folder / name).mkdir(exist_ok=True)
    own = folder / "reward_models"
    standins.save_hps(own / "HPS_v2.1_tiny.safetensors")
    standins.save_transformers(own / "tiny_clip_folder")
    standins.save_image_reward(own / "ImageReward_tiny.safetensors")
    standins.save_aesthetic(own / "sac+logos+ava1-l14-linearMSE.pth", folder / "clip_vision" / "tiny_l14.safetensors")
    standins.save_towers(
        folder / "clip_vision" / "tiny_vision_g.safetensors", folder / "text_encoders" / "tiny_g.safetensors"
    )
    return folder


FILES = (
    "HPS_v2.1_tiny.safetensors",
    "tiny_clip_folder/model.safetensors",
    "ImageReward_tiny.safetensors",
    "sac+logos+ava1-l14-linearMSE.pth",
    "clip_vision/tiny_vision_g.safetensors",
)


def pictures(graph, *colours, size=32):
    images = [
        graph.add(f"image_{i}", "EmptyImage", width=size, height=size, batch_size=1, color=colour)
        for i, colour in enumerate(colours)
    ]
    return graph.add("images", "ImageBatch", image1=images[0], image2=images[1]) if len(images) > 1 else images[0]


def scored(build_reward, images=lambda graph: pictures(graph, 0x000000, 0xFF4020), prompt=PROMPT):
    """Score Images with all that it gives shown or saved."""
    graph = Graph()
    graph.add("score", "RewardGuidanceScoreImages", images=images(graph), reward=build_reward(graph), prompt=prompt)
    for output, node in enumerate(("raw", "standardized", "report")):
        graph.add(node, "PreviewAny", source=["score", output])
    graph.add("save", "SaveImage", images=["score", 3], filename_prefix=f"scored_{next(SEEDS)}_%batch_num%")
    graph.add("annotated", "SaveImage", images=["score", 4], filename_prefix=f"annotated_{next(SEEDS)}")
    return graph.prompt


def numbers(result, node):
    return [float(text) for text in result.outputs[node]["text"]]


@pytest.mark.parametrize("dtype", ["auto", "bf16"])
@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_scores(bench, models, name, dtype):
    result = bench.run(scored(reward_file(name, dtype=dtype)))
    scores = numbers(result, "raw")
    assert len(scores) == 2
    assert scores[0] != scores[1]
    if dtype == "auto" and not name.startswith(("sac", "clip_vision")):
        batch = torch.stack(
            [torch.zeros(3, 32, 32), torch.tensor([1.0, 0x40 / 255, 0x20 / 255]).view(3, 1, 1).expand(3, 32, 32)]
        )
        with torch.no_grad():
            assert scores == pytest.approx(
                evaluate(load_reward(models / "reward_models" / name), batch, PROMPT).tolist(), abs=1e-3
            )


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_guides(bench, models, name):
    def sample(strength):
        guide = one_box(decoder="latent_rgb", reward=reward_file(name), prompt=PROMPT, strength=strength)
        return bench.latent(bench.run(latents("flux", guide, seed=3)))

    assert not torch.equal(sample(1.0), sample(0.0))


TAKEN_FOR = {
    "HPS_v2.1_tiny.safetensors": "HPS v2.1, with GELU",
    "tiny_clip_folder/model.safetensors": "CLIP score, with GELU",
    "ImageReward_tiny.safetensors": "ImageReward",
    "sac+logos+ava1-l14-linearMSE.pth": "LAION aesthetic, with the image tower of tiny_l14",
    "clip_vision/tiny_vision_g.safetensors": "CLIP score, with QuickGELU, prompts read by tiny_g.safetensors",
}


@pytest.mark.parametrize("name", FILES)
def test_the_node_shows_what_a_file_is_taken_for(bench, models, name):
    bench.client.free()
    assert bench.run(scored(reward_file(name))).outputs["loaded"]["text"] == [f"used as {TAKEN_FOR[name]}"]


def test_kind_can_be_overruled(bench, models):
    hps, clip = (
        numbers(bench.run(scored(reward_file(FILES[0], clip_kind=kind))), "raw") for kind in ("auto", "CLIP score")
    )
    assert [a / b for a, b in zip(clip, hps, strict=True)] == pytest.approx([1 / 0.07] * 2, rel=1e-2)


def test_towers_can_be_named(bench, models):
    named = bench.run(scored(reward_file(FILES[4], text_tower="tiny_g.safetensors")))
    assert numbers(named, "raw") == numbers(bench.run(scored(reward_file(FILES[4]))), "raw")
    wrong = bench.queue(scored(reward_file(FILES[4], text_tower="tiny_clip_l.pt")))
    assert "tiny_clip_l.pt has" in wrong.error


def combination(graph):
    parts = {"reward_1": statistic("brightness")(graph), "reward_2": reward_file(FILES[0])(graph), "weight_1": -1.0}
    return graph.add("combined", "RewardGuidanceCombineRewards", **parts)


def test_a_combination_shows_its_parts(bench, models):
    result = bench.run(scored(combination))
    (report,) = result.outputs["report"]["text"]
    header, _, first, second = [[cell.strip() for cell in line.strip("|").split("|")] for line in report.splitlines()]
    assert header == ["picture", "less brightness + HPS_v2.1_tiny", "brightness", "HPS_v2.1_tiny"]
    assert [row[0] for row in (first, second)] == ["1", "2"]
    assert [float(row[1]) for row in (first, second)] == pytest.approx(numbers(result, "standardized"), abs=0.01)
    assert first[2].startswith("0.0000 (-3.33)")
    assert numbers(result, "raw") == numbers(result, "standardized")


def opened(bench, file):
    return Image.open(io.BytesIO(bench.client.fetch(f"/view?{urlencode(file)}")))


def test_scores_are_written_into_saved_pictures_beside_the_workflow(bench, models):
    workflow = {"id": "mine", "nodes": [], "links": [], "version": 0.4}
    text = f"{PROMPT} {next(SEEDS)}"  # what ComfyUI remembers of another run is not written again
    result = bench.run(scored(combination, prompt=text), extra_pnginfo={"workflow": workflow})
    files = [opened(bench, file) for file in result.outputs["save"]["images"]]
    assert [file["filename"].split("_")[2] for file in result.outputs["save"]["images"]] == ["0", "1"]
    for image in files:
        assert json.loads(image.text["workflow"]) == workflow
        assert json.loads(image.text["prompt"])["score"]["class_type"] == "RewardGuidanceScoreImages"
        (record,) = json.loads(image.text["reward_guidance"]).values()
        assert record["scores"] == pytest.approx(numbers(result, "raw"), abs=1e-4)
        assert (record["reward"], record["prompt"]) == ("less brightness + HPS_v2.1_tiny", text)
        assert [part["reward"] for part in record["parts"]] == ["brightness", "HPS_v2.1_tiny"]
        assert [len(part["scores"]) for part in record["parts"]] == [2, 2]


def entries(bench, file):
    return json.loads(opened(bench, file).text["reward_guidance"])


WORKFLOW = {"workflow": {"id": "mine", "nodes": [], "links": [], "version": 0.4}}


def test_pictures_that_are_saved_later_have_the_scores_too(bench):
    """Scored first, then with a node connected that saves them, then saved under another name; and nothing is scored or saved again in vain."""
    graph = Graph()
    images, prompt = pictures(graph, 0x000000, 0xFF4020), f"{PROMPT} {next(SEEDS)}"
    graph.add("score", "RewardGuidanceScoreImages", images=images, reward=statistic("brightness")(graph), prompt=prompt)
    first = bench.run(graph.prompt, extra_pnginfo=WORKFLOW)
    assert "score" in first.node_seconds
    for name in ("later", "renamed"):
        graph.add("save", "SaveImage", images=["score", 3], filename_prefix=f"{name}_{next(SEEDS)}")
        result = bench.run(graph.prompt, extra_pnginfo=WORKFLOW)
        for file in result.outputs["save"]["images"]:
            assert entries(bench, file)["score"]["prompt"] == prompt
    assert set(bench.run(graph.prompt, extra_pnginfo=WORKFLOW).node_seconds) == set()


def test_chosen_pictures_have_their_own_scores_whatever_is_chosen(bench):
    graph = Graph()
    images = pictures(graph, 0x202020, 0xF0F0F0)
    scores = [
        graph.add("score", "RewardGuidanceScoreImages", images=images, reward=statistic("brightness")(graph))[0],
        0,
    ]
    for by in ({"scores": scores}, {"reward": ["reward", 0]}):
        for keep, name in ((2, "chosen"), (1, "chosen"), (1, "renamed")):
            graph.add("select", "RewardGuidanceSelectBest", images=["score", 3], keep=keep, prompt="", **by)
            graph.add("save", "SaveImage", images=["select", 0], filename_prefix=f"{name}_{next(SEEDS)}_%batch_num%")
            files = bench.run(graph.prompt, extra_pnginfo=WORKFLOW).outputs["save"]["images"]
            assert len(files) == keep
            for i, file in enumerate(files):
                assert file["filename"].split("_")[2] == str(i)
                own = entries(bench, file)["select"]
                shade = opened(bench, file).getpixel((0, 0))[0] / 255
                score = shade if "scores" in by else (shade - 0.4) / 0.12
                assert own["scores" if "scores" in by else "standardized"][i] == pytest.approx(score, abs=0.01)
                assert own["indices"][i] == [1, 0][i]
                assert own.get("reward") == (None if "scores" in by else "brightness")


HELP = environment.CHECKOUT / "nodes" / "web" / "docs"


@pytest.mark.parametrize(
    "page", [f"RewardGuidance{node}{end}.md" for node in ("ScoreImages", "SelectBest") for end in ("", "/zh")]
)
def test_the_name_that_tells_a_pictures_own_scores_overwrites_nothing(bench, page):
    """With %batch_num% in a name, ComfyUI always counts from 1."""
    name = max(re.findall("`(%[^`]+)`", (HELP / page).read_text(encoding="utf-8")), key=len)
    graph, files = Graph(), []
    graph.add(
        "score",
        "RewardGuidanceScoreImages",
        images=pictures(graph, 0x202020, 0xF0F0F0),
        reward=statistic()(graph),
        prompt="",
    )
    for run in range(2):
        time.sleep(1)  # the time is in the name
        graph.add("save", "SaveImage", images=["score", 3], filename_prefix=name)
        graph.add("reward", "RewardGuidanceImageStatistic", statistic=["brightness", "contrast"][run])
        files += [
            file["filename"] for file in bench.run(graph.prompt, extra_pnginfo=WORKFLOW).outputs["save"]["images"]
        ]
    assert len(set(files)) == 4
    assert [file.split("_")[2] for file in files] == ["0", "1"] * 2


def test_every_batch_of_a_list_has_its_own_scores_in_its_files(bench):
    graph, shades = Graph(), {"short": (0x404040,), "long": (0x202020, 0xF0F0F0)}
    for name, colours in shades.items():
        each = [
            graph.add(f"{name}_{i}", "EmptyImage", width=32, height=32, batch_size=1, color=colour)
            for i, colour in enumerate(colours)
        ]
        graph.add(name, "ImageBatch", image1=each[0], image2=each[-1])
    graph.add("list", "ProbeList", first=["short", 0], second=["long", 0])
    graph.add(
        "score", "RewardGuidanceScoreImages", images=["list", 0], reward=statistic("brightness")(graph), prompt=""
    )
    graph.add("save", "SaveImage", images=["score", 3], filename_prefix=f"list_{next(SEEDS)}")
    files = bench.run(graph.prompt, extra_pnginfo=WORKFLOW).outputs["save"]["images"]
    assert len(files) == 4
    for file in files:
        said = [score for entry in entries(bench, file)["score"] for score in entry["scores"]]
        assert said == pytest.approx([opened(bench, each).getpixel((0, 0))[0] / 255 for each in files], abs=0.01)


def test_a_prompt_from_a_program_has_no_place_for_scores_in_its_pictures(bench, models):
    result = bench.run(scored(statistic("brightness")))
    assert set(opened(bench, result.outputs["save"]["images"][0]).text) == {"prompt"}


def test_annotated_pictures_are_the_pictures_with_a_caption(bench, models):
    result = bench.run(scored(combination, lambda graph: pictures(graph, 0x000000, 0xFF4020, size=300)))
    plain, annotated = (
        [opened(bench, file) for file in result.outputs[node]["images"]] for node in ("save", "annotated")
    )
    for before, after in zip(plain, annotated, strict=True):
        assert after.width == 300
        assert after.height > 340
        assert after.crop((0, 0, 300, 300)).tobytes() == before.convert("RGB").tobytes()
        assert len(after.crop((0, 300, 300, after.height)).getcolors(1 << 16)) > 20


def test_a_long_prompt_is_said_to_be_cut(bench, models):
    result = bench.run(scored(combination, prompt=PROMPT + " on a blue ground, masterpiece, best quality, and the end"))
    (report,) = result.outputs["report"]["text"]
    assert report.splitlines()[-1].startswith("HPS_v2.1_tiny reads only the beginning of the prompt; it does not see: ")
    assert report.endswith("and the end")


def transparent(graph):
    image = pictures(graph, 0xFF0000)
    mask = graph.add("mask", "SolidMask", value=0.5, width=32, height=32)
    return graph.add("transparent", "JoinImageWithAlpha", image=image, alpha=mask)


@pytest.mark.parametrize(
    "images", [transparent, lambda graph: pictures(graph, 0xFF0000, size=1)], ids=["transparent", "one pixel"]
)
@pytest.mark.parametrize("name", FILES)
def test_odd_pictures_are_scored(bench, models, name, images):
    assert len(numbers(bench.run(scored(reward_file(name), images)), "raw")) == 1


MISSING = {
    "vocabulary": ("vocab.txt", "ImageReward_tiny.safetensors", "put vocab.txt of google-bert/bert-base-uncased"),
    "text tower": (
        "../text_encoders/tiny_g.safetensors",
        "clip_vision/tiny_vision_g.safetensors",
        "is an image tower alone; put a text tower",
    ),
    "image tower": (
        "../clip_vision/tiny_l14.safetensors",
        FILES[3],
        "put model.safetensors of openai/clip-vit-large-patch14",
    ),
}


@pytest.mark.parametrize(("part", "name", "words"), MISSING.values(), ids=MISSING)
def test_a_missing_part_is_asked_for_and_then_found(bench, models, part, name, words):
    file = models / "reward_models" / part
    content = file.read_bytes()
    file.unlink()
    bench.client.free()
    try:
        refused = bench.queue(scored(reward_file(name)))
        assert words in refused.error
        assert str(file.resolve().parent) in refused.error
        assert "\n" not in refused.error
    finally:
        file.write_bytes(content)
    assert bench.queue(scored(reward_file(name))).error is None


HUGGING_FACE = "(Hugging Face)"
BERT = f"vocab.txt of google-bert/bert-base-uncased {HUGGING_FACE}"
NOT_THERE = {
    "new/PickScore_v1.safetensors": f"put model.safetensors of yuvalkirstain/PickScore_v1 {HUGGING_FACE} into ",
    "new/PickScore_v1/model.safetensors": f"put model.safetensors of yuvalkirstain/PickScore_v1 {HUGGING_FACE} into ",
    "new/HPS_v2_compressed.pt": f"put HPS_v2_compressed.pt of xswu/HPSv2 {HUGGING_FACE} into ",
    "new/HPS_v2.1_compressed.pt": f"put HPS_v2.1_compressed.pt of xswu/HPSv2 {HUGGING_FACE} into ",
    "new/ImageReward.pt": f"put ImageReward.pt of zai-org/ImageReward {HUGGING_FACE}, and {BERT} beside it into ",
    "new/sac+logos+ava1-l14-linearMSE.pth": "put sac+logos+ava1-l14-linearMSE.pth of christophschuhmann/improved-aesthetic-predictor (GitHub), and",
    "clip_vision/CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors": f"put model.safetensors of laion/CLIP-ViT-H-14-laion2B-s32B-b79K {HUGGING_FACE} into ",
    "new/mine.safetensors": "new/mine.safetensors is not in ",
}


@pytest.mark.parametrize(("name", "words"), NOT_THERE.items(), ids=NOT_THERE)
def test_a_missing_reward_file_is_asked_for(bench, models, name, words):
    refused = bench.queue(scored(reward_file(name)))
    assert words in refused.error
    folder = models / ("clip_vision" if name.startswith("clip_vision") else "reward_models")
    assert f"{folder.resolve()}" in refused.error
    if "mine" in name:
        assert ", where there is " in refused.error
        assert FILES[0] in refused.error
    else:
        assert refused.error.endswith(f", saved as {name.removeprefix('clip_vision/')}; then press R.)")


NOT_CHOSEN = "No reward file is chosen: put one into "
NO_NAME = {
    "missing": ({}, "Required input is missing (reward_name)"),
    "empty": ({"reward_name": ""}, NOT_CHOSEN),
    "null": ({"reward_name": None}, NOT_CHOSEN),
}


@pytest.mark.parametrize(("inputs", "words"), NO_NAME.values(), ids=NO_NAME)
def test_no_reward_file_at_all(bench, inputs, words):
    """As the page may ask for it where there is none to choose."""
    graph = Graph()
    graph.add("loaded", "RewardGuidanceLoadReward", **inputs)
    graph.add("show", "PreviewAny", source=["loaded", 0])
    assert words in bench.client.run(graph.prompt).error


def test_what_lies_beside_a_reward_file_is_read_again_when_it_changes(bench, models):
    file = models / "reward_models" / "tiny_clip_folder" / "config.json"
    before = file.read_text()
    shown = [bench.run(scored(reward_file(FILES[1]))).outputs["loaded"]["text"]]
    try:
        for activation in ("quick_gelu", "gelu"):
            config = json.loads(before)
            config["vision_config"]["hidden_act"] = activation
            time.sleep(0.01)
            file.write_text(json.dumps(config))
            shown.append(bench.run(scored(reward_file(FILES[1]))).outputs["loaded"].get("text"))
    finally:
        file.write_text(before)
    assert shown[1:] == [["used as CLIP score, with QuickGELU"], ["used as CLIP score, with GELU"]]


SHARDS = ("tiny_shards/model-00001-of-00002.safetensors", "tiny_shards/model-00002-of-00002.safetensors")
REPLACED = {
    "the file": (FILES[0], f"reward_models/{FILES[0]}"),
    "a later shard": (SHARDS[0], f"reward_models/{SHARDS[1]}"),
    "an image tower that was found": (FILES[3], "clip_vision/tiny_l14.safetensors"),
    "a text tower that was found": (FILES[4], "text_encoders/tiny_g.safetensors"),
}


@pytest.fixture(scope="module")
def shards(models):
    folder = models / "reward_models" / "tiny_shards"
    folder.mkdir(exist_ok=True)
    tensors, (_, hints) = (
        load_file(models / "reward_models" / FILES[0]),
        read_header(models / "reward_models" / FILES[0]),
    )
    for i, name in enumerate(SHARDS):
        save_file({key: tensors[key] for key in sorted(tensors)[i::2]}, models / "reward_models" / name, hints)


def otherwise(file, in_place):
    """The same names, shapes, size and time; other numbers."""
    before, (_, hints) = file.stat(), read_header(file)
    torch.manual_seed(1)
    other = {
        key: tensor + 0.1 * torch.randn_like(tensor) if tensor.is_floating_point() else tensor
        for key, tensor in load_file(file).items()
    }
    save_file(other, file.with_suffix(".new"), hints)
    if in_place:
        file.write_bytes(file.with_suffix(".new").read_bytes())
        file.with_suffix(".new").unlink()
    else:
        file.with_suffix(".new").replace(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "replaced"])
@pytest.mark.parametrize(("name", "file"), REPLACED.values(), ids=REPLACED)
def test_what_a_reward_was_read_from_is_read_again_when_it_is_another(bench, models, shards, name, file, in_place):
    content = (models / file).read_bytes()
    before = numbers(bench.run(scored(reward_file(name))), "raw")
    assert "loaded" not in bench.run(scored(reward_file(name))).node_seconds
    try:
        otherwise(models / file, in_place)
        assert numbers(bench.run(scored(reward_file(name))), "raw") != before
    finally:
        (models / file).write_bytes(content)
    assert numbers(bench.run(scored(reward_file(name))), "raw") == before


def test_a_name_from_another_node_is_remembered(bench, models):
    graph = Graph()
    graph.add("name", "ProbeName", name=FILES[0])
    graph.add("loaded", "RewardGuidanceLoadReward", reward_name=["name", 0])
    graph.add(
        "score", "RewardGuidanceScoreImages", images=pictures(graph, 0x000000), reward=["loaded", 0], prompt=PROMPT
    )
    assert "loaded" in bench.run(graph.prompt).node_seconds
    assert set(bench.run(graph.prompt).node_seconds) == set()


def redness(graph):
    return graph.add("redness", "RednessReward")


def test_a_reward_of_another_pack_scores(bench):
    result = bench.run(scored(redness, lambda graph: pictures(graph, 0x0000FF, 0xFF0000), prompt=""))
    assert numbers(result, "raw") == pytest.approx([-0.5, 1.0], abs=1e-5)
    assert numbers(result, "standardized") == pytest.approx([-5, 10], abs=1e-4)
    assert "redness" in result.outputs["report"]["text"][0]


def test_a_reward_of_another_pack_guides_and_combines(bench):
    def combined(graph):
        return graph.add(
            "combined", "RewardGuidanceCombineRewards", reward_1=redness(graph), reward_2=statistic("contrast")(graph)
        )

    def sample(reward, **options):
        result = bench.run(latents("flux", one_box(decoder="latent_rgb", reward=reward, **options), steps=6, seed=9))
        return bench.latent(result), [
            mean_reward(step) for step in result.outputs["sampler"].get("reward_guidance", [])
        ]

    plain, _ = sample(redness, strength=0.0)
    for reward in (redness, combined):
        guided, rewards = sample(reward)
        assert not torch.equal(guided, plain)
        assert rewards[-1] > rewards[0]
