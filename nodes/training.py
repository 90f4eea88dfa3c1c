"""The node that trains a guidance network."""

import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean
from typing import Any

import comfy.model_management
import comfy.samplers
import comfy.utils
import torch
from comfy.model_management import InterruptProcessingException as Interrupt
from comfy_api.v0_0_2 import io, ui
from PIL import Image
from server import PromptServer
from torch import Tensor

from ..guidance.errors import GuidanceError
from ..guidance.fitting import BATCH, DATA_FORMS, DATA_OBJECTIVES, WIDTHS, Fitting, bytes_for, plan_for, prepare, weights_from
from ..guidance.rewards import CombinedReward, RewardError
from ..guidance.training import KEPT, Batch, Plan, Progress, in_parts
from . import runtime
from .collecting import CATEGORY, DATA, GuidanceData
from .decoders import make_decoder
from .guidance import HIDDEN
from .network import NETWORK, followed
from .node import prepares_inputs
from .reporting import Reporter
from .runtime import LatentReward, as_nodes_run, manage_network, room_for, static_clone, trainable, training_through
from .selection import decode
from .studio import Studio, parts_of, picture

log = logging.getLogger(__name__)

PREVIEWED = 4
"""Samples in a preview."""
_stopped: Counter[str] = Counter()
"""Node -> how often it was interrupted and returned what it had. Queued again, it runs again instead of being taken from ComfyUI's cache."""


def objective_of(data: GuidanceData, objective: str) -> str:
    """auto, made out where what is at hand decides it: noise that is to leap needs the generator, and a reward that has a gradient."""
    noise, studio = data.collection.description.base.target == "noise", data.studio
    leaps = noise and studio is not None and studio.steps == 1 and studio.reward.reward.differentiable
    return "reward_gradient" if objective == "auto" and leaps else objective


def assistants(data: GuidanceData, plan: Plan, weights: Sequence[float]) -> dict[str, Callable]:
    """What a training asks beside the samples: the model at other points, or the gradient of the rewards by these weights; and what its steps
    happen in."""
    description, model, reward, instead = data.collection.description, None, None, ""
    asked: dict[str, Callable] = {}
    if plan.form == "shift":
        instead = "the form correction"
        studio = with_static_model(data.ask("The form shift"), "The form shift", instead)
        model = studio.model
        asked["denoise"] = lambda x, sigma, prompts: studio.denoise(x, sigma, prompts.tolist())
    if plan.objective == "reward_gradient":
        studio = data.ask("The objective reward_gradient")
        make: Callable[[Tensor, list[int]], Tensor] = lambda latents, _: latents  # noqa: E731
        if description.base.target == "noise":
            instead = "the objective weighted"
            studio = with_static_model(studio, "The objective reward_gradient", instead)
            model, make = studio.model, generator_of(studio)
        decoder = make_decoder("auto", studio.model.get_model_object("latent_format"), studio.vae)
        weighted = replace(studio.reward, reward=CombinedReward([part for part, _ in parts_of(studio.reward.reward)], weights))
        reward = LatentReward(weighted, decoder, description.prompts[0])

        def score(latents: Tensor, batch: Batch) -> Tensor:
            assert batch.prompts is not None
            prompts = batch.prompts.tolist()
            told = [description.prompts[prompt] for prompt in prompts]
            return in_parts(lambda some, part: reward.score(make(some, prompts[part]), told[part]), latents, studio.batch)

        asked["reward"] = score
    if asked:
        asked["around"] = partial(training_through, model, reward, instead)
    return asked


def with_static_model(studio: Studio, what: str, instead: str) -> Studio:
    return replace(studio, model=static_clone(studio.model, what, instead))


def generator_of(studio: Studio) -> Callable[[Tensor, list[int]], Tensor]:
    """What a one-step generator makes of noise (N,...) and prompts (N,), in the model's space; with a graph where a training goes through it."""
    if studio.steps != 1:
        raise GuidanceError(
            f"The objective reward_gradient goes through one call of the model, and these samples were made with {studio.steps} steps: collect "
            "with 1, or choose the objective weighted."
        )
    sampling = studio.model.get_model_object("model_sampling")
    sigma = comfy.samplers.calculate_sigmas(sampling, studio.scheduler, 1)[0]

    def make(noise: Tensor, prompts: list[int]) -> Tensor:
        x = sampling.noise_scaling(sigma.to(noise), noise, torch.zeros_like(noise), max_denoise=True)
        return studio.denoise(x, sigma.expand(len(noise)), prompts)

    return make


@dataclass(frozen=True, kw_only=True)
class Step(runtime.Progress):
    effective: float
    """The share of the samples that count."""


