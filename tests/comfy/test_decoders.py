"""Decoders against ComfyUI's own decoding, and their gradients against finite differences."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from reward_guidance.tests.harness import models
from reward_guidance.tests.harness.inprocess import load_comfyui

load_comfyui()

import comfy.latent_formats
import comfy.model_management
import comfy.sd
import comfy.supported_models
import comfy.taesd.taehv
import comfy.taesd.taesd
import comfy.utils
import folder_paths
import torch
from reward_guidance.guidance.errors import GuidanceError
from reward_guidance.guidance.rewards import ImageStatistic, evaluate, load_reward
from reward_guidance.nodes.wiring import decoders, scoring, tiny_decoders, vae_decoder
from reward_guidance.nodes.wiring.autograd import gradients
from reward_guidance.nodes.wiring.decoders import make_decoder
from reward_guidance.nodes.wiring.latent_reward import LatentReward
from reward_guidance.nodes.wiring.loaded import LoadedReward
from reward_guidance.nodes.wiring.tiny_decoders import TAESD, halved
from reward_guidance.nodes.wiring.vae_decoder import FullVAE, require_matching_vae
from reward_guidance.tests.standins.shapesworld import world
from reward_guidance.tests.standins.vaes import VAES, small_vae, weights
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from nodes import VAELoader

FORMATS = {
    "sd15": (comfy.latent_formats.SD15, "vae-ft-mse-840000-ema-pruned.ckpt"),
    "sd3": (comfy.latent_formats.SD3, "ae.safetensors"),
    "flux": (comfy.latent_formats.Flux, "ae.safetensors"),
    "wan": (comfy.latent_formats.Wan21, "wan_2.1_vae.safetensors"),
}


@pytest.fixture(scope="module")
def standins():
    """The stand-ins' folder, where ComfyUI looks for tiny autoencoders."""
    folder = models.format_standins()
    paths, extensions = folder_paths.folder_names_and_paths["vae_approx"]
    folder_paths.folder_names_and_paths["vae_approx"] = ([str(folder / "vae_approx")], extensions)
    yield folder
    folder_paths.folder_names_and_paths["vae_approx"] = (paths, extensions)


def latents(latent_format, seed=0, size=4):
    return torch.randn(2, latent_format.latent_channels, size, size, generator=torch.Generator().manual_seed(seed))


def load_vae(standins, name):
    with torch.inference_mode():
        return comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(standins / "vae" / FORMATS[name][1])))


def decode(decoder, point):
    with gradients(*decoder.modules):
        return decoder.pixels(point)


@pytest.mark.parametrize("choice", ["latent_rgb", "taesd", "vae"])
@pytest.mark.parametrize("name", FORMATS)
def test_gradients_are_those_of_finite_differences(standins, name, choice):
    latent_format = FORMATS[name][0]()
    check_gradient(
        make_decoder(choice, latent_format, load_vae(standins, name) if choice == "vae" else None),
        latents(latent_format),
    )


def check_gradient(decoder, point):
    target = torch.rand(decode(decoder, point).shape, generator=torch.Generator().manual_seed(1))
    with gradients(*decoder.modules), torch.enable_grad():
        variable = point.clone().requires_grad_()
        (gradient,) = torch.autograd.grad((decoder.pixels(variable) * target).sum(), variable)
    direction = gradient / gradient.norm()
    step = 1e-2
    ends = [(decode(decoder, point + sign * step * direction) * target).double().sum() for sign in (1, -1)]
    assert float(ends[0] - ends[1]) / (2 * step) == pytest.approx(float(gradient.norm()), rel=0.05)


def test_what_is_left_out_is_decided_by_the_shorter_side(standins):
    decoder = make_decoder("taesd", comfy.latent_formats.SD15(), None)
    sizes = {(8, 8): 0, (64, 64): 0, (127, 300): 0, (128, 128): 1, (255, 128): 1, (256, 256): 2, (2048, 2048): 2}
    assert {size: decoder.halvings(*size) for size in sizes} == sizes
    assert decoder.activation_bytes(128, 128) < decoder.activation_bytes(127, 128)
    assert make_decoder("taesd", comfy.latent_formats.Wan21(), None).halvings(256, 256) == 0


