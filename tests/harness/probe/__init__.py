"""A pack for tests: counts the calls of a diffusion model and breaks rewards, from outside the pack under test."""

import copy
import dataclasses
import time

import torch
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import ComfyExtension, io
from server import PromptServer


def announce(pause: float):
    def wrapper(executor, *args, **kwargs):
        server = PromptServer.instance
        server.send_sync("probe.model_call", {"batch": len(args[0])}, server.client_id)
        time.sleep(pause)
        return executor(*args, **kwargs)

    return wrapper


class ProbeModelCalls(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ProbeModelCalls",
            category="probe",
            description="Sends the event probe.model_call for every call of the model, and waits before it.",
            inputs=[io.Model.Input("model"), io.Float.Input("pause", default=0.0, optional=True)],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model, pause: float = 0.0) -> io.NodeOutput:
        probed = model.clone()
        probed.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "probe", announce(pause))
        return io.NodeOutput(probed)


BREAKAGES = {
    "nan": lambda scores: scores * torch.nan,
    "nan now and then": lambda scores: torch.where((scores * 1000).floor() % 2 == 0, torch.nan, scores),
    "one number for all": lambda scores: scores.mean(),
    "a number for each pixel": lambda scores: scores[:, None].expand(-1, 3),
    "a list": lambda scores: scores.tolist(),
    "no gradient": lambda scores: scores.detach(),
    "not differentiable": lambda scores: scores,
    "flat": lambda scores: scores * 0,
    "steep": lambda scores: (scores - scores.detach()).sqrt(),
}


class ProbeBrokenReward(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ProbeBrokenReward",
            category="probe",
            description="A reward that goes wrong.",
            inputs=[io.Custom("REWARD").Input("reward"), io.Combo.Input("breakage", options=list(BREAKAGES))],
            outputs=[io.Custom("REWARD").Output()],
        )

    @classmethod
    def execute(cls, reward, breakage: str) -> io.NodeOutput:
        broken, whole = copy.copy(reward.reward), reward.reward
        broken.differentiable = breakage != "not differentiable"
        broken.forward = lambda pixels, prompts: BREAKAGES[breakage](whole(pixels, prompts))
        return io.NodeOutput(dataclasses.replace(reward, reward=broken))


class ProbeNumbers(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ProbeNumbers",
            category="probe",
            description="A list of any numbers.",
            inputs=[io.String.Input("numbers", default="1, 2, nan")],
            outputs=[io.Float.Output(is_output_list=True)],
        )

    @classmethod
    def execute(cls, numbers: str) -> io.NodeOutput:
        return io.NodeOutput([None if number.strip() == "none" else float(number) for number in numbers.split(",")])


class ProbeEmptyBatch(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ProbeEmptyBatch",
            category="probe",
            description="No picture and no latent, in a batch; and a list of no pictures.",
            inputs=[],
            outputs=[io.Image.Output(), io.Latent.Output(), io.Image.Output(is_output_list=True)],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(torch.empty(0, 64, 64, 3), {"samples": torch.empty(0, 16, 8, 8)}, [])


class ProbeNoiseMask(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ProbeNoiseMask",
            category="probe",
            description="Gives a latent that is not empty a soft noise mask of any shape.",
            inputs=[io.Latent.Input("latent"), io.String.Input("shape"), io.Int.Input("seed", default=0)],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def execute(cls, latent, shape: str, seed: int) -> io.NodeOutput:
        draw = torch.Generator().manual_seed(seed)
        samples = torch.randn(latent["samples"].shape, generator=draw)
        return io.NodeOutput(
            {**latent, "samples": samples, "noise_mask": torch.rand([int(n) for n in shape.split(",")], generator=draw)}
        )


class ProbeList(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ProbeList",
            category="probe",
            description="A list of two pictures that need not be alike.",
            inputs=[io.Image.Input("first"), io.Image.Input("second")],
            outputs=[io.Image.Output(is_output_list=True)],
        )

    @classmethod
    def execute(cls, first, second) -> io.NodeOutput:
        return io.NodeOutput([first, second])


class ProbeName(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ProbeName",
            category="probe",
            description="A name that can be connected wherever one is chosen.",
            inputs=[io.String.Input("name")],
            outputs=[io.AnyType.Output()],
        )

    @classmethod
    def execute(cls, name: str) -> io.NodeOutput:
        return io.NodeOutput(name)


class Probe(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [ProbeModelCalls, ProbeBrokenReward, ProbeNumbers, ProbeEmptyBatch, ProbeNoiseMask, ProbeList, ProbeName]


async def comfy_entrypoint() -> Probe:
    return Probe()
