"""Decoders against ComfyUI's own decoding, and their gradients against finite differences."""

import pytest
from reward_guidance.tests.harness import models
from reward_guidance.tests.harness.inprocess import load_comfyui

load_comfyui()

import comfy.latent_formats
import comfy.sd
import comfy.utils
import folder_paths
import torch
from reward_guidance.guidance.errors import GuidanceError
from reward_guidance.guidance.rewards import evaluate, load_reward
from reward_guidance.nodes.decoders import FullVAE, make_decoder
from reward_guidance.nodes.runtime import gradients

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
    decoder = make_decoder(choice, latent_format, load_vae(standins, name) if choice == "vae" else None)
    point = latents(latent_format)
    target = torch.rand(decode(decoder, point).shape, generator=torch.Generator().manual_seed(1))
    with gradients(*decoder.modules), torch.enable_grad():
        variable = point.clone().requires_grad_()
        (gradient,) = torch.autograd.grad((decoder.pixels(variable) * target).sum(), variable)
    direction = gradient / gradient.norm()
    step = 1e-2
    ends = [(decode(decoder, point + sign * step * direction) * target).double().sum() for sign in (1, -1)]
    assert float(ends[0] - ends[1]) / (2 * step) == pytest.approx(float(gradient.norm()), rel=0.05)


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux"])
def test_a_tiny_autoencoder_in_bfloat16_leads_where_that_in_float32_does(standins, name):
    """GPUs decode in bfloat16. Its rounding by up to 2^-9 moves pixels by one percent of their spread after thirty layers.

    It also flips the ReLUs that are almost zero: two percent of the gradient of random weights is lost with them.
    """
    latent_format = FORMATS[name][0]()
    reward = load_reward(standins / "reward_models" / "HPS_v2.1_compressed.pt").float()
    point, pictures, slopes = latents(latent_format, size=16), [], []
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