def test_a_small_picture_is_decoded_as_comfyui_does(standins):
    sd15 = comfy.latent_formats.SD15()
    stock = comfy.taesd.taesd.TAESD(None, folder_paths.get_full_path("vae_approx", "taesd_decoder.safetensors"), 4)
    point = latents(sd15)
    with torch.no_grad():
        assert torch.equal(decode(make_decoder("taesd", sd15, None), point), (stock.decode(point) + 1) / 2)


@pytest.mark.parametrize("times", [1, 2])
def test_halved_kernels_make_the_mean_of_what_the_whole_ones_make(times):
    kernel, row = torch.randn(2, 3, 3, 3, generator=torch.Generator().manual_seed(0)), torch.randn(1, 3, 6, 6)
    whole = F.avg_pool2d(F.conv2d(F.interpolate(row, scale_factor=2**times), kernel, padding=1), 2**times)
    torch.testing.assert_close(F.conv2d(row, halved(kernel, times), padding=1)[..., 1:-1, 1:-1], whole[..., 1:-1, 1:-1])


@pytest.mark.parametrize("halvings", [1, 2])
def test_gradients_through_a_coarser_decoder_are_those_of_finite_differences(standins, monkeypatch, halvings):
    monkeypatch.setattr(tiny_decoders, "SHORTEST", 32 >> halvings)
    decoder = make_decoder("taesd", comfy.latent_formats.SD15(), None)
    assert decode(decoder, latents(comfy.latent_formats.SD15())).shape == (2, 3, 32 >> halvings, 32 >> halvings)
    check_gradient(decoder, latents(comfy.latent_formats.SD15()))


@torch.no_grad()
def test_a_reward_that_sees_half_of_a_coarser_picture_leads_where_the_whole_picture_does(monkeypatch):
    """Pictures of 256 pixels, decoded to 128, of which a trained reward looks at 64."""
    folder, draw = models.shapesworld(), torch.Generator().manual_seed(0)
    encoder, tiny = (str(folder / "vae_approx" / f"taesd3_{part}.safetensors") for part in ("encoder", "decoder"))
    scenes = world.wishes(4, draw)
    pictures, prompts = (
        F.interpolate(world.render(scenes, draw), scale_factor=4, mode="bicubic"),
        list(map(world.caption, scenes)),
    )
    point = comfy.taesd.taesd.TAESD(encoder, None, 16).taesd_encoder(pictures)
    decoder, reward = (
        TAESD(comfy.latent_formats.SD3(), tiny),
        load_reward(folder / "reward_models" / "shapes_clip.safetensors").float(),
    )
    whole, coarse = [], []
    for shortest, into in ((256, whole), (128, coarse)):
        monkeypatch.setattr(tiny_decoders, "SHORTEST", shortest)
        with torch.enable_grad():
            variable = point.clone().requires_grad_()
            pixels = decoder.pixels(variable)
            seen = F.interpolate(pixels, (64, 64), mode="bicubic", antialias=True)
            into += [seen, *torch.autograd.grad(evaluate(reward, seen, prompts).sum(), variable)]
        assert pixels.shape[-1] == shortest
    assert (whole[0] - coarse[0]).square().mean() < 0.003 * whole[0].var()
    assert torch.cosine_similarity(whole[1].flatten(1), coarse[1].flatten(1)).min() > 0.95


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux"])
def test_a_tiny_autoencoder_in_bfloat16_leads_where_that_in_float32_does(standins, name):
    """GPUs decode in bfloat16. Its rounding by up to 2^-9 moves pixels by one percent of their spread after thirty layers.

    It also flips the ReLUs that are almost zero: two percent of the gradient of random weights is lost with them.
    """
    latent_format = FORMATS[name][0]()
    reward = load_reward(standins / "reward_models" / "HPS_v2.1_compressed.pt").float()
    point, pictures, slopes = latents(latent_format, size=8), [], []
    for dtype in (torch.float32, torch.bfloat16):
        decoder = make_decoder("taesd", latent_format, None)
        decoder.module.to(dtype)
        with gradients(reward, *decoder.modules), torch.enable_grad():
            variable = point.clone().requires_grad_()
            pictures.append(decoder.pixels(variable))
            slopes += torch.autograd.grad(evaluate(reward, pictures[-1], "a red circle").sum(), variable)
    assert pictures[0].dtype == pictures[1].dtype == slopes[1].dtype == torch.float32
    assert (pictures[0] - pictures[1]).abs().mean() < 0.02 * pictures[0].std()
    exact, rounded = (slope.flatten(1) for slope in slopes)
    assert torch.cosine_similarity(exact, rounded).min() > 0.97
    torch.testing.assert_close(rounded.norm(dim=1), exact.norm(dim=1), rtol=0.05, atol=0)


