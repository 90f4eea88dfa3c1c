"""Damaged, foreign and hostile reward files: each a sentence, none a crash, and no code run."""

import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import time

import open_clip
import pytest
import torch
import transformers
from reward_guidance.guidance.rewards import ClipReward, ImageReward, LoadOptions, RewardError, evaluate, load_reward
from reward_guidance.tests.standins import rewards as standins
from reward_guidance.tests.standins.files import run_with_little_memory, sparse
from reward_guidance.tests.unit.shared import CHECKOUT
from safetensors import safe_open
from safetensors.torch import load_file, save_file


def tiny_state():
    torch.manual_seed(0)
    vision = open_clip.model.CLIPVisionCfg(layers=1, width=8, head_width=8, patch_size=8, image_size=8)
    text = open_clip.model.CLIPTextCfg(context_length=8, width=8, heads=1, layers=1)
    return open_clip.model.CLIP(8, vision, text).state_dict()


STATE = tiny_state()


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("good")
    save_file(STATE, path / "tiny.safetensors")
    torch.save(STATE, path / "tiny.pt")
    torch.save(STATE, path / "legacy.pt", _use_new_zipfile_serialization=False)
    return path


@pytest.mark.parametrize("name", ["tiny.safetensors", "tiny.pt", "legacy.pt"])
def test_the_content_decides_and_not_the_name(good, tmp_path, name):
    for suffix in (".safetensors", ".ckpt", ".bin", ""):
        (tmp_path / f"reward{suffix}").write_bytes((good / name).read_bytes())
        assert evaluate(load_reward(tmp_path / f"reward{suffix}"), torch.rand(1, 3, 8, 8), "a cat").shape == (1,)


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("code_was_run",)


def without(*keys):
    return {key: value for key, value in STATE.items() if key not in keys}


CONTENTS = {
    "empty": (b"", "is empty; download it again"),
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "is a git-lfs pointer"),
    "web page": (b"\n<!DOCTYPE html><html>Sign in</html>", "is a web page"),
    "text": (b"Entry not found", "is neither a safetensors file nor a PyTorch checkpoint"),
    "picture": (b"\x89PNG\r\n\x1a\n" + b"\0" * 50, "is neither a safetensors file nor a PyTorch checkpoint"),
    "zip that is no checkpoint": (b"PK\x03\x04" + b"\0" * 50, "is damaged or only half downloaded"),
    "pickle with code": (
        pickle.dumps(RunsCode(), protocol=2),
        r"contains code \(\w+\.mkdir\), which is not run; use a safetensors version",
    ),
}