@dataclass(frozen=True)
class Preview:
    picture: Image.Image
    """Of all, side by side."""
    rewards: list[float]


@dataclass
class Watch:
    """Runs a training, tells the page how it goes, and ends it early where it is interrupted."""

    fitting: Fitting
    report: Reporter
    preview: Callable[[Fitting], Preview] | None
    preview_every: int

    def run(self) -> None:
        training, steps = self.fitting.training, self.fitting.training.task.plan.steps
        losses: list[float] = []
        bar = comfy.utils.ProgressBar(steps)
        comfy.model_management.throw_exception_if_processing_interrupted()
        try:
            for progress in training:
                # This takes the interrupt back, so that what comes after this node runs.
                comfy.model_management.throw_exception_if_processing_interrupted()
                losses.append(progress.loss)
                preview = self.look(progress.step)
                told = self.tell(progress, fmean(losses), preview)
                if told:
                    losses.clear()
                if told or preview:
                    bar.update_absolute(progress.step, steps, preview and ("JPEG", preview.picture, None))
        except Interrupt:
            with suppress(Interrupt):  # who is impatient gets what was the best at the last look
                training.pause()
            if not training.curve:
                raise

    def look(self, step: int) -> Preview | None:
        """At samples that the best network so far guides, where it is time for it."""
        return self.preview(self.fitting) if self.preview and self.fitting.training.curve and step % self.preview_every == 0 else None

    def tell(self, progress: Progress, loss: float, preview: Preview | None) -> bool:
        """Whether it was told: of a long training not every step is."""
        steps, effective = self.fitting.training.task.plan.steps, self.fitting.health.effective
        check = {} if progress.check is None else {"loss/held-out": [progress.check]}
        rewards = {} if preview is None else {"reward": preview.rewards}
        if not self.report(Step(step=progress.step, steps=steps, series={"loss": [loss]} | check | rewards, effective=effective)):
            return False
        best = self.fitting.best()
        held_out = "" if best is None else f" · held-out {self.fitting.training.curve[-1][1]:.4f}, at best {best[1]:.4f}"
        text = f"step {progress.step}/{steps} · loss {loss:.4f}{held_out} · {effective:.0%} of samples count"
        PromptServer.instance.send_progress_text(text, self.report.node)
        return True


def first_pictures(data: GuidanceData) -> Callable[[Fitting], Preview]:
    """The first samples of a collection, as the best network so far would guide them."""
    studio, description = data.ask("A preview"), data.collection.description
    prompts, seeds = zip(*[(description.prompt_of(number), description.seed_of(number)) for number in range(PREVIEWED)], strict=True)

    def draw(fitting: Fitting) -> Preview:
        network = manage_network(fitting.network(), fitting.card())
        with as_nodes_run():
            latents = studio.sample(prompts, seeds, lambda *_: None, lambda sampling: followed(sampling, network))
            clips = decode(studio.vae, latents)
            scores = torch.stack([judged(studio, clip, studio.prompts[prompt]) for clip, prompt in zip(clips, prompts, strict=True)])
        return Preview(picture(torch.cat(list(clips[:, 0]), 1)), description.combined(scores, fitting.reward_weights).tolist())

    return draw


def judged(studio: Studio, clip: Tensor, prompt: str) -> Tensor:
    """Raw scores (R,); not numbers where a reward refuses what a network has made so far, which is no reason to lose the training."""
    try:
        return studio.judge(clip, prompt)
    except RewardError as error:
        log.warning("%s The preview has no reward.", error)
        return torch.full((len(parts_of(studio.reward.reward)),), math.nan)


def leave_off(fitting: Fitting, node: str) -> None:
    """A training that is not done runs again when it is queued again: on from its checkpoint, where it has one."""
    fitting.drop_checkpoint()
    _stopped[node] += not fitting.done


