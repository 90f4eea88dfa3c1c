"""The nodes that make and find labelled samples: what a guidance network is trained on."""

from collections import Counter

from comfy_api.v0_0_2 import io, ui

from ..guidance.data.collection import SHARD, Collection
from ..guidance.training.report import overview
from .wiring.collector import collect, collection_remarks
from .wiring.folders import COLLECTIONS, collection_folder, collection_names
from .wiring.inputs import DATA, REWARD, sampler_inputs
from .wiring.latents import empty_latent, samples_of
from .wiring.loaded import LoadedReward
from .wiring.model_info import require_unguided
from .wiring.node import prepares_inputs
from .wiring.prompts import prompt_lines
from .wiring.sample_maker import GuidanceData, SampleMaker, describe, encoder
from .wiring.vae_decoder import require_matching_vae
from .wiring.watching import identity

CATEGORY = "reward guidance/training"
_collected: dict[str, tuple[Collection, int]] = {}
"""Node -> what it filled up, and to how many samples."""
_damaged: Counter[str] = Counter()
"""Node -> how often something was gone of that when it was queued again. It is collected anew instead of being taken from ComfyUI's cache."""


@prepares_inputs
class CollectData(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        _, steps, cfg, sampler_name, scheduler, *_ = sampler_inputs()
        rare = {"advanced": True}
        return io.Schema(
            node_id="RewardGuidanceCollect",
            display_name="Collect Guidance Data",
            category=CATEGORY,
            description="Samples pictures of a list of prompts, scores them, and keeps both for training a guidance network. It goes on where it "
            "was stopped, and raising the count adds samples to those that are there. A picture that cannot be scored is left out.",
            search_aliases=["label samples", "training data", "dataset", "reward labels"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The model to learn about, before any reward guidance. Any family, with or without LoRA.",
                ),
                io.Clip.Input("clip", tooltip="Its text encoder."),
                io.Vae.Input("vae", tooltip="Decodes the samples, to be scored."),
                REWARD.Input(
                    "reward",
                    tooltip="What to learn. Of Combine Rewards each part is kept, so that weights can be changed later.",
                ),
                io.Latent.Input(
                    "latent_image",
                    tooltip="An empty latent: its size is that of the samples, its batch size how many are made at once. Its content does not count.",
                ),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="",
                    tooltip="One prompt on each line; they take turns. What the network will be used for: 10 to 10,000 prompts.",
                ),
                io.String.Input(
                    "negative_prompt",
                    default="",
                    tooltip="What the pictures should not show; without effect at a cfg of 1.",
                    **rare,
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**64 - 1,
                    control_after_generate=False,
                    tooltip="The seed of the first sample; the others follow. A collection goes on only with the seed that it began with.",
                    **rare,
                ),
                steps,
                cfg,
                sampler_name,
                scheduler,
                io.Int.Input(
                    "count",
                    default=1024,
                    min=1,
                    max=10_000_000,
                    optional=True,
                    tooltip=f"Samples in all, kept {SHARD} to a file. 500 to 20,000: more follow the reward more closely. On disk each takes 0.3 MB "
                    "(SD1.5 at 512 pixels) to 4.7 MB (Flux at 1024).",
                ),
                io.Combo.Input(
                    "target",
                    options=["data", "noise"],
                    optional=True,
                    tooltip="data: for models that take several steps. noise: for one-step generators such as SD-Turbo, whose first noise is "
                    "what will be chosen; set steps and cfg as you use them.",
                ),
                io.String.Input(
                    "folder",
                    default="guidance",
                    optional=True,
                    tooltip=f"Where in output/{COLLECTIONS} the samples go: a folder of its own for each model and way of sampling.",
                ),
                io.Int.Input(
                    "levels",
                    default=8,
                    min=1,
                    max=1000,
                    optional=True,
                    tooltip="data: noise levels at which the model is asked about each sample. More teach more from a sample; each costs a "
                    "model call and disk space. 4 to 16.",
                    **rare,
                ),
                io.Boolean.Input(
                    "keep_images",
                    default=False,
                    optional=True,
                    tooltip="Also keep every new picture, as PNG in the subfolder images.",
                    **rare,
                ),
            ],
            outputs=[
                DATA.Output(display_name="data", tooltip="For Train Guidance Network."),
                io.String.Output(
                    display_name="report",
                    tooltip="How many samples there are, how they score, and what can be learned from them.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        model,
        clip,
        vae,
        reward: LoadedReward,
        latent_image: dict,
        prompts: str,
        negative_prompt: str,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        count: int,
        target: str,
        folder: str,
        levels: int,
        keep_images: bool,
    ) -> io.NodeOutput:
        require_unguided(model)
        require_matching_vae(vae, model.get_model_object("latent_format"))
        settings = steps, cfg, sampler_name, scheduler
        lines = prompt_lines(prompts)
        start = empty_latent(latent_image)
        batch = len(samples_of(latent_image))
        maker = SampleMaker(model, lines, encoder(clip), negative_prompt, *settings, start, batch, vae, reward)
        description = describe(maker, target, levels, seed)
        collection = Collection.create(collection_folder(folder), description, maker.text)
        collect(cls.hidden.unique_id, maker, collection, count, keep_images)
        _collected[cls.hidden.unique_id] = collection, count
        report = "\n".join([overview(collection), *collection_remarks(lines, reward)])
        return io.NodeOutput(GuidanceData(collection, maker), report, ui=ui.PreviewText(report))

    @classmethod
    def fingerprint_inputs(cls, **_) -> int:
        node = cls.hidden.unique_id
        if node in _collected:
            collection, count = _collected[node]
            _damaged[node] += not collection.complete(count)
        return _damaged[node]


@prepares_inputs
class LoadData(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RewardGuidanceLoadData",
            display_name="Load Guidance Data",
            category=CATEGORY,
            description=f"Finds samples that were collected before, or on another machine, in output/{COLLECTIONS}.",
            search_aliases=["training data", "dataset", "shards"],
            inputs=[
                io.Combo.Input(
                    "folder",
                    options=collection_names(),
                    tooltip=f"A folder in output/{COLLECTIONS} with samples.",
                )
            ],
            outputs=[
                DATA.Output(display_name="data", tooltip="For Train Guidance Network."),
                io.String.Output(
                    display_name="report",
                    tooltip="How many samples there are, how they score, and what can be learned from them.",
                ),
            ],
        )

    @classmethod
    def execute(cls, folder: str) -> io.NodeOutput:
        collection = Collection.open(collection_folder(folder))
        report = overview(collection)
        return io.NodeOutput(GuidanceData(collection), report, ui=ui.PreviewText(report))

    @classmethod
    def fingerprint_inputs(cls, folder: str) -> list:
        """Samples may have been added or exchanged, or the rewards weighted anew."""
        files = (
            path for path in sorted(collection_folder(folder).glob("*")) if path.suffix in (".safetensors", ".json")
        )
        return [(path.name, identity(path)) for path in files]


NODES = [CollectData, LoadData]
