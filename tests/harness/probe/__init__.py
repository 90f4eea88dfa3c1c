"""A pack for tests: counts the calls of a diffusion model from outside the pack under test."""

from comfy.patcher_extension import WrappersMP
from comfy_api.latest import ComfyExtension, io
from server import PromptServer


def announce(executor, *args, **kwargs):
    server = PromptServer.instance
    server.send_sync("probe.model_call", {"batch": len(args[0])}, server.client_id)
    return executor(*args, **kwargs)


class ProbeModelCalls(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ProbeModelCalls",
            category="probe",
            description="Sends the event probe.model_call for every call of the model.",
            inputs=[io.Model.Input("model")],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model) -> io.NodeOutput:
        probed = model.clone()
        probed.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "probe", announce)
        return io.NodeOutput(probed)


class Probe(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [ProbeModelCalls]


async def comfy_entrypoint() -> Probe:
    return Probe()
