"""The node that trains guidance networks."""

from collections import Counter
from typing import Any

from comfy_api.v0_0_2 import io, ui

from ..guidance.training.checkpoint import KEPT
from ..guidance.training.objectives import Plan
from ..guidance.training.recipe import (
    BATCH,
    DATA_FORMS,
    DATA_OBJECTIVES,
    WIDTHS,
    bytes_for,
    plan_for,
    prepare,
    weights_from,
)
from .guidance_data import CATEGORY
from .wiring.autograd import trainable
from .wiring.inputs import DATA, HIDDEN, NETWORK
from .wiring.loaded import manage_network
from .wiring.memory import free_memory_for
from .wiring.node import prepares_inputs
from .wiring.reporting import Reporter
from .wiring.sample_maker import GuidanceData
from .wiring.training_monitor import TrainingMonitor, first_samples_preview
from .wiring.training_setup import resolve_objective, training_functions

_interrupted: Counter[str] = Counter()
"""Node -> how often its training was interrupted.

It is part of the fingerprint, so that queueing the node again continues the training instead of returning the cached
network.
"""


@prepares_inputs
class TrainNetwork(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        plan, rare = Plan(), dict[str, Any](advanced=True, optional=True)
        return io.Schema(
            node_id="RewardGuidanceTrain",
            display_name="Train Guidance Network",
            category=CATEGORY,
            description="Trains a small network that guides a model toward samples with high rewards. The model does "
            "not change. Only the objective reward_gradient takes a gradient of the reward. An interrupt returns the "
            "best network so far; queueing again continues from the checkpoint.",
            search_aliases=["fit guidance network", "alignment training", "reward training", "finetune"],
            inputs=[
                DATA.Input(
                    "data",
                    tooltip="Samples and their scores, from Collect Guidance Data, which also provides the model, or "
                    "from disk.",
                ),
                io.Float.Input(
                    "temperature",
                    default=1.0,
                    min=0.001,
                    max=100.0,
                    step=0.05,
                    tooltip="β in exp(reward/β), in standard deviations of the reward among samples of one prompt. "
                    "Lower values prefer the best samples more, so that fewer samples count: the report says how "
                    "many. 0.3 to 2.",
                    optional=True,
                ),
                io.Int.Input(
                    "steps",
                    default=plan.steps,
                    min=1,
                    max=10_000_000,
                    tooltip="Training steps. More steps learn more from many samples and take longer. 1,000 to "
                    "20,000; the best network so far is kept.",
                    optional=True,
                ),
                io.Combo.Input(
                    "size",
                    options=list(WIDTHS),
                    default="medium",
                    tooltip="Size of the network: about 2, 6 or 10 million parameters. Larger networks learn more "
                    "from many samples and cost more per step.",
                    optional=True,
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**64 - 1,
                    control_after_generate=False,
                    tooltip="Seed of the initial weights and of the order of the samples. A training continues only "
                    "with the seed that it began with.",
                    optional=True,
                ),
                io.Combo.Input(
                    "objective",
                    options=list(DATA_OBJECTIVES),
                    tooltip="potential: learns the logarithm of the expected weight exp(reward/β), whose gradient "
                    "guides; best with few samples. weighted: regression on weighted samples; needs many. "
                    "reward_gradient: backward pass through the decoder and the reward, which must have a gradient. "
                    "auto: potential, or weighted for the form shift. For noise: reward_gradient, or weighted if "
                    "there is no gradient, or if the samples are from disk or took several steps.",
                    **rare,
                ),
                io.Combo.Input(
                    "form",
                    options=list(DATA_FORMS),
                    tooltip="correction: the network corrects the model's prediction. shift: it shifts the input of "
                    "the model, and the training needs the model and a backward pass through it: a batch of 1 to 8. "
                    "The objective potential and the target noise have their own forms: leave it at correction.",
                    **rare,
                ),
                io.Int.Input(
                    "batch",
                    default=BATCH,
                    min=1,
                    max=65536,
                    tooltip="Noised samples per step. More samples make steadier steps and take more memory. 16 to "
                    "256; lower it if memory runs out.",
                    **rare,
                ),
                io.Float.Input(
                    "learning_rate",
                    default=plan.learning_rate,
                    min=1e-7,
                    max=1.0,
                    step=1e-5,
                    round=1e-7,
                    tooltip="Highest learning rate of AdamW. Higher values learn faster. 0.0001 to 0.002; lower it if "
                    "the loss jumps up.",
                    **rare,
                ),
                io.String.Input(
                    "reward_weights",
                    default="",
                    tooltip="For a combination: a weight for each reward, such as 1, 0.5, in place of the weights "
                    "that the samples were collected with. No new samples are needed.",
                    **rare,
                ),
                io.Int.Input(
                    "preview_every",
                    default=0,
                    min=0,
                    max=1_000_000,
                    tooltip="Steps between two previews. A preview shows the first 4 samples, guided by the best "
                    "network so far; their rewards are drawn in the curve. 0 shows none. 200 to 1,000.",
                    **rare,
                ),
                io.Boolean.Input(
                    "checkpoint",
                    default=True,
                    tooltip="Save a checkpoint beside the samples until the training is done. After an interrupt or a "
                    f"crash, the same settings continue from it. The last {KEPT} checkpoints are kept; without one, a "
                    "training starts again.",
                    **rare,
                ),
            ],
            outputs=[
                NETWORK.Output(
                    display_name="network",
                    tooltip="The network with the lowest loss on held-out samples.",
                ),
                io.String.Output(
                    display_name="report", tooltip="The data, the course and the result of the training, and warnings."
                ),
            ],
            hidden=HIDDEN,
        )

    @classmethod
    def execute(
        cls,
        data: GuidanceData,
        temperature: float,
        steps: int,
        size: str,
        seed: int,
        objective: str,
        form: str,
        batch: int,
        learning_rate: float,
        reward_weights: str,
        preview_every: int,
        checkpoint: bool,
    ) -> io.NodeOutput:
        description, folder = data.collection.description, data.collection.folder if checkpoint else None
        options = {"temperature": temperature, "steps": steps, "batch": batch}
        options |= {"learning_rate": learning_rate, "seed": seed}
        plan = plan_for(description, resolve_objective(data, objective), form, **options)
        weights = description.weights(weights_from(reward_weights))
        device = free_memory_for(bytes_for(description, plan, size))
        with trainable():
            functions = training_functions(data, plan, weights)
            fitting = prepare(data.collection.load(), plan, size, weights, device, folder, **functions)
            preview = first_samples_preview(data) if preview_every else None
            TrainingMonitor(fitting, Reporter(cls.hidden), preview, preview_every).run()
            network = manage_network(fitting.network(), fitting.card())
        fitting.drop_checkpoint()
        _interrupted[cls.hidden.unique_id] += not fitting.done
        report = fitting.report()
        return io.NodeOutput(network, report, ui=ui.PreviewText(report))

    @classmethod
    def fingerprint_inputs(cls, **_) -> int:
        return _interrupted[cls.hidden.unique_id]


NODES = [TrainNetwork]