@pytest.mark.parametrize("name", FORMATS)
def test_the_vae_decodes_as_comfyui_does(standins, name):
    vae, latent_format = load_vae(standins, name), FORMATS[name][0]()
    point = latents(latent_format)
    mine = decode(make_decoder("vae", latent_format, vae), point)
    with torch.inference_mode():
        shaped = point.unsqueeze(2) if latent_format.latent_dimensions == 3 else point
        stock = vae.decode(latent_format.process_out(shaped))
    stock = stock[:, -1] if stock.ndim == 5 else stock
    assert (mine.clamp(0, 1) - stock.movedim(-1, 1)).abs().max() < 2e-2


def test_checkpointing_stores_less_and_changes_nothing(standins):
    vae, latent_format = load_vae(standins, "sd15"), comfy.latent_formats.SD15()
    with torch.inference_mode(False):
        decoder = FullVAE(latent_format, vae)
    plain = vae.first_stage_model
    stored = []

    def run(decode):
        stored.append(0)

        def pack(tensor):
            stored[-1] += tensor.numel()
            return tensor

        with (
            gradients(plain, *decoder.modules),
            torch.enable_grad(),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        ):
            variable = latents(latent_format).requires_grad_()
            total = decode(variable).sum()
        return torch.autograd.grad(total, variable)[0]

    kept = run(lambda point: plain.decode(latent_format.process_out(point).to(vae.vae_dtype)).float() / 2)
    recomputed = run(decoder.pixels)
    assert torch.allclose(kept, recomputed, rtol=1e-2, atol=1e-3 * float(kept.abs().max()))
    assert stored[1] < stored[0] / 2


def test_auto_prefers_the_tiny_autoencoder_then_the_vae_then_the_linear_preview(standins):
    sd15 = comfy.latent_formats.SD15()
    assert make_decoder("auto", sd15, None).name == "taesd"
    folder_paths.folder_names_and_paths["vae_approx"][0][:] = []
    folder_paths.filename_list_cache.clear()
    try:
        assert make_decoder("auto", sd15, load_vae(standins, "sd15")).name == "vae"
        assert make_decoder("auto", sd15, None).name == "latent_rgb"
        with pytest.raises(GuidanceError, match="taesd_decoder.safetensors into models/vae_approx"):
            make_decoder("taesd", sd15, None)
    finally:
        folder_paths.folder_names_and_paths["vae_approx"][0][:] = [str(standins / "vae_approx")]
        folder_paths.filename_list_cache.clear()


def test_a_vae_of_another_family_is_refused(standins):
    with pytest.raises(GuidanceError, match="16 latent channels, but this model has 4"):
        make_decoder("vae", comfy.latent_formats.SD15(), load_vae(standins, "sd3"))


class TaeLTXV(comfy.latent_formats.LTXV):
    """As newer releases of ComfyUI have it."""

    taesd_decoder_name = "taeltx_2"


