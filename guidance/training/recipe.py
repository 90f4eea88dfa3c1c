"""Trainings with good defaults from collected samples, for the node and the command line."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import one_step
from ..data.batches import Batch, FreshPairs, Source, StoredPairs
from ..data.description import Description
from ..data.samples import Samples
from ..errors import GuidanceError, quoted
from ..network.forms import FORMS
from ..network.unet import Architecture
from ..process import process_named
from .labels import label
from .loop import Training
from .objectives import Plan, Task
from .report import Fitting, digest

WIDTHS = {"small": 24, "medium": 48, "large": 64}
"""Widths of the network sizes, which have about 2, 6 and 10 million parameters."""
BATCH = 64
HELD_OUT = 0.1
"""Share of the samples that are held out from training."""
MAX_HELD_OUT_BATCHES = 64
"""Largest number of batches per held-out evaluation."""
DATA_OBJECTIVES = ("auto", "potential", "weighted", "reward_gradient")
DATA_FORMS = ("correction", "shift")
NOISE_FORMS = {"weighted": "noise", "reward_gradient": "leap"}
"""The form of networks for one-step generators, by objective."""


def plan_for(description: Description, objective: str = "auto", form: str = "correction", **options: Any) -> Plan:
    """The plan for a collection. `options` are fields of Plan.

    auto: the objective potential, which learns most from few samples, but weighted for noise and for the form shift.
    Potentials train on fresh noise, which reduces overfitting. Short trainings are evaluated more often, and average
    the weights over fewer steps. Raises GuidanceError for an objective and a form that do not fit together.
    """
    noise = description.base.target == "noise"
    if objective == "auto":
        objective = "weighted" if noise or form == "shift" else "potential"
    if noise and objective not in NOISE_FORMS:
        raise GuidanceError(
            f"The noise of one-step generators is tilted by the objectives {' and '.join(NOISE_FORMS)}, "
            f"not by {objective}."
        )
    if noise or objective == "potential":
        what = "The noise of one-step generators" if noise else "The objective potential"
        if form != "correction":
            raise GuidanceError(f"{what} has a form of its own: leave the form at correction, not at {form}.")
        form = NOISE_FORMS[objective] if noise else "potential"
    steps = options.get("steps", Plan.steps)
    pace = {"check_every": min(Plan.check_every, max(10, steps // 20)), "ema": min(Plan.ema, 1 - 10 / max(20, steps))}
    return Plan(
        **{"objective": objective, "form": form, "batch": BATCH, "fresh": objective == "potential", **pace} | options
    )


def weights_from(text: str) -> tuple[float, ...]:
    """The weights in a text such as "1, 0.5"; an empty text has none. Raises GuidanceError for any other text."""
    try:
        return tuple(float(part) for part in text.split(",")) if text.strip() else ()
    except ValueError as error:
        raise GuidanceError(f"Weights are numbers separated by commas, such as 1, 0.5, not {quoted(text)}.") from error


def prepare(
    samples: Samples,
    plan: Plan,
    size: str = "medium",
    reward_weights: Sequence[float] = (),
    device: torch.device | None = None,
    checkpoints: Path | None = None,
    denoise: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    reward: Callable[[Tensor, Batch], Tensor] | None = None,
    step_context: Callable[[], AbstractContextManager] = nullcontext,
) -> Fitting:
    """A training that is ready to run. Raises GuidanceError if nothing can be learned from these samples.

    checkpoints: folder of checkpoints, in which each training finds its own. denoise: x (B,...), σ (B,), prompts (B,)
    -> D (B,...) with a graph; for the form `shift`. reward: denoised latents (B,...), batch -> rewards (B,), as
    CombinedReward with these weights; for `reward_gradient`. step_context: the context in which `denoise` and `reward`
    are called.
    """
    description, device = samples.description, device or torch.device("cpu")
    if plan.form == "shift" and denoise is None:
        raise GuidanceError(
            "The form shift needs the model while it trains: train it in the graph that collects the samples."
        )
    weights, health = label(samples.rewards(reward_weights), samples.prompts, plan.temperature)
    reward_weights = description.weights(reward_weights)
    noise = description.base.target == "noise"
    process = one_step.PROCESS if noise else process_named(description.base.process)

    def source(rows: Tensor) -> Source:
        if plan.form == "leap":
            return one_step.FreshNoise(description.shape, samples.text, device)
        chosen = samples.rows(rows)
        if noise:
            return one_step.NoisePairs(chosen.clean, weights[rows], chosen.text, chosen.prompts, device)
        return (FreshPairs if plan.fresh else StoredPairs)(chosen, weights[rows], process, device, denoise)

    in_spreads = reward and (lambda latents, batch: reward(latents, batch) / health.std)
    own, held_out = samples.split(HELD_OUT)
    name = digest(
        (asdict(description), samples.numbers.tolist(), samples.scores.tolist(), asdict(plan), size, reward_weights)
    )
    training = Training(
        source(own),
        Task(process, plan, in_spreads),
        architecture(samples, plan.form, size),
        source(held_out) if len(held_out) else None,
        checkpoints and checkpoints / f"training-{name}.checkpoint",
        device,
        samples.text.pooled,
        step_context,
        held_out_batches(len(held_out), plan.batch)
        if denoise is None and reward is None
        else Training.held_out_batches,
    )
    return Fitting(description, reward_weights, health, training)


def held_out_batches(samples: int, batch: int) -> int:
    """The number of batches that contain each held-out sample about once, within bounds."""
    return max(Training.held_out_batches, min(MAX_HELD_OUT_BATCHES, samples // batch))


def architecture(samples: Samples, form: str, size: str) -> Architecture:
    """The network for these samples, of a size in WIDTHS."""
    text, shape = samples.text[torch.tensor([0])], samples.description.shape
    sizes = {"tokens": text.tokens.shape[2], "pooled": text.pooled.shape[1], "width": WIDTHS[size]}
    return Architecture(shape[0], FORMS[form].inputs, scalar=form == "potential", **sizes).fitted(shape)


def bytes_for(description: Description, plan: Plan, size: str) -> int:
    """Approximate memory of a training step: 30 feature maps of a latent's resolution, and as much for lower ones."""
    return plan.batch * 64 * WIDTHS[size] * math.prod(description.shape[1:]) * 4
