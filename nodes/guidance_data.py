"""Nodes that collect or load labelled samples, on which guidance networks are trained."""

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
"""Node -> its collection, and the number of samples in it."""
_damaged: Counter[str] = Counter()
"""Node -> how often samples of its collection were missing or damaged when it was queued again.

It is part of the fingerprint, so that the samples are made again instead of being taken from ComfyUI's cache.
"""


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
            description="Samples pictures of a list of prompts, scores them, and saves both for training a guidance "
            "network. After an interrupt it continues; a higher count adds samples. Pictures that cannot be scored "
            "are left out.",
            search_aliases=["label samples", "training data", "dataset", "reward labels"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The model that the network will guide, without reward guidance. Any family, with or "
                    "without LoRA.",
                ),
                io.Clip.Input("clip", tooltip="The text encoder of the model."),
                io.Vae.Input("vae", tooltip="Decodes the samples for the reward."),
                REWARD.Input(
                    "reward",
                    tooltip="The reward to learn. The parts of Combine Rewards are saved separately, so that their "
                    "weights can be changed later.",
                ),
                io.Latent.Input(
                    "latent_image",
                    tooltip="An empty latent. Its size is the size of the samples, and its batch size is the number "
                    "of samples made at once. Its content is ignored.",
                ),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="",
                    tooltip="One prompt on each line; they are used in turn. Write prompts like those that the "
                    "network will be used with: 10 to 10,000.",
                ),
                io.String.Input(
                    "negative_prompt",
                    default="",
                    tooltip="What the pictures should not show. It has no effect at a cfg of 1.",
                    **rare,
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**64 - 1,
                    control_after_generate=False,
                    tooltip="The seed of the first sample; the others have the following seeds. A collection "
                    "continues only with the seed that it began with.",
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
                    tooltip=f"Total number of samples, {SHARD} in a file. With more samples the network follows the "
                    "reward more closely. 500 to 20,000. A sample takes 0.3 MB (SD1.5 at 512 pixels) to 4.7 MB (Flux "
                    "at 1024) on disk.",
                ),
                io.Combo.Input(
                    "target",
                    options=["data", "noise"],
                    optional=True,
                    tooltip="data: for models that take several steps. noise: for one-step generators such as "
                    "SD-Turbo; the network then tilts their initial noise. Set steps and cfg as you use them.",
                ),
                io.String.Input(
                    "folder",
                    default="guidance",
                    optional=True,
                    tooltip=f"The folder of the samples in output/{COLLECTIONS}. Use a new folder for each model and "
                    "for other sampler settings.",
                ),
                io.Int.Input(
                    "levels",
                    default=8,
                    min=1,
                    max=1000,
                    optional=True,
                    tooltip="data: number of noise levels at which the model's prediction is saved for each sample. "
                    "More levels give more training data from a sample; each costs a model call and disk space. 4 to "
                    "16.",
                    **rare,
                ),
                io.Boolean.Input(
                    "keep_images",
                    default=False,
                    optional=True,
                    tooltip="Also save every new picture as PNG in the subfolder images.",
                    **rare,
                ),
            ],
            outputs=[
                DATA.Output(display_name="data", tooltip="For Train Guidance Network."),
                io.String.Output(
                    display_name="report",
                    tooltip="Number of samples, their scores, and how many of them count in a training.",
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
            description=f"Loads samples from output/{COLLECTIONS} that were collected before, or on another machine.",
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
                    tooltip="Number of samples, their scores, and how many of them count in a training.",
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
        """Changes when samples were added or replaced, or when the weights of the rewards changed."""
        files = (
            path for path in sorted(collection_folder(folder).glob("*")) if path.suffix in (".safetensors", ".json")
        )
        return [(path.name, identity(path)) for path in files]


NODES = [CollectData, LoadData]