PIXELS = ("ChromaRadiance", "ZImagePixelSpace", "HiDreamO1Pixel", "PixelDiTPixel")
BELONG = {
    **dict.fromkeys(("SD15",), ("kl4", "svd")),
    **dict.fromkeys(("SDXL", "SDXL_Playground_2_5"), ("kl4",)),
    **dict.fromkeys(("SD3", "Flux"), ("kl16",)),
    **dict.fromkeys(("LTXV", "LTXAV"), ("ltxv", "taehv 128")),
    **dict.fromkeys(("MiniMaxH3Video", "MiniMaxH3AV"), ("minimax",)),
    **dict.fromkeys(("CogVideoX", "CogVideoX1_5"), ("cogvideox",)),
    **dict.fromkeys(PIXELS, ("pixel space",)),
    "SD_X4": ("kl4 x4",),
    "SC_Prior": ("stage c",),
    "SC_B": ("stage a",),
    "Flux2": ("flux2", "mage"),
    "Mochi": ("mochi",),
    "HunyuanVideo": ("hunyuan video", "taehv 16"),
    "HunyuanVideo15": ("hunyuan video 1.5", "taehv 32"),
    "HunyuanImage21": ("hunyuan image",),
    "HunyuanImage21Refiner": ("hunyuan refiner",),
    "Cosmos1CV8x8x8": ("cosmos",),
    "Wan21": ("wan", "wan rgba", "taehv 16"),
    "Wan22": ("wan 2.2", "taehv 48"),
    "SeedVR2": ("seedvr2",),
}
"""Latent format -> the VAEs of the models that have it."""
NO_PICTURES = (
    "StableAudio1",
    "StableAudio3",
    "ACEAudio",
    "ACEAudio15",
    "Hunyuan3Dv2",
    "Hunyuan3Dv2_1",
    "Hunyuan3Dv2mini",
    "TripoSplat",
)
TINY = {
    "SD15": "taesd", "SDXL": "taesdxl", "SDXL_Playground_2_5": "taesdxl", "SD3": "taesd3", "Flux": "taef1", "Flux2": "taef2",
    "HunyuanVideo": "taehv", "HunyuanVideo15": "lighttaehy1_5", "Wan21": "lighttaew2_1", "Wan22": "lighttaew2_2",
}  # fmt: skip
"""Latent format -> what Load VAE calls its tiny autoencoder."""


def latent_format_of(name):
    return getattr(comfy.latent_formats, name)()


def all_formats():
    return {
        name: each
        for name, each in vars(comfy.latent_formats).items()
        if isinstance(each, type) and name != "LatentFormat"
    }


def test_every_latent_format_of_comfyui_is_tried():
    """Fails where ComfyUI has a new one: say here which VAE decodes it, or that it is neither of pictures nor of videos."""
    assert set(all_formats()) == {*BELONG, *NO_PICTURES}
    assert {name for name in all_formats() if latent_format_of(name).taesd_decoder_name} == set(TINY)
    families = {family.__name__: family.latent_format for family in comfy.supported_models.models}
    generators = {name: each for name, each in families.items() if each is not comfy.latent_formats.LatentFormat}
    assert {each.__name__ for each in generators.values()} <= set(all_formats())
    assert set(families) - set(generators) == {"RT_DETR_v4", "DepthAnything3", "SAM3", "SAM31"}


def some_latents(latent_format, count=2, frames=3, size=(2, 3)):
    """Videos (N,C,T,H,W) or pictures (N,C,H,W) in the model's space, each channel with a mean and a spread of its own."""
    draw, channels = torch.Generator().manual_seed(0), vae_decoder.latent_channels(latent_format)
    each = [count, channels, *[frames] * (latent_format.latent_dimensions == 3), *size]
    mean, spread = (torch.randn(channels, generator=draw).view(-1, *[1] * (len(each) - 2)) for _ in range(2))
    return 0.3 * mean + (0.7 + 0.3 * spread.tanh()) * torch.randn(each, generator=draw)


def frames_of(latents):
    """(N,C,H,W), as the reward sees a video."""
    return LatentReward(LoadedReward(ImageStatistic("brightness")), SimpleNamespace(modules=()), "").frames_of(latents)


@torch.inference_mode()
def vae_decode(vae, latent_format, latents):
    """What the nodes show of latents (N,C,H,W), each a picture or a video of one frame: (N,3,h,w), in [0,1]."""
    shown = latent_format.process_out(latents.unsqueeze(2) if latent_format.latent_dimensions == 3 else latents)
    pixels = []
    for some in shown.split(1) if shown.ndim == 5 else [shown]:
        torch.manual_seed(0)
        pixels.append(vae.decode(some))
    pixels = torch.cat(pixels)
    return (pixels[:, -1] if pixels.ndim == 5 else pixels)[..., :3].movedim(-1, 1).clamp(0, 1)


