"""From a collection of samples to a network and its card: what the node and the command line share."""

import hashlib
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import prior
from .errors import GuidanceError, quoted
from .files import Card
from .network import FORMS, Architecture, GuidanceNetwork
from .process import process_named
from .samples import Collection, Description, FreshPairs, Samples, StoredPairs
from .training import Batch, Health, Plan, Source, Task, Training, label

WIDTHS = {"small": 24, "medium": 48, "large": 64}
"""Of the sizes a network comes in: about 2, 6 and 10 million parameters."""
BATCH = 64
HELD_OUT = 0.1
"""Share of the samples that judge the network and do not train it."""
MOST_BATCHES = 64
"""Of held-out samples at one look."""
CURVE_END = 20
"""Values of the loss that go into a card."""
DATA_OBJECTIVES = ("auto", "potential", "weighted", "reward_gradient")
NO_GUIDANCE = {"weighted": 0.0, "potential": 1.0}
"""The least loss of a network that does not guide, by objective."""
DATA_FORMS = ("correction", "shift")
NOISE_FORMS = {"weighted": "noise", "reward_gradient": "leap"}
"""By objective."""


def plan_for(description: Description, objective: str = "auto", form: str = "correction", **options: Any) -> Plan:
    """A plan that fits what was collected: noise has a form of its own, and so has a potential. `options` are those of Plan.

    auto is potential, which makes the most of few samples, but for noise, and for the form shift, weighted: labels are all that is known here.
    A potential sees fresh noise in every batch, which keeps it from learning few samples by heart.

    A short training is looked at more often, and its average forgets the beginning sooner.
    """
    noise = description.base.target == "noise"
    if objective == "auto":
        objective = "weighted" if noise or form == "shift" else "potential"
    if noise and objective not in NOISE_FORMS:
        raise GuidanceError(f"The noise of one-step generators is tilted by the objectives {' and '.join(NOISE_FORMS)}, not by {objective}.")
    if noise or objective == "potential":
        what = "The noise of one-step generators" if noise else "The objective potential"
        if form != "correction":
            raise GuidanceError(f"{what} has a form of its own: leave the form at correction, not at {form}.")
        form = NOISE_FORMS[objective] if noise else "potential"
    steps = options.get("steps", Plan.steps)
    pace = {"check_every": min(Plan.check_every, max(10, steps // 20)), "ema": min(Plan.ema, 1 - 10 / max(20, steps))}
    return Plan(**{"objective": objective, "form": form, "batch": BATCH, "fresh": objective == "potential", **pace} | options)


def weights_from(text: str) -> tuple[float, ...]:
    """Numbers with commas between them, as a person writes them; an empty text is no weights."""
    try:
        return tuple(float(part) for part in text.split(",")) if text.strip() else ()
    except ValueError as error:
        raise GuidanceError(f"Weights are written as numbers with commas between them, such as 1, 0.5, not as {quoted(text)}.") from error


@dataclass(frozen=True)
class Fitting:
    """A training of labelled samples, and what to say of it."""

    description: Description
    reward_weights: tuple[float, ...]
    health: Health
    training: Training

    @property
    def done(self) -> bool:
        return self.training.diverged or self.training.step >= self.training.task.plan.steps

    def drop_checkpoint(self) -> None:
        """A training that is done needs it no more; one that is not goes on from it."""
        if self.done and self.training.checkpoint is not None:
            with suppress(OSError):  # what cannot be deleted could not be written either, and costs no more than its place
                self.training.checkpoint.unlink(missing_ok=True)

    def network(self) -> GuidanceNetwork:
        """The best so far, on the CPU."""
        return self.training.result().cpu()

    def card(self) -> Card:
        plan = self.training.task.plan
        return Card(
            base=self.description.base,
            form=plan.form,
            objective=plan.objective,
            temperature=plan.temperature,
            rewards=self.description.rewards,
            reward_weights=self.reward_weights,
            reward_mean=self.health.mean,
            reward_std=self.health.std,
            prompts=digest(self.description.prompts),
            samples=self.health.count,
            steps=self.training.step,
            effective=self.health.effective,
            curve=tuple(self.training.curve[-CURVE_END:]) if self.training.held_out else (),
            best=self.best(),
            shape=self.description.shape,
        )

    def best(self) -> tuple[int, float] | None:
        """Step and loss of the network that is kept, where samples were held out to tell."""
        curve = self.training.curve if self.training.held_out else []
        return min(curve, key=lambda point: point[1], default=None)

    def report(self) -> str:
        """What was trained on what, how it went, and what to be wary of, in lines."""
        return "\n".join([self.card().describe(), *self.outcome(), *self.warnings()])

    def outcome(self) -> list[str]:
        training, plan, best = self.training, self.training.task.plan, self.best()
        none = NO_GUIDANCE.get(plan.objective, math.inf)
        lines = []
        if best is not None and best[1] >= none:
            lines.append(f"That is no better than no guidance, whose loss is {none:g}: collect more samples, or raise the temperature.")
        stopped = f"at step {training.step} of {plan.steps}: this is the best network up to there"
        if training.diverged:
            lines.append(f"The training diverged {stopped}. Lower the learning rate, or raise the temperature.")
        elif not self.done:
            lines.append(f"stopped {stopped}" + (", and running it again goes on from there" if training.checkpoint and not training.unsaved else ""))
        return lines

    def warnings(self) -> list[str]:
        training = self.training
        labels = [] if training.task.plan.objective == "reward_gradient" else self.health.warnings()
        apart = [] if training.held_out else ["No sample was kept apart of so few, and so nothing says how good the network is: collect more."]
        unsaved = [f"There is no checkpoint to go on from: {training.unsaved}"] if training.unsaved and not self.done else []
        return [*labels, *apart, *unsaved]


def prepare(
    samples: Samples,
    plan: Plan,
    size: str = "medium",
    reward_weights: Sequence[float] = (),
    device: torch.device | None = None,
    checkpoints: Path | None = None,
    denoise: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    reward: Callable[[Tensor, Batch], Tensor] | None = None,
    around: Callable[[], AbstractContextManager] = nullcontext,
) -> Fitting:
    """A training that is ready to run. Raises GuidanceError where these samples cannot be learned from.

    checkpoints: the folder where a training leaves off and goes on; each finds its own. denoise: x, σ, prompts -> D with a graph, for the form
    `shift`. reward: denoised latents, batch -> rewards (B,) as CombinedReward has them by these weights; for `reward_gradient`. around: what
    these are asked in.
    """
    description, device = samples.description, device or torch.device("cpu")
    if plan.form == "shift" and denoise is None:
        raise GuidanceError("The form shift asks the model itself while it trains: train it in the graph that collects the samples.")
    weights, health = label(samples.rewards(reward_weights), samples.prompts, plan.temperature)
    reward_weights = description.weights(reward_weights)
    noise = description.base.target == "noise"
    process = prior.PROCESS if noise else process_named(description.base.process)

    def source(rows: Tensor) -> Source:
        if plan.form == "leap":
            return prior.FreshNoise(description.shape, samples.text, device)
        chosen = samples.rows(rows)
        if noise:
            return prior.NoisePairs(chosen.clean, weights[rows], chosen.text, chosen.prompts, device)
        return (FreshPairs if plan.fresh else StoredPairs)(chosen, weights[rows], process, device, denoise)

    in_spreads = reward and (lambda latents, batch: reward(latents, batch) / health.std)
    own, held_out = samples.split(HELD_OUT)
    name = digest((asdict(description), samples.numbers.tolist(), samples.scores.tolist(), asdict(plan), size, reward_weights))
    training = Training(
        source(own),
        Task(process, plan, in_spreads),
        architecture(samples, plan.form, size),
        source(held_out) if len(held_out) else None,
        checkpoints and checkpoints / f"training-{name}.checkpoint",
        device,
        samples.text.pooled,
        around,
        batches_of_a_look(len(held_out), plan.batch) if denoise is None and reward is None else Training.batches,
    )
    return Fitting(description, reward_weights, health, training)


def batches_of_a_look(held_out: int, batch: int) -> int:
    """So many that all held-out samples are seen about once, within bounds."""
    return max(Training.batches, min(MOST_BATCHES, held_out // batch))


def architecture(samples: Samples, form: str, size: str) -> Architecture:
    text, shape = samples.text[torch.tensor([0])], samples.description.shape
    sizes = {"tokens": text.tokens.shape[2], "pooled": text.pooled.shape[1], "width": WIDTHS[size]}
    return Architecture(shape[0], FORMS[form].inputs, scalar=form == "potential", **sizes).fitted(shape)


def bytes_for(description: Description, plan: Plan, size: str) -> int:
    """Rough memory of a training step: some 30 maps of a latent's resolution, and as much again for the lower ones."""
    return plan.batch * 64 * WIDTHS[size] * math.prod(description.shape[1:]) * 4


def digest(content: object) -> str:
    return hashlib.sha256(repr(content).encode()).hexdigest()[:12]


def overview(collection: Collection, temperature: float = 1.0) -> str:
    """What a collection holds, in lines: how many samples, how every reward judges them, and what could be learned from them."""
    samples = collection.load()
    scores, description = samples.scores, samples.description
    left_out = f"; {samples.unscored} more could not be scored and are left out" if samples.unscored else ""
    lines = [f"{len(scores)} samples of {len(description.prompts)} prompts in {collection.folder.name}{left_out}"]
    spreads = zip(description.rewards, scores.mean(0).tolist(), scores.std(0, correction=0).tolist(), strict=True)
    lines += [f"{name}: {mean:.4f} ± {std:.4f}" for name, mean, std in spreads]
    try:
        _, health = label(samples.rewards(), samples.prompts, temperature)
        lines += [f"at temperature {temperature:g}, {health.effective:.1%} of the samples count", *health.warnings()]
    except GuidanceError as error:
        lines.append(str(error))
    return "\n".join(lines)