@prepares_inputs
class TrainNetwork(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        plan, rare = Plan(), dict[str, Any](advanced=True, optional=True)
        return io.Schema(
            node_id="RewardGuidanceTrain",
            display_name="Train Guidance Network",
            category=CATEGORY,
            description="Trains a small network that guides a model to what a reward liked among its samples. The model stays as it is. Only the "
            "objective reward_gradient takes a gradient of the reward. Interrupt it, and it returns the best network so far; queue again, and it "
            "goes on from its checkpoint.",
            search_aliases=["fit guidance network", "alignment training", "reward training", "finetune"],
            inputs=[
                DATA.Input("data", tooltip="Samples and their scores: from Collect Guidance Data, which brings the model too, or from disk."),
                io.Float.Input(
                    "temperature",
                    default=1.0,
                    min=0.001,
                    max=100.0,
                    step=0.05,
                    tooltip="β in exp(reward/β), in standard deviations of the reward among samples of one prompt. Lower values insist on the best "
                    "samples, so that fewer of them count: the report says how many. 0.3 to 2.",
                    optional=True,
                ),
                io.Int.Input(
                    "steps",
                    default=plan.steps,
                    min=1,
                    max=10_000_000,
                    tooltip="Training steps: more learn more of many samples, and take longer. 1,000 to 20,000; the best network on the way is kept.",
                    optional=True,
                ),
                io.Combo.Input(
                    "size",
                    options=list(WIDTHS),
                    default="medium",
                    tooltip="Of the network: about 2, 6 or 10 million parameters. Larger ones learn more from many samples, and cost more per step.",
                    optional=True,
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**64 - 1,
                    control_after_generate=False,
                    tooltip="Of the first weights and of the order of the samples. A training goes on only with the seed that it began with.",
                    optional=True,
                ),
                io.Combo.Input(
                    "objective",
                    options=list(DATA_OBJECTIVES),
                    tooltip="potential: the logarithm of the expected weight exp(reward/β), whose gradient guides; learns most from few samples. "
                    "weighted: regression on weighted samples, of which it needs many. reward_gradient: through the reward itself, which must have "
                    "a gradient, and the decoder. auto: potential, and weighted for the form shift; for noise reward_gradient, or weighted where "
                    "there is no gradient, the samples are from disk or took several steps.",
                    **rare,
                ),
                io.Combo.Input(
                    "form",
                    options=list(DATA_FORMS),
                    tooltip="correction: the network corrects the model's estimate. shift: it moves the point where the model is asked, and needs "
                    "the model and a backward pass through it while it trains: a batch of 1 to 8. The objective potential and the target noise "
                    "have forms of their own: leave it at correction.",
                    **rare,
                ),
                io.Int.Input(
                    "batch",
                    default=BATCH,
                    min=1,
                    max=65536,
                    tooltip="Noised samples a step: more make steadier steps and take more memory. 16 to 256; lower it where memory runs out.",
                    **rare,
                ),
                io.Float.Input(
                    "learning_rate",
                    default=plan.learning_rate,
                    min=1e-7,
                    max=1.0,
                    step=1e-5,
                    round=1e-7,
                    tooltip="How far a step changes the network, at the highest (of AdamW): more learns faster. 0.0001 to 0.002; lower it where the "
                    "loss jumps up.",
                    **rare,
                ),
                io.String.Input(
                    "reward_weights",
                    default="",
                    tooltip="Of a combination: a weight for each reward, such as 1, 0.5, in place of those it was collected with. No new samples "
                    "are needed.",
                    **rare,
                ),
                io.Int.Input(
                    "preview_every",
                    default=0,
                    min=0,
                    max=1_000_000,
                    tooltip="Steps between two previews: the first 4 samples as the best network so far guides them, whose rewards join "
                    "the curve; 0 shows none. 200 to 1,000.",
                    **rare,
                ),
                io.Boolean.Input(
                    "checkpoint",
                    default=True,
                    tooltip="Keep what is needed to go on beside the samples until the training is done: after an interrupt or a crash, the same "
                    f"settings go on from there. The last {KEPT} interrupted trainings can go on; without it they begin anew.",
                    **rare,
                ),
            ],
            outputs=[
                NETWORK.Output(display_name="network", tooltip="The best network, by the loss on samples that it was not trained on."),
                io.String.Output(display_name="report", tooltip="What was trained on what, how it went, and what to be wary of."),
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
        options = {"temperature": temperature, "steps": steps, "batch": batch, "learning_rate": learning_rate, "seed": seed}
        description, folder = data.collection.description, data.collection.folder if checkpoint else None
        plan, weights = plan_for(description, objective_of(data, objective), form, **options), description.weights(weights_from(reward_weights))
        device = room_for(bytes_for(description, plan, size))
        with trainable():
            fitting = prepare(data.collection.load(), plan, size, weights, device, folder, **assistants(data, plan, weights))
            Watch(fitting, Reporter(cls.hidden), first_pictures(data) if preview_every else None, preview_every).run()
            network = manage_network(fitting.network(), fitting.card())
        leave_off(fitting, cls.hidden.unique_id)
        report = fitting.report()
        return io.NodeOutput(network, report, ui=ui.PreviewText(report))

    @classmethod
    def fingerprint_inputs(cls, **_) -> int:
        return _stopped[cls.hidden.unique_id]


NODES = [TrainNetwork]