def check_decoder(decoder, latents):
    """Pixels of latents (N,C,H,W): of the size that memory is declared for, the same each time, and drawn without the global generator."""
    torch.manual_seed(1)
    drawn, given = torch.get_rng_state(), latents.clone()
    pixels, again = decode(decoder, latents), decode(decoder, latents)
    assert torch.equal(pixels, again) and torch.equal(torch.get_rng_state(), drawn) and torch.equal(latents, given)
    assert pixels.isfinite().all() and pixels.dtype == torch.float32
    height, width = (decoder.upscale * size >> decoder.halvings(*latents.shape[-2:]) for size in latents.shape[-2:])
    assert pixels.shape == (len(latents), 3, height, width) and pixels.device == latents.device
    assert decoder.activation_bytes(*latents.shape[-2:]) == decoder.bytes_per_pixel * height * width > 0
    return pixels


@pytest.mark.parametrize(("name", "vae"), [(name, vae) for name, vaes in BELONG.items() for vae in vaes])
def test_the_reward_sees_what_vae_decode_shows(name, vae):
    latent_format, vae = latent_format_of(name), small_vae(vae)
    latents = frames_of(some_latents(latent_format))
    shown = vae_decode(vae, latent_format, latents)
    pixels = check_decoder(make_decoder("vae", latent_format, vae), latents)
    torch.testing.assert_close(pixels.clamp(0, 1), shown, rtol=0, atol=1e-5)
    assert shown.std() > 0.03 and ((shown > 0) & (shown < 1)).float().mean() > 0.15


@torch.inference_mode()
def test_what_is_selected_by_is_the_same_each_time():
    """LTXV's VAE adds noise as it decodes, and takes one video at a time."""
    latent_format, vae = comfy.latent_formats.LTXV(), small_vae("ltxv")
    videos, drawn = latent_format.process_out(some_latents(latent_format)), torch.get_rng_state()
    clips = scoring.decode(vae, videos)
    assert torch.equal(clips, scoring.decode(vae, videos)) and torch.equal(torch.get_rng_state(), drawn)
    assert torch.equal(clips[1:], scoring.decode(vae, videos[1:]))
    torch.manual_seed(0)
    assert torch.equal(clips[:1], vae.decode(videos[:1]))


def test_sound_is_not_selected_by():
    its_own = SimpleNamespace(decode=lambda latents: torch.zeros(len(latents), 4096, 2))
    with pytest.raises(GuidanceError, match="the connected VAE makes neither"):
        scoring.decode(its_own, torch.zeros(2, 8, 16, 4))


@pytest.fixture(scope="module")
def tiny_files(tmp_path_factory):
    """The files of every tiny autoencoder, as they are published."""
    folder = tmp_path_factory.mktemp("vae_approx")
    for name, channels in {"taesd": 4, "taesdxl": 4, "taesd3": 16, "taef1": 16, "taef2": 128}.items():
        tiny = comfy.taesd.taesd.TAESD(None, None, channels)
        for part, module in (("encoder", tiny.taesd_encoder), ("decoder", tiny.taesd_decoder)):
            save_file(weights(module, channels), folder / f"{name}_{part}.safetensors")
    for name, channels in {
        "taehv": 16,
        "lighttaew2_1": 16,
        "lighttaew2_2": 48,
        "lighttaehy1_5": 32,
        "taeltx_2": 128,
    }.items():
        save_tiny(folder, name, channels, torch.float16 if name == "taehv" else torch.float32)
    with only_tiny(folder):
        yield folder


def save_tiny(folder, name, channels, dtype):
    numbers = weights(VAES[f"taehv {channels}"]())
    save_file({key: value.half().to(dtype) for key, value in numbers.items()}, folder / f"{name}.safetensors")


@contextmanager
def only_tiny(folder):
    """This folder alone where ComfyUI looks for tiny autoencoders."""
    paths, extensions = folder_paths.folder_names_and_paths["vae_approx"]
    folder_paths.folder_names_and_paths["vae_approx"] = ([str(folder)], extensions)
    folder_paths.filename_list_cache.clear()
    yield
    folder_paths.folder_names_and_paths["vae_approx"] = (paths, extensions)
    folder_paths.filename_list_cache.clear()