@pytest.mark.parametrize(("content", "message"), CONTENTS.values(), ids=CONTENTS.keys())
def test_files_that_are_no_weights(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reward.safetensors").write_bytes(content)
    assert_refused(tmp_path / "reward.safetensors", f"reward.safetensors {message}")
    assert not (tmp_path / "code_was_run").exists()


STATES = {
    "another model": (
        {"a": torch.zeros(1), "model.diffusion_model.x": torch.zeros(1)},
        r"is not a reward that can be read \(it holds a, model\.diffusion_model\.x\); supported are PickScore, HPS v2",
    ),
    "only the image tower": (
        {k: v for k, v in STATE.items() if k.startswith("visual")},
        "it is an image tower alone; put a text tower",
    ),
    "only the text tower": (
        {k: v for k, v in STATE.items() if not k.startswith("visual")},
        "is a text tower alone; choose the image tower",
    ),
    "no tensors": ({}, "it holds no tensors"),
    "a missing weight": (without("ln_final.bias"), "do not fit together .*Missing key.*ln_final.bias"),
    "a needed shape": (without("visual.positional_embedding"), "do not fit together .*visual.positional_embedding"),
    "an unknown weight": (
        STATE | {"visual.other.x": torch.zeros(1)},
        "do not fit together .*Unexpected key.*visual.other.x",
    ),
    "a wrong shape": (STATE | {"ln_final.bias": torch.zeros(9)}, "do not fit together .*size mismatch"),
    "another vocabulary": (
        STATE | {"token_embedding.weight": torch.zeros(32000, 8)},
        "vocabulary has 32000 tokens; only CLIP's own",
    ),
    "integers": ({k: v.to(torch.int8) for k, v in STATE.items()}, "stored as torch.int8; save them as float16"),
    "float8": (
        STATE | {"text_projection": STATE["text_projection"].to(torch.float8_e4m3fn)},
        "stored as torch.float8_e4m3fn",
    ),
    "no width": (STATE | {"visual.conv1.weight": torch.zeros(0, 3, 8, 8)}, "do not fit together"),
    "a small first layer": (
        STATE | {"visual.conv1.weight": torch.zeros(64, 3, 3, 3)},
        "or use the published file where",
    ),
}


def other_clips():
    """Of open_clip and of transformers: what it is called -> its weights."""
    vision = {"layers": 1, "width": 8, "head_width": 8, "patch_size": 8, "image_size": 8}
    text = {"context_length": 8, "width": 8, "heads": 1, "layers": 1}
    resnet = {"layers": (1, 1, 1, 1), "width": 16, "image_size": 32}
    siglip = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    siglip_towers = {"text_config": siglip, "vision_config": siglip | {"image_size": 32, "patch_size": 8}}
    model = open_clip.model
    return {
        "a CLIP with a ResNet for its image tower": model.CLIP(
            8, model.CLIPVisionCfg(**resnet), model.CLIPTextCfg(**text)
        ),
        "a CLIP with a text tower of another make": model.CustomTextCLIP(
            8, model.CLIPVisionCfg(**vision), model.CLIPTextCfg(**text)
        ),
        "a CoCa": open_clip.CoCa(
            8,
            open_clip.coca_model.MultimodalCfg(**text, dim_head=8),
            model.CLIPTextCfg(**text),
            model.CLIPVisionCfg(**vision),
        ),
        "a CLIP with an image tower of timm's": model.CustomTextCLIP(
            8, model.CLIPVisionCfg(timm_model_name="test_vit", image_size=160), model.CLIPTextCfg(**text)
        ),
        "a SigLIP": transformers.SiglipModel(transformers.SiglipConfig(**siglip_towers)),
    }


def test_clips_that_are_built_otherwise(tmp_path):
    for kind, model in other_clips().items():
        torch.save(model.state_dict(), tmp_path / "reward.pt")
        assert_refused(
            tmp_path / "reward.pt", f"reward.pt is {kind}, which cannot be read; of CLIPs only those with ViT towers"
        )


@pytest.mark.parametrize("save", [save_file, torch.save], ids=["safetensors", "checkpoint"])
@pytest.mark.parametrize(("state", "message"), STATES.values(), ids=STATES.keys())
def test_weights_that_are_no_reward(tmp_path, state, message, save):
    save(state, tmp_path / "reward")
    assert_refused(tmp_path / "reward", message)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"reference_mean": "high"}, "reference_mean must be a number, not 'high'"),
        ({"reference_std": "nan"}, "reference_std must be a number"),
        ({"reference_std": "0"}, "it must be positive"),
        ({"vision_heads": "3"}, "8 wide cannot have 3 heads"),
        ({"text_heads": "many"}, "'many'"),
        ({"reference_std": "x" * 10**6}, "reference_std must be a number, not 'x"),
        ({"text_heads": "x" * 10**6}, "do not fit together"),
        ({"text_heads": "9" * 4000}, "cannot have"),
        ({"kind": "x" * 10**6}, "no kind of CLIP reward called 'x"),
    ],
)
def test_bad_metadata(tmp_path, metadata, message):
    save_file(STATE, tmp_path / "reward.safetensors", metadata)
    assert_refused(tmp_path / "reward.safetensors", message)


@pytest.mark.filterwarnings("ignore")
def test_other_objects_and_programs(tmp_path):
    for i, content in enumerate(([1, 2], torch.zeros(3), "text", {"state_dict": {"a": 1}, 3: 4})):
        torch.save(content, tmp_path / f"{i}.pt")
        assert_refused(tmp_path / f"{i}.pt", "it holds no tensors")
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "program.pt")
    assert_refused(tmp_path / "program.pt", "is a TorchScript program, which is not run")


