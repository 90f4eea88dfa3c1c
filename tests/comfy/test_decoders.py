"""Decoders against ComfyUI's own decoding, and their gradients against finite differences."""

import pytest
from reward_guidance.tests.harness import models
from reward_guidance.tests.harness.inprocess import load_comfyui

load_comfyui()

import comfy.latent_formats
import comfy.sd
import comfy.taesd.taesd
import comfy.utils
import folder_paths
import torch
from reward_guidance.guidance.errors import GuidanceError
from reward_guidance.guidance.rewards import evaluate, load_reward
from reward_guidance.nodes import decoders
from reward_guidance.nodes.decoders import TAESD, FullVAE, halved, make_decoder
from reward_guidance.nodes.runtime import gradients
from reward_guidance.tests.standins.shapesworld import world
from torch.nn import functional as F

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
    check_gradient(make_decoder(choice, latent_format, load_vae(standins, name) if choice == "vae" else None), latents(latent_format))


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
    monkeypatch.setattr(decoders, "SHORTEST", 32 >> halvings)
    decoder = make_decoder("taesd", comfy.latent_formats.SD15(), None)
    assert decode(decoder, latents(comfy.latent_formats.SD15())).shape == (2, 3, 32 >> halvings, 32 >> halvings)
    check_gradient(decoder, latents(comfy.latent_formats.SD15()))


@torch.no_grad()
def test_a_reward_that_sees_half_of_a_coarser_picture_leads_where_the_whole_picture_does(monkeypatch):
    """Pictures of 256 pixels, decoded to 128, of which a trained reward looks at 64."""
    folder, draw = models.shapesworld(), torch.Generator().manual_seed(0)
    encoder, tiny = (str(folder / "vae_approx" / f"taesd3_{part}.safetensors") for part in ("encoder", "decoder"))
    scenes = world.wishes(4, draw)
    pictures, prompts = F.interpolate(world.render(scenes, draw), scale_factor=4, mode="bicubic"), list(map(world.caption, scenes))
    point = comfy.taesd.taesd.TAESD(encoder, None, 16).taesd_encoder(pictures)
    decoder, reward = TAESD(comfy.latent_formats.SD3(), tiny), load_reward(folder / "reward_models" / "shapes_clip.safetensors").float()
    whole, coarse = [], []
    for shortest, into in ((256, whole), (128, coarse)):
        monkeypatch.setattr(decoders, "SHORTEST", shortest)
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

        with gradients(plain, *decoder.modules), torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
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