def load_tiny(name):
    with torch.inference_mode():
        return VAELoader().load_vae(name if name in VAELoader.image_taes else f"{name}.safetensors")[0]


@pytest.mark.parametrize(
    ("latent_format", "tiny"),
    [*((latent_format_of(name), tiny) for name, tiny in TINY.items()), (TaeLTXV(), "taeltx_2")],
)
def test_a_tiny_autoencoder_shows_what_it_shows_as_a_vae(tiny_files, latent_format, tiny):
    latents = frames_of(some_latents(latent_format))
    shown = vae_decode(load_tiny(tiny), latent_format, latents)
    pixels = check_decoder(make_decoder("taesd", latent_format, None), latents)
    torch.testing.assert_close(pixels.clamp(0, 1), shown, rtol=0, atol=1e-4)
    assert shown.std() > 0.03


@pytest.mark.parametrize(("name", "tiny"), [("Wan21", "lighttaew2_1"), ("HunyuanVideo", "taehv")])
def test_the_precision_of_a_file_does_not_say_whose_it_is(tmp_path, name, tiny):
    """ComfyUI scales every 16-channel file in float16 as HunyuanVideo's, and none in another precision."""
    latent_format, pixels = latent_format_of(name), []
    latents = frames_of(some_latents(latent_format))
    for dtype in (torch.float16, torch.float32, torch.bfloat16):
        save_tiny(tmp_path, tiny, 16, dtype)
        with only_tiny(tmp_path):
            pixels.append(decode(make_decoder("taesd", latent_format, None), latents))
    torch.testing.assert_close(pixels[1], pixels[0], rtol=0, atol=1e-5)
    assert (pixels[2] - pixels[0]).std() < 0.05 * pixels[0].std()


@pytest.mark.parametrize("name", [name for name in BELONG if latent_format_of(name).latent_rgb_factors is not None])
def test_the_linear_preview_is_finite_and_repeatable(name):
    latent_format = latent_format_of(name)
    check_decoder(make_decoder("latent_rgb", latent_format, None), frames_of(some_latents(latent_format)))


@pytest.mark.parametrize(
    ("name", "vae"), [("Flux2", "flux2"), ("LTXV", "ltxv"), ("Wan22", "wan 2.2"), ("Wan22", "taehv 48")]
)
def test_gradients_through_vaes_of_other_sizes_are_those_of_finite_differences(name, vae):
    latent_format = latent_format_of(name)
    check_gradient(make_decoder("vae", latent_format, small_vae(vae)), frames_of(some_latents(latent_format, frames=1)))


@pytest.mark.parametrize("name", ["SDXL_Playground_2_5", "Flux2", "HunyuanVideo", "HunyuanVideo15", "Wan22"])
def test_gradients_through_tiny_autoencoders_are_those_of_finite_differences(tiny_files, name):
    latent_format = latent_format_of(name)
    check_gradient(make_decoder("taesd", latent_format, None), frames_of(some_latents(latent_format, frames=1)))


def test_pixels_stay_on_the_device_of_the_latents(monkeypatch):
    """ComfyUI keeps pictures on another device than it decodes on."""
    monkeypatch.setattr(comfy.model_management, "intermediate_device", lambda: torch.device("meta"))
    latent_format = comfy.latent_formats.LTXV()
    assert (
        make_decoder("vae", latent_format, small_vae("ltxv")).pixels(frames_of(some_latents(latent_format))).device.type
        == "cpu"
    )


def test_a_picture_is_halved_by_its_own_size(tiny_files, monkeypatch):
    decoder = make_decoder("taesd", comfy.latent_formats.Flux2(), None)
    assert {size: decoder.halvings(size, 2 * size) for size in (32, 63, 64, 127, 128)} == {
        32: 0,
        63: 0,
        64: 1,
        127: 1,
        128: 2,
    }
    monkeypatch.setattr(tiny_decoders, "SHORTEST", 32)
    assert decode(decoder, torch.randn(1, 128, 4, 4)).shape == (1, 3, 32, 32)


