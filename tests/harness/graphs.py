"""Prompts in API format for every stand-in, and UI workflows turned into prompts."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .client import Prompt

Link = list
"""[node id, output index]"""


@dataclass(frozen=True)
class Family:
    """How one kind of model is loaded and sampled. File names are those of standins/formats.py."""

    loaders: dict[str, tuple[str, dict]]
    """Node id -> class and inputs."""
    model: Link
    clip: Link
    vae: Link
    latent: str = "EmptyLatentImage"
    latent_options: dict = field(default_factory=dict)
    cfg: float = 4.0
    taesd: str = "taesd"


def checkpoint(file: str, **options) -> Family:
    loaders = {"checkpoint": ("CheckpointLoaderSimple", {"ckpt_name": file})}
    return Family(loaders, ["checkpoint", 0], ["checkpoint", 1], ["checkpoint", 2], **options)


def parts(model: str, clip_type: str, vae: str, **options) -> Family:
    loaders = {
        "model": ("UNETLoader", {"unet_name": model, "weight_dtype": "default"}),
        "clip": ("CLIPLoader", {"clip_name": "tiny_clip_l.pt", "type": clip_type}),
        "vae": ("VAELoader", {"vae_name": vae}),
    }
    return Family(loaders, ["model", 0], ["clip", 0], ["vae", 0], **options)


FAMILIES = {
    "sd15": checkpoint("v1-5-pruned-emaonly.ckpt"),
    "sd2": checkpoint("v2-1_512-ema-pruned.ckpt"),
    "sdxl": checkpoint("tiny_sdxl.ckpt", taesd="taesdxl"),
    "sd3": checkpoint("tiny_sd3.ckpt", latent="EmptySD3LatentImage", taesd="taesd3"),
    "flux": parts(
        "flux1-dev.safetensors",
        "stable_diffusion",
        "ae.safetensors",
        latent="EmptySD3LatentImage",
        cfg=1.0,
        taesd="taef1",
    ),
    "wan": parts(
        "wan2.1_t2v_1.3B_fp16.safetensors",
        "sd3",
        "wan_2.1_vae.safetensors",
        latent="EmptyHunyuanLatentVideo",
        latent_options={"length": 5},
        taesd="lighttaew2_1.safetensors",
    ),
}
LORA = "FLUX-dev-lora-add_details.safetensors"
"""For Flux."""
LARGE_FLUX = parts(
    "tiny_flux_512.safetensors",
    "stable_diffusion",
    "ae.safetensors",
    latent="EmptySD3LatentImage",
    cfg=1.0,
    taesd="taef1",
)
"""Flux with 24 times the weights, for what must not grow with the model."""


class Graph:
    """A prompt under construction."""

    def __init__(self) -> None:
        self.prompt: Prompt = {}

    def add(self, node: str, kind: str, **inputs: Any) -> Link:
        """Add or replace a node; the link to its first output."""
        self.prompt[node] = {"class_type": kind, "inputs": inputs}
        return [node, 0]


def text_to_image(
    family: Family | str,
    text: str = "a large red circle on a blue ground",
    size: int = 64,
    batch: int = 1,
    vae: str | None = None,
    before_sampler: Callable[[Graph, Link], Link] = lambda graph, model: model,
    sampler: Callable[[Graph, dict], Link] = lambda graph, inputs: graph.add("sampler", "KSampler", **inputs),
    **settings: Any,
) -> Prompt:
    """Loaders to SaveImage, in the node ids of Family.loaders, positive, negative, latent, sampler, decode and save.

    vae: the file of another decoder than the family's. before_sampler(graph, model link) may put nodes between loader and sampler and
    returns the model to sample; sampler(graph, KSampler's inputs) may put another sampler in its place and returns its latent.
    settings: inputs of the sampler.
    """
    family = FAMILIES[family] if isinstance(family, str) else family
    graph = Graph()
    for node, (kind, inputs) in family.loaders.items():
        graph.add(node, kind, **inputs)
    inputs = {
        "seed": 1,
        "steps": 2,
        "cfg": family.cfg,
        "sampler_name": "euler",
        "scheduler": "simple",
        "denoise": 1.0,
        "model": before_sampler(graph, family.model),
        "positive": graph.add("positive", "CLIPTextEncode", clip=family.clip, text=text),
        "negative": graph.add("negative", "CLIPTextEncode", clip=family.clip, text=""),
        "latent_image": graph.add(
            "latent", family.latent, width=size, height=size, batch_size=batch, **family.latent_options
        ),
    }
    latent = sampler(graph, inputs | settings)
    decoder = graph.add("other_vae", "VAELoader", vae_name=vae) if vae else family.vae
    images = graph.add("decode", "VAEDecode", samples=latent, vae=decoder)
    graph.add("save", "SaveImage", images=images, filename_prefix="test")
    return graph.prompt


def probed(graph: Graph, model: Link) -> Link:
    """For `before_sampler`: count the model's calls."""
    return graph.add("probe", "ProbeModelCalls", model=model)


def nodes_of(prompt: Prompt, kind: str) -> list[str]:
    return [node for node, content in prompt.items() if content["class_type"] == kind]


def changed(prompt: Prompt, values: dict) -> Prompt:
    """The prompt with these values of every input of such a name, and of every node of such a class. A single step stays one."""

    def inputs(content: dict) -> dict:
        new = {name: value for name, value in values.items() if name in content["inputs"]}
        if content["inputs"].get("steps") == 1:
            new.pop("steps", None)
        return content["inputs"] | new | values.get(content["class_type"], {})

    return {node: content | {"inputs": inputs(content)} for node, content in prompt.items()}


SMALL = {
    "width": 64, "height": 64, "length": 5, "batch_size": 3, "steps": 4, "particles": 4,
    "count": 12, "levels": 2, "batch": 4, "size": "small", "preview_every": 2,
}  # fmt: skip
"""Values of widgets that make a shipped workflow quick."""

CHECKPOINTS = {"sd_xl_base_1.0.safetensors": "tiny_sdxl.ckpt", "sd_turbo.safetensors": "v2-1_512-ema-pruned.ckpt"}
"""A shipped workflow's checkpoint -> its stand-in, which shares storage and so cannot be a safetensors file."""
TEXT_ENCODER = "tiny_clip_l.pt"
"""T5, UMT5 and Qwen have no small form: CLIP-L reads the prompts for them."""
TEXT_TYPES = {"flux": "stable_diffusion", "lumina2": "stable_diffusion", "wan": "sd3"}
"""The type of such a text encoder -> that of CLIP-L with as many channels as the model's stand-in takes."""


def stood_in(prompt: Prompt) -> Prompt:
    """A shipped workflow's prompt on stand-ins for what has none under its own name."""

    def of(content: dict) -> dict:
        inputs = content["inputs"]
        if inputs.get("type") in TEXT_TYPES:
            return {
                "class_type": "CLIPLoader",
                "inputs": {"clip_name": TEXT_ENCODER, "type": TEXT_TYPES[inputs["type"]]},
            }
        if inputs.get("ckpt_name") in CHECKPOINTS:
            return content | {"inputs": inputs | {"ckpt_name": CHECKPOINTS[inputs["ckpt_name"]]}}
        return content

    return {node: of(content) for node, content in prompt.items()}


MUTED, BYPASSED = 2, 4
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COLOR", "COMFY_DYNAMICCOMBO_V3"}
UPLOADS = ("image_upload", "video_upload", "animated_image_upload", "audio_upload")
COMMENTS = {"Note", "MarkdownNote"}
WIRING = {"Reroute", "PrimitiveNode"}


def ui_to_api(workflow: dict, object_info: dict[str, dict]) -> Prompt:
    """A workflow as the page saves it (version 0.4, without subgraphs) -> the prompt that the page would queue."""
    nodes = {node["id"]: node for node in workflow["nodes"]}
    links = {link[0]: (link[1], link[2]) for link in workflow["links"]}
    prompt = {}
    for node in nodes.values():
        if node["type"] in COMMENTS | WIRING or node.get("mode", 0) in (MUTED, BYPASSED):
            continue
        if node["type"] not in object_info:
            raise KeyError(f"The workflow has a node {node['type']}, which this ComfyUI does not know.")
        values = widget_values(node, object_info[node["type"]])
        for socket in node.get("inputs", []):
            source = resolve(socket.get("link"), nodes, links)
            if source is not None:
                values[socket["name"]] = source
        prompt[str(node["id"])] = {
            "class_type": node["type"],
            "inputs": values,
            "_meta": {"title": node.get("title") or node["type"]},
        }
    return prompt


def widget_values(node: dict, info: dict) -> dict[str, Any]:
    """A node's own values by name; widgets that only the page has take a place in the list and are skipped."""
    values = iter(node.get("widgets_values") or [])
    named = {}
    for group in ("required", "optional"):
        for name in info["input_order"].get(group, []):
            kind, options = specification(info["input"][group][name])
            if kind not in WIDGETS or options.get("forceInput"):
                continue
            default = options.get("default")
            named[name] = next(values, default)
            if takes_another_place(kind, name, options):
                next(values, None)
    return {name: value for name, value in named.items() if value is not None}


def specification(spec: list) -> tuple[str, dict]:
    kind = "COMBO" if isinstance(spec[0], list) else spec[0]
    return kind, spec[1] if len(spec) > 1 and isinstance(spec[1], dict) else {}


def takes_another_place(kind: str, name: str, options: dict) -> bool:
    """What happens to a seed after a run; the button of an upload."""
    counts = options.get("control_after_generate", kind == "INT" and name in ("seed", "noise_seed"))
    return bool(counts) or any(options.get(upload) for upload in UPLOADS)


def resolve(link: int | None, nodes: dict[int, dict], links: dict[int, tuple[int, int]]) -> Any:
    """A link followed through reroutes and bypassed nodes to its source: a prompt's link, a primitive's value, or None."""
    if link is None or link not in links:
        return None
    origin, slot = links[link]
    node = nodes[origin]
    if node["type"] == "PrimitiveNode":
        return node["widgets_values"][0]
    if node["type"] == "Reroute":
        return resolve(node["inputs"][0].get("link"), nodes, links)
    if node.get("mode", 0) == MUTED:
        return None
    if node.get("mode", 0) == BYPASSED:
        kind = node["outputs"][slot]["type"]
        through = next((socket.get("link") for socket in node.get("inputs", []) if socket["type"] == kind), None)
        return resolve(through, nodes, links)
    return [str(origin), slot]