def test_missing_files_and_folders(tmp_path):
    where = f"of yuvalkirstain/PickScore_v1 .Hugging Face. into {tmp_path}, saved as PickScore.safetensors"
    assert_refused(
        tmp_path / "PickScore.safetensors",
        f"There is no reward file PickScore.safetensors; put model.safetensors {where}",
    )
    assert_refused(tmp_path / "mine.safetensors", f"There is no reward file mine.safetensors; put it into {tmp_path}.")
    assert_refused(tmp_path, "holds no weights; it needs one of model.safetensors")


DEEP = "[" * 10**5


@pytest.mark.parametrize(
    "config",
    ["", "[]", '"text"', '{"vision_config": []}', '{"model_cfg": {"vision_cfg": {"head_width": 0}}}', DEEP, "\xff"],
)
def test_damaged_config(good, tmp_path, config):
    (tmp_path / "model.safetensors").write_bytes((good / "tiny.safetensors").read_bytes())
    (tmp_path / "config.json").write_text(config, encoding="latin-1")
    assert_refused(tmp_path, "config.json in .* is damaged")


CLAIMS = {
    "words": ({"positional_embedding": torch.zeros(10**5, 8)}, "reads 100000 tokens; at most 1024"),
    "pixels": ({"visual.positional_embedding": torch.zeros(1 + 10**6, 8)}, "pictures of 8000 pixels a side; 1 to 2048"),
    "no pixels": ({"visual.positional_embedding": torch.zeros(1, 8)}, "pictures of 0 pixels a side"),
}


@pytest.mark.parametrize(("changed", "message"), CLAIMS.values(), ids=CLAIMS)
def test_a_small_file_cannot_claim_much_memory(tmp_path, changed, message):
    save_file(STATE | changed, tmp_path / "reward.safetensors")
    assert_refused(tmp_path / "reward.safetensors", message)


def test_names_of_any_length_are_shown_in_short(tmp_path):
    save_file({"x" * 10**6: torch.zeros(1)}, tmp_path / "reward.safetensors")
    assert_refused(tmp_path / "reward.safetensors", "is not a reward that can be read .it holds x+…")
    state = STATE | {"visual." + "x" * 10**6: torch.zeros(1)}
    save_file(state, tmp_path / "reward.safetensors")
    assert_refused(tmp_path / "reward.safetensors", "do not fit together")


