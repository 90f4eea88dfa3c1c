"""Nodes that load and save guidance networks, and sample with them."""

import folder_paths
import torch
from comfy_api.v0_0_2 import io, ui

from ..guidance.network.file import load_network
from .wiring.folders import NETWORKS, network_path, save_numbered
from .wiring.inputs import NETWORK, TILTS, interval_inputs, noise_steps_input, sampler_inputs, strength_input
from .wiring.latents import sampled_latent, samples_of
from .wiring.loaded import LoadedNetwork, manage_network
from .wiring.node import prepares_inputs
from .wiring.patch_network import GuidedNoise, NetworkGuidance, guided_sampling
from .wiring.sampling import Sampling
from .wiring.watching import ReadFiles

CATEGORY = "reward guidance/network"
_read = ReadFiles()


@prepares_inputs
class LoadNetwork(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RewardGuidanceLoadNetwork",
            display_name="Load Guidance Network",
            category=CATEGORY,
            description="Loads a guidance network from models/guidance_networks. The file states the model family "
            "that it was trained for; other models are refused.",
            search_aliases=["reward network", "guidance model", "alignment network"],
            inputs=[
                io.Combo.Input(
                    "network_name",
                    options=folder_paths.get_filename_list(NETWORKS),
                    tooltip="A file that Save Guidance Network or the command line wrote into "
                    "models/guidance_networks.",
                )
            ],
            outputs=[
                NETWORK.Output(
                    display_name="network",
                    tooltip="For Apply Guidance Network, KSampler (Guidance Network) and Guided Noise.",
                ),
                io.String.Output(
                    display_name="report", tooltip="The model, rewards and samples that the network was trained with."
                ),
            ],
        )

    @classmethod
    @torch.inference_mode(False)
    def execute(cls, network_name: str) -> io.NodeOutput:
        path = network_path(network_name)
        network, card = load_network(path)
        _read.remember([path])
        return io.NodeOutput(manage_network(network, card), card.describe(), ui=ui.PreviewText(card.describe()))

    @classmethod
    def fingerprint_inputs(cls, **choices) -> int:
        return _read.fingerprint()


@prepares_inputs
class SaveNetwork(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RewardGuidanceSaveNetwork",
            display_name="Save Guidance Network",
            category=CATEGORY,
            description="Saves a guidance network in models/guidance_networks, with a new number each time.",
            search_aliases=["export guidance network"],
            inputs=[
                NETWORK.Input("network", tooltip="The network to save."),
                io.String.Input(
                    "filename_prefix",
                    default="guidance",
                    optional=True,
                    tooltip="The file name before its number. It may contain subfolders: styles/blue becomes "
                    "styles/blue_00001_.",
                ),
            ],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, network: LoadedNetwork, filename_prefix: str) -> io.NodeOutput:
        path = save_numbered(filename_prefix, network)
        return io.NodeOutput(ui=ui.PreviewText(f"{path}\n{network.card.describe()}"))


@prepares_inputs
class ApplyNetwork(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RewardGuidanceApplyNetwork",
            display_name="Apply Guidance Network",
            category=CATEGORY,
            description="Guides a model by a network that has learned a reward. Works with any sampler and guider, "
            "without additional model calls.",
            search_aliases=["guidance network", "reward network", "alignment"],
            inputs=[
                io.Model.Input("model", tooltip="The model, of the family that the network was trained for."),
                NETWORK.Input("network", tooltip="A network that tilts data."),
                strength_input(),
                *interval_inputs("guidance", "0.7 to 1"),
            ],
            outputs=[io.Model.Output(tooltip="The model, guided by the network.")],
        )

    @classmethod
    def execute(
        cls, model, network: LoadedNetwork, strength: float, start_percent: float, end_percent: float
    ) -> io.NodeOutput:
        return io.NodeOutput(NetworkGuidance(network, strength, start_percent, end_percent).attach(model))


@prepares_inputs
class Noise(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RewardGuidanceNoise",
            display_name="Guided Noise",
            category=CATEGORY,
            description="Noise from which a one-step generator makes pictures with a higher reward; for "
            "SamplerCustomAdvanced.",
            search_aliases=["one step", "noise tilt", "RandomNoise", "SD-Turbo", "initial noise"],
            inputs=[
                NETWORK.Input(
                    "network", tooltip="A network that tilts noise: its samples were collected with the target noise."
                ),
                io.Conditioning.Input(
                    "conditioning", tooltip="What the pictures should show: the same conditioning as in the guider."
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**64 - 1,
                    control_after_generate=True,
                    tooltip="The seed of the noise before the network tilts it.",
                ),
                noise_steps_input("steps"),
                strength_input(TILTS),
            ],
            outputs=[io.Noise.Output(tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(
        cls, network: LoadedNetwork, conditioning: list, seed: int, steps: int, strength: float
    ) -> io.NodeOutput:
        network.require("noise", "Apply Guidance Network")
        return io.NodeOutput(GuidedNoise(network, conditioning, seed, steps, strength))


@prepares_inputs
class NetworkKSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RewardGuidanceKSamplerNetwork",
            display_name="KSampler (Guidance Network)",
            category=CATEGORY,
            description="A KSampler that is guided by a network: in its steps for multi-step models, in its initial "
            "noise for one-step generators.",
            search_aliases=["guidance network sampler", "one step sampler", "SD-Turbo", "aligned sampling"],
            inputs=[
                io.Model.Input("model", tooltip="The model, of the family that the network was trained for."),
                NETWORK.Input("network", tooltip="The guidance network."),
                *sampler_inputs(),
                strength_input(),
                *interval_inputs("guidance of a multi-step model", "0.7 to 1"),
                noise_steps_input(advanced=True),
            ],
            outputs=[io.Latent.Output(tooltip="The denoised latent.")],
        )

    @classmethod
    def execute(
        cls,
        model,
        network: LoadedNetwork,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        positive,
        negative,
        latent_image: dict,
        denoise: float,
        strength: float,
        start_percent: float,
        end_percent: float,
        noise_steps: int,
    ) -> io.NodeOutput:
        plain = Sampling(model, steps, cfg, sampler_name, scheduler, positive, negative, denoise)
        sampling = guided_sampling(plain, network, strength, start_percent, end_percent, noise_steps)
        samples = sampling(latent_image, [seed], sampling.progress(1)(0))
        return io.NodeOutput(sampled_latent(latent_image, list(range(len(samples_of(latent_image)))), samples))


NODES = [LoadNetwork, SaveNetwork, ApplyNetwork, Noise, NetworkKSampler]