class ShuffledDecoder(comfy.taesd.taesd.Decoder):
    """Makes colours and transparency; the last pixels lie in channels, as of the tiny autoencoder of Qwen-Image 2.1."""

    def __init__(self, latent_channels=4, use_gn=False):
        super().__init__(latent_channels, use_gn)
        self[-1] = nn.Conv2d(64, 16, 3, padding=1)
        self.append(nn.PixelShuffle(2))


class ClearDecoder(comfy.taesd.taesd.Decoder):
    """Makes colours and transparency."""

    def __init__(self, latent_channels=4, use_gn=False):
        super().__init__(latent_channels, use_gn)
        self[-1] = nn.Conv2d(64, 4, 3, padding=1)


@pytest.mark.parametrize(("architecture", "upscale", "halvings"), [(ShuffledDecoder, 16, 0), (ClearDecoder, 8, 1)])
def test_a_tiny_autoencoder_of_another_architecture(tmp_path, monkeypatch, architecture, upscale, halvings):
    monkeypatch.setattr(comfy.taesd.taesd, "Decoder", architecture)
    monkeypatch.setattr(tiny_decoders, "SHORTEST", 8)
    stock = architecture(16)
    numbers = weights(stock)
    stock.load_state_dict(numbers)
    save_file(numbers, tmp_path / "taef1_decoder.safetensors")
    with only_tiny(tmp_path):
        decoder = make_decoder("taesd", comfy.latent_formats.Flux(), None)
    latents = some_latents(comfy.latent_formats.Flux())
    assert (decoder.upscale, decoder.halvings(2, 3)) == (upscale, halvings)
    pixels, whole = decode(decoder, latents), stock(latents)[:, :3]
    assert pixels.shape == (2, 3, *(side >> halvings for side in whole.shape[-2:]))
    if not halvings:
        torch.testing.assert_close(pixels, whole)


@pytest.mark.parametrize("name", ["Flux", "Wan21"])
def test_memory_that_runs_out_is_not_called_a_damaged_file(tiny_files, monkeypatch, name):
    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr(comfy.utils, "load_torch_file", fail)
    with pytest.raises(GuidanceError, match=f"Memory ran out while loading {TINY[name]}"):
        make_decoder("taesd", latent_format_of(name), None)


class Trellis2(comfy.latent_formats.LatentFormat):
    """As a newer ComfyUI has it: shapes, in latents of the dimensions of pictures."""

    latent_channels = 32


@pytest.mark.parametrize("kind", [*NO_PICTURES, Trellis2])
def test_a_model_of_sound_or_shapes_is_refused_at_once(kind):
    latent_format = latent_format_of(kind) if isinstance(kind, str) else kind()
    name = type(latent_format).__name__
    its_own = SimpleNamespace(
        latent_channels=latent_format.latent_channels, latent_dim=1, throw_exception_if_invalid=lambda: None
    )
    for choice in decoders.DECODERS:
        for vae in (None, its_own):
            with pytest.raises(GuidanceError, match=f"this model makes neither .its latents are of the format {name}"):
                make_decoder(choice, latent_format, vae)
    with pytest.raises(GuidanceError, match="this model makes neither"):
        require_matching_vae(its_own, latent_format)


@pytest.mark.parametrize("choice", ["taesd", "vae"])
def test_a_decoder_that_is_broken_is_named(tiny_files, choice):
    latent_format = comfy.latent_formats.Flux()
    decoder, point = make_decoder(choice, latent_format, small_vae("kl16")), some_latents(latent_format)
    reward = LatentReward(LoadedReward(ImageStatistic("brightness")), decoder, "")
    with gradients(*decoder.modules), torch.no_grad():
        for parameter in decoder.module.parameters():
            parameter.fill_(torch.nan)
        with pytest.raises(GuidanceError, match=f"The decoder {choice} made pixels that are not finite numbers"):
            reward(point)
        with pytest.raises(GuidanceError, match=f"The decoder {choice} made pixels that are not finite numbers"):
            reward.for_prompts(point, ["", ""])
        with pytest.raises(GuidanceError, match="The model's estimate is not a finite number"):
            reward(point * torch.nan)