def test_files_that_are_shortened_after_loading_do_no_harm(targets, tmp_path):
    """In a process of its own: a mapping of such a file would end it."""
    shutil.copytree(targets, tmp_path / "copy")
    script = f"""
import os, runpy, torch
from pathlib import Path
runpy.run_path({str(CHECKOUT / "tests" / "conftest.py")!r})
from reward_guidance.guidance.rewards import LoadOptions, evaluate, load_reward
folder = Path({str(tmp_path / "copy")!r})
options = LoadOptions(image_folders=(folder / "towers",), text_folders=(folder / "texts",))
names = "clip.safetensors", "clip.pt", "image_reward.safetensors", "head.pth", "towers/vision.safetensors", "sharded"
rewards = [load_reward(folder / name, options) for name in names]
for file in folder.rglob("*.*"):
    os.truncate(file, 0)
print(torch.cat([evaluate(reward, torch.rand(1, 3, 8, 8), "a cat") for reward in rewards]).isfinite().tolist())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{[True] * 6}\n"), done.stderr


def test_too_little_memory_is_no_damage(tmp_path):
    """Weights of 400 MB, none of which are on the disk, in a process that may take little more than it has."""
    sparse(tmp_path / "likes.safetensors", STATE | {"more": torch.empty(100, 2**20, device="meta")})
    imported = "from reward_guidance.guidance.rewards import load_reward as load"
    assert (
        run_with_little_memory(imported, tmp_path / "likes.safetensors") == "Memory ran out while likes.safetensors was"
    )


CONFIGURATIONS = ("config.json", "open_clip_config.json")
READ = {
    "clip.safetensors": ["clip.safetensors"],
    "clip.pt": ["clip.pt"],
    "sharded": [
        *(f"sharded/model-0000{i}-of-00002.safetensors" for i in (1, 2)),
        *(f"sharded/{name}" for name in CONFIGURATIONS),
    ],
    "folder": ["folder/model.safetensors", *(f"folder/{name}" for name in CONFIGURATIONS)],
    "head.pth": ["head.pth", "towers/l14.safetensors"],
    "towers/vision.safetensors": ["towers/vision.safetensors", "texts/text.safetensors"],
    "image_reward.pt": ["image_reward.pt", "vocab.txt", "tokenizer.json"],
}


@pytest.mark.parametrize("name", READ)
def test_a_reward_knows_what_it_was_read_from(targets, name):
    options = LoadOptions(image_folders=(targets / "towers",), text_folders=(targets / "texts",))
    files = load_reward(targets / name, options).files
    assert [file.relative_to(targets).as_posix() for file in files] == READ[name]


def test_weights_that_are_not_finite_are_said_at_the_first_score(tmp_path):
    save_file(STATE | {"visual.proj": torch.full((8, 8), torch.nan)}, tmp_path / "reward.safetensors")
    with pytest.raises(RewardError, match="weights are damaged"):
        evaluate(load_reward(tmp_path / "reward.safetensors"), torch.rand(1, 3, 8, 8), "a cat")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_pictures_that_are_not_finite_are_not_blamed_on_the_reward(good, value):
    pictures = torch.rand(2, 3, 8, 8)
    pictures[1, 0, 0, 0] = value
    with pytest.raises(RewardError, match="was given pictures with values that are not finite numbers"):
        evaluate(load_reward(good / "tiny.safetensors"), pictures, "a cat")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 100.0, -200.0])
def test_a_damaged_scale(tmp_path, value):
    """Its exponential is the scale of a CLIP score, but not of HPS."""
    save_file(STATE | {"logit_scale": torch.tensor(value)}, tmp_path / "reward.safetensors")
    assert_refused(tmp_path / "reward.safetensors", "reward.safetensors: its logit_scale is damaged; download it again")
    assert load_reward(tmp_path / "reward.safetensors", LoadOptions(kind="HPS v2.1")).reference_std == 0.03


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize(
    ("state", "key"), [(STATE, "visual.proj"), (standins.head(8).state_dict(), "layers.0.weight")], ids=["CLIP", "head"]
)
def test_a_sparse_tensor(tmp_path, state, key):
    torch.save(state | {key: state[key].to_sparse()}, tmp_path / "reward.pt")
    assert_refused(tmp_path / "reward.pt", f"{key} is stored as a sparse tensor; save it as a dense one")


def assert_refused(path, message):
    with pytest.raises(RewardError, match=message) as caught:
        load_reward(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_shards_are_read_together(tmp_path):
    names = [f"model-{i:05}-of-00002.safetensors" for i in (1, 2)]
    keys = sorted(STATE)
    for name, part in zip(names, (keys[::2], keys[1::2]), strict=True):
        save_file({key: STATE[key] for key in part}, tmp_path / name)
    (tmp_path / "config.json").write_text(
        '{"vision_config": {"num_attention_heads": 2}, "text_config": {"num_attention_heads": 1}}'
    )
    for path in (tmp_path, *(tmp_path / name for name in names)):
        reward = load_reward(path)
        assert reward.name == tmp_path.name
        assert reward.model.visual.transformer.resblocks[0].attn.num_heads == 2
    (tmp_path / names[1]).unlink()
    assert_refused(tmp_path, f"{names[1]} is missing: {names[0]} is one of 2 parts")


def test_weights_of_another_reward_in_a_renamed_file(tmp_path):
    """The content decides, whatever the name says."""
    standins.save_image_reward(tmp_path / "HPS_v2.1_compressed.safetensors")
    assert isinstance(load_reward(tmp_path / "HPS_v2.1_compressed.safetensors"), ImageReward)
    save_file(STATE, tmp_path / "ImageReward.safetensors")
    assert isinstance(load_reward(tmp_path / "ImageReward.safetensors"), ClipReward)
    torch.save(standins.head(8).state_dict(), tmp_path / "PickScore_v1.pt")
    assert_refused(tmp_path / "PickScore_v1.pt", "PickScore_v1.pt: it needs the image tower of OpenAI's CLIP ViT-L/14")


MUTATIONS, VALUES = 36, 10
"""Of each file: of its bytes, and of the numbers in it."""
HOSTILE = "hostile.pt"
LOADS = {
    "clip.safetensors": "clip.safetensors",
    "clip.pt": "clip.pt",
    "clip_legacy.pt": "clip_legacy.pt",
    "hps.pt": "hps.pt",
    "image_reward.safetensors": "image_reward.safetensors",
    "image_reward.pt": "image_reward.pt",
    "vocab.txt": "image_reward.safetensors",
    "blip/tokenizer.json": "blip/image_reward.pt",
    "head.pth": "head.pth",
    "towers/l14.safetensors": "head.pth",
    "towers/vision.safetensors": "towers/vision.safetensors",
    "texts/text.safetensors": "towers/vision.safetensors",
    "transformers/model.safetensors": "transformers",
    "folder/config.json": "folder",
    "sharded/model-00002-of-00002.safetensors": "sharded",
    HOSTILE: HOSTILE,
}
"""A file to damage -> what to load then, which reads it."""
NUMBERS = [
    name for name in LOADS if name.endswith((".safetensors", ".pt", ".pth")) and name not in ("clip_legacy.pt", HOSTILE)
]


def tiny_transformers():
    torch.manual_seed(0)
    shared = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    text, vision = {**shared, "max_position_embeddings": 8}, {**shared, "image_size": 8, "patch_size": 8}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))


def save_targets(folder):
    for name in LOADS:
        (folder / name).parent.mkdir(exist_ok=True)
    save_file(STATE, folder / "clip.safetensors")
    torch.save(STATE, folder / "clip.pt")
    torch.save(STATE, folder / "clip_legacy.pt", _use_new_zipfile_serialization=False)
    torch.save({"state_dict": {f"module.{key}": value.half() for key, value in STATE.items()}}, folder / "hps.pt")
    standins.save_image_reward(folder / "image_reward.safetensors")
    for copy in (folder / "image_reward.pt", folder / "blip" / "image_reward.pt"):
        torch.save(load_file(folder / "image_reward.safetensors"), copy)
    standins.bert_tokenizer().backend_tokenizer.save(str(folder / "blip" / "tokenizer.json"))
    standins.save_aesthetic(folder / "head.pth", folder / "towers" / "l14.safetensors")
    model = tiny_transformers()
    model.save_pretrained(folder / "transformers")
    state = model.state_dict()
    save_file(
        {key: value for key, value in state.items() if key.startswith("vis")}, folder / "towers" / "vision.safetensors"
    )
    save_file(
        {key: value for key, value in state.items() if key.startswith("text")}, folder / "texts" / "text.safetensors"
    )
    save_file(STATE, folder / "folder" / "model.safetensors")
    heads = {"num_attention_heads": 1}
    (folder / "folder" / "config.json").write_text(
        json.dumps({"vision_config": {"hidden_act": "gelu", **heads}, "text_config": heads})
    )
    for i, keys in enumerate((sorted(STATE)[::2], sorted(STATE)[1::2]), 1):
        save_file({key: STATE[key] for key in keys}, folder / "sharded" / f"model-{i:05}-of-00002.safetensors")
    torch.save({"a": RunsCode(), **STATE}, folder / HOSTILE)


def mutated(content, keys, random):
    """Cut short, filled up, bytes flipped near the start or anywhere, or a key renamed in place."""
    kind = random.choice(["truncate", "append", "head", "anywhere", "rename"])
    content = bytearray(content)
    if kind == "truncate":
        return content[: random.randrange(len(content))]
    if kind == "append":
        return content + random.randbytes(random.randrange(1, 300))
    if kind == "rename":
        key = random.choice(keys).encode()
        return content.replace(key, bytes(random.sample(list(key), len(key))))
    limit = min(len(content), 6000) if kind == "head" else len(content)
    for _ in range(random.randint(1, 20)):
        content[random.randrange(limit)] ^= 1 << random.randrange(8)
    return content


FILLINGS = (torch.nan, torch.inf, -torch.inf, 3e38, -1e20, 0.0)
DTYPES = (torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.int64, torch.bool, torch.complex64)


def with_other_numbers(file, random):
    """A valid file, in which some tensors, or one number of each, are not what they were."""
    content = load_file(file) if file.suffix == ".safetensors" else torch.load(file)
    state = content.get("state_dict", content)
    keys = sorted(key for key, tensor in state.items() if tensor.is_floating_point())
    filling, dtype = random.choice(FILLINGS), random.choice(DTYPES)
    fill, whole = random.random() < 0.7, random.random() < 0.5
    for key in random.sample(keys, random.choice([1, 3, len(keys)])):
        tensor = state[key] = state[key].clone() if fill else state[key].to(dtype)
        if fill:
            tensor.view(-1)[slice(None) if whole else random.randrange(tensor.numel())] = filling
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as weights:
            save_file(state, file, weights.metadata())
    else:
        torch.save(content, file)


class Watch:
    """Notes what code in a file could do to the machine. An audit hook stays for good, so this one can be told to look away."""

    forbidden = (
        "os.system",
        "os.mkdir",
        "os.rename",
        "os.remove",
        "os.rmdir",
        "subprocess.Popen",
        "socket.connect",
        "shutil.rmtree",
    )

    def __init__(self):
        self.watching, self.seen = False, []
        sys.addaudithook(self.hook)

    def hook(self, event, arguments):
        if self.watching and event in self.forbidden:
            self.seen.append(event)


@pytest.fixture(scope="module")
def watch():
    return Watch()


KEYS = (*STATE, "state_dict", "vision_config", "layers.2.weight", "blip.visual_encoder.norm.bias", "[SEP]", "cat")
KEYS += (
    "visual_projection.weight",
    "text_projection.weight",
    "text_model.final_layer_norm.bias",
    "vision_model.post_layernorm.weight",
)


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("targets")
    save_targets(folder)
    return folder


def score(folder, name):
    options = LoadOptions(image_folders=(folder / "towers",), text_folders=(folder / "texts",))
    return evaluate(load_reward(folder / LOADS[name], options), torch.rand(1, 3, 8, 8), "a cat")


def count_refused(folder, name, watch, times, damage):
    """Of so many damaged files; the others are scored. `damage` is called with the file, which is whole, and a generator."""
    file, generator, refused = folder / name, random.Random(name), 0
    content = file.read_bytes()
    for _ in range(times):
        damage(file, generator)
        started, watch.watching = time.monotonic(), True
        try:
            score(folder, name)
        except RewardError as error:
            refused += 1
            assert re.fullmatch(r"[^\n]{20,400}[.)]", str(error))
        finally:
            watch.watching = False
            file.write_bytes(content)
        assert time.monotonic() - started < 10
    assert watch.seen == []
    return refused


@pytest.mark.parametrize("name", [name for name in LOADS if name != HOSTILE])
def test_undamaged_files_are_scored(targets, name):
    score(targets, name)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LOADS)
def test_damaged_files_are_scored_or_refused_in_a_sentence(targets, watch, name):
    content = (targets / name).read_bytes()
    keys = [key for key in KEYS if key.encode() in content]

    def damage(file, generator):
        file.write_bytes(mutated(content, keys, generator))

    assert count_refused(targets, name, watch, MUTATIONS, damage) > MUTATIONS // 6


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NUMBERS)
def test_files_with_other_numbers_are_scored_or_refused_in_a_sentence(targets, watch, name):
    assert 0 < count_refused(targets, name, watch, VALUES, with_other_numbers) < VALUES
