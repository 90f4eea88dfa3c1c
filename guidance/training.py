"""Fits a guidance network to labelled samples.

Draw x0 ~ p, label it with a weight w = exp(r(x0)/β), noise it to x. The reward-weighted posterior mean is then the solution of a weighted
least-squares regression, in which no reward and no model is differentiated:

    D_q = D + s·G,    G = argmin E[ w·|y - G(x)|² ],    y = (x0 - D)/s

As E[y|x] = 0 without weights, E[ w·|G|² - 2(w - 1)·y·G ] has the same minimiser, and far less noise where w says little about x.
"""

import copy
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from shutil import rmtree
from typing import Any, BinaryIO, Protocol

import torch
import torch.distributed as distributed
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .errors import GuidanceError, pass_out_of_memory, quoted
from .files import held, in_use, write
from .network import FORMS, Architecture, Denoiser, GuidanceNetwork, Text
from .process import Process, column
from .randomness import generator
from .records import record
from .stored import reason, shown

log = logging.getLogger(__name__)

LOW_SHARE = 0.1
"""Effective share of the samples below which most of what they cost is wasted."""
CHECKPOINTS = "training-*.checkpoint"
KEPT = 3
"""Checkpoints in a folder: of the trainings that were interrupted last."""
FEW = 100
"""Effective samples whose averages are uncertain by a tenth: fewer teach a network their accidents."""


@dataclass(frozen=True)
class Health:
    """What can be said of labels before anything is learned from them."""

    count: int
    prompts: int
    mean: float
    std: float
    """Of the reward within a prompt: the unit of the temperature."""
    effective: float
    """Effective sample size (Σw)²/Σw² over the number of samples."""

    @property
    def worth(self) -> float:
        """Effective sample size as a number: so many samples of equal weight say as much. It grows with the count; the share does not."""
        return self.effective * self.count

    def warnings(self) -> list[str]:
        found = []
        if self.effective < LOW_SHARE:
            found.append(f"Only {self.effective:.1%} of {self.count} samples count at this temperature: raise it to use more of them.")
        if self.worth < FEW:
            found.append(f"Together the samples count as {self.worth:.0f}, which is little to learn from: collect more, or raise the temperature.")
        return found


def label(rewards: Tensor, prompts: Tensor, temperature: float) -> tuple[Tensor, Health]:
    """Rewards (N,) and the prompt (N,) each belongs to -> weights (N,) of mean 1, w ∝ exp(r/(β·std)) / E[exp(r/(β·std)) | prompt].

    Dividing by a prompt's mean weight changes no minimiser and lets every prompt count alike; of prompts of which little is known it is
    shrunk towards that of all (empirical Bayes). std is the spread within a prompt. Raises GuidanceError where there is nothing to learn.
    """
    if not temperature > 0:
        raise GuidanceError(f"The temperature must be above 0, not {temperature}; smaller values follow the reward more closely.")
    if bad := int((~torch.isfinite(rewards)).sum()):
        raise GuidanceError(f"{bad} of {len(rewards)} rewards are not finite numbers: leave those samples out.")
    rewards = rewards.double()
    _, group, count = torch.unique(prompts, return_inverse=True, return_counts=True)
    std = spread(rewards, group, count)
    if not std > 1e-6 * rewards.abs().max():
        raise GuidanceError(f"All {len(rewards)} samples have the same reward for their prompt: there is nothing to learn from them.")
    logits = rewards / (std * temperature)
    weights = (logits - log_mean_weight(logits, group, count)[group]).softmax(0) * len(rewards)
    effective = float(len(rewards) / weights.square().sum())
    return weights.float(), Health(len(rewards), len(count), float(rewards.mean()), float(std), effective)


def spread(rewards: Tensor, group: Tensor, count: Tensor) -> Tensor:
    """Standard deviation within prompts; of one sample per prompt, that of all."""
    if len(rewards) == len(count):
        return rewards.std(correction=min(1, len(rewards) - 1))
    mean = torch.zeros_like(count, dtype=rewards.dtype).index_add(0, group, rewards) / count
    return ((rewards - mean[group]).square().sum() / (len(rewards) - len(count))).sqrt()


def log_mean_weight(logits: Tensor, group: Tensor, count: Tensor) -> Tensor:
    """log E[exp(logit)] of each prompt (P,), shrunk to their mean by the share of its variance that is sampling error."""
    highest = torch.full((len(count),), -torch.inf, dtype=logits.dtype).scatter_reduce(0, group, logits, "amax")
    total = torch.zeros_like(highest).index_add(0, group, (logits - highest[group]).exp())
    found = highest + (total / count).log()
    if len(logits) == len(count):
        return found.mean().expand_as(found)
    relative = (logits - found[group]).exp()  # of mean 1 in each prompt
    error = (relative - 1).square().sum() / (len(logits) - len(count)) / count
    between = ((found - found.mean()).square().mean() - error.mean()).clamp_min(0)
    return torch.lerp(found.mean().expand_as(found), found, between / (between + error))


@dataclass(frozen=True)
class Batch:
    """Noised samples: everything (B,...) alike."""

    clean: Tensor
    x: Tensor
    sigma: Tensor
    """(B,)"""
    denoised: Tensor
    """D(x,σ) of the model."""
    weights: Tensor
    """(B,)"""
    text: Text
    denoise: Denoiser | None = None
    """D at other points, with a graph; for the form `shift`."""
    prompts: Tensor | None = None
    """(B,) the prompt of each, where the source knows it."""


class Source(Protocol):
    """Where batches come from. The same key gives the same batch."""

    def batch(self, size: int, key: tuple[int, ...], part: slice = slice(None)) -> Batch:
        """The chosen part of a batch of `size`."""
        ...


@dataclass(frozen=True)
class LivePairs:
    """Fresh noise for every batch, and a call of the model for its D."""

    clean: Tensor
    weights: Tensor
    process: Process
    denoise: Callable[[Tensor, Tensor, Text], Tensor]
    """x (B,...), σ (B,), text -> D (B,...)."""
    sigma: Callable[[Tensor], Tensor]
    """Times in [0,1], 1 noise -> noise levels."""
    text: Text | None = None

    def batch(self, size: int, key: tuple[int, ...], part: slice = slice(None)) -> Batch:
        rng = generator(*key)
        rows = torch.randint(len(self.clean), (size,), generator=rng)[part]
        sigma = self.sigma((torch.arange(size) + torch.rand(size, generator=rng)) / size)[part]
        noise = torch.randn(size, *self.clean.shape[1:], generator=rng)[part]
        clean = self.clean[rows]
        text = Text.none(len(rows)) if self.text is None else self.text[rows]
        x = self.process.add_noise(clean, noise.to(clean), column(sigma, clean))
        denoise = lambda point: self.denoise(point, sigma, text)  # noqa: E731
        with torch.no_grad():
            denoised = denoise(x)
        return Batch(clean, x, sigma, denoised, self.weights[rows], text, denoise)


@dataclass(frozen=True)
class Plan:
    """How to train. Two runs of the same plan on the same labels give the same network."""

    objective: str = "weighted"
    form: str = "correction"
    steps: int = 4000
    batch: int = 128
    learning_rate: float = 1e-3
    ema: float = 0.998
    check_every: int = 200
    """Steps between two looks at held-out samples; the best network so far is kept."""
    baseline: float = 1.0
    """What is taken off the weights of y; any value has the same minimiser."""
    temperature: float = 1.0
    """β in standard deviations of the reward within a prompt; labels have it in their weights."""
    answers: float = 1.0
    """How much a potential learns to answer as the model does, which needs no labels and teaches it what is in a picture."""
    fresh: bool = False
    """Whether a potential sees fresh noise in every batch, and clean latents in place of the model's D, instead of the collected states."""
    seed: int = 0

    def __post_init__(self):
        if self.objective not in OBJECTIVES or self.form not in FORMS:
            raise GuidanceError(f"Known objectives are {', '.join(OBJECTIVES)}; known forms {', '.join(FORMS)}.")
        if self.objective.startswith("potential") != (self.form == "potential"):
            raise GuidanceError(f"The objective {self.objective} does not train the form {self.form}.")
        if self.fresh and self.objective != "potential":
            raise GuidanceError(f"The objective {self.objective} needs the model's answers at the collected states: it cannot have fresh noise.")
        if min(self.steps, self.batch, self.check_every) < 1 or not 0 < self.learning_rate < math.inf:
            raise GuidanceError(
                f"A training needs at least 1 step, a batch of at least 1 and a learning rate above 0, not {self.steps}, {self.batch} and "
                f"{self.learning_rate:g}."
            )


@dataclass(frozen=True)
class Task:
    """What an objective needs beside a batch."""

    process: Process
    plan: Plan
    reward: Callable[[Tensor, Batch], Tensor] | None = None
    """Denoised latents (B,...) -> rewards (B,) in the unit of the temperature, differentiable; for `reward_gradient`."""

    def correction(self, network: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """D_q and (D_q - D)/s, (B,...)."""
        form = FORMS[self.plan.form]
        denoise = batch.denoise if form.moves and batch.denoise is not None else lambda _: batch.denoised
        tilted = form(network, self.process, denoise, batch.x, batch.sigma, batch.text)
        return tilted, (tilted - batch.denoised) / self.std(batch)

    def std(self, batch: Batch) -> Tensor:
        return self.process.posterior_variance(column(batch.sigma, batch.x)) ** 0.5


Objective = Callable[[nn.Module, Task, Batch], Tensor]


def weighted(network: nn.Module, task: Task, batch: Batch) -> Tensor:
    """E[ w·|G|² - 2(w - 1)·y·G ] per element."""
    _, correction = task.correction(network, batch)
    target = (batch.clean - batch.denoised) / task.std(batch)
    weights = column(batch.weights, batch.x)
    return (weights * correction.square() - 2 * (weights - task.plan.baseline) * target * correction).mean()


def reward_gradient(network: nn.Module, task: Task, batch: Batch) -> Tensor:
    """E[ |G|²/2 - r(D_q)/β ]: the KL-regularised step, amortised. For rewards with a gradient, where labels are few (arXiv 2508.09968)."""
    if task.reward is None:
        raise GuidanceError("The objective reward_gradient needs the reward itself, with a gradient; labels are not enough.")
    tilted, correction = task.correction(network, batch)
    scores = task.reward(tilted, batch)
    if torch.is_grad_enabled() and not scores.requires_grad:
        raise GuidanceError("This reward has no gradient to train by: choose the objective weighted.")
    return (correction.square().flatten(1).sum(1) / 2 - scores / task.plan.temperature).mean()


def in_parts(reward: Callable[[Tensor, slice], Tensor], points: Tensor, size: int) -> Tensor:
    """reward(points[part], part) of each part of points (B,...) -> (B,). The way back is gone at once, `size` points at a time, so that no more
    graphs are held, and can be gone once."""
    parts = [slice(start, start + size) for start in range(0, len(points), size)]
    if not torch.is_grad_enabled():
        return torch.cat([reward(points[part], part) for part in parts])
    found = []
    for part in parts:
        point = points[part].detach().requires_grad_()
        scores = reward(point, part)
        if scores.requires_grad:
            (gradient,) = torch.autograd.grad(scores.sum(), point)
            scores = scores.detach() + (gradient * (points[part] - point.detach())).flatten(1).sum(1)
        found.append(scores)
    return torch.cat(found)


def potential(loss: Callable[[Tensor, Tensor], Tensor]) -> Objective:
    """A scalar network f(x) and the weights -> the loss per sample, to which that of its guess of D is added while it learns."""

    def objective(network: nn.Module, task: Task, batch: Batch) -> Tensor:
        unit = task.process.unit(batch.x, column(batch.sigma, batch.x))
        value, answer = network((unit,), task.process.angle(batch.sigma), batch.text, answers=True)
        lost = loss(value, batch.weights).mean()
        return lost + task.plan.answers * (answer - batch.denoised).square().mean() if torch.is_grad_enabled() else lost

    return objective


OBJECTIVES: dict[str, Objective] = {
    "weighted": weighted,
    "reward_gradient": reward_gradient,
    "potential": potential(lambda f, w: f.exp() - w * f),  # f -> log E[w|x], by the Poisson loss
}


@dataclass(frozen=True)
class Progress:
    step: int
    loss: float
    check: float | None = None
    """The loss on held-out samples, where this step looked at them."""
    best: bool = False
    """Whether it is the lowest so far."""


@dataclass
class Training:
    """A run of a plan. Iterate it to train; stop at any time; `best` is what has been reached.

    Under torch.distributed every process takes its part of each batch, and the result is that of one process.
    """

    source: Source
    task: Task
    architecture: Architecture
    held_out: Source | None = None
    checkpoint: Path | None = None
    """Written at every look; a run that finds it goes on from there, bit for bit."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    pooled: Tensor | None = None
    """Texts (N,P) that show what texts have in common."""
    around: Callable[[], AbstractContextManager] = nullcontext
    """What the loss and its way back happen in; between steps there is time for something else."""
    batches: int = 8
    """Held-out ones of a look: few leave it to chance which network is the best."""
    step: int = field(default=0, init=False)
    curve: list[tuple[int, float]] = field(default_factory=list, init=False)
    """Loss on held-out samples by step; on those it is trained on where none are held out."""
    loss: float = field(default=math.nan, init=False)
    """On the last batch."""
    diverged: bool = field(default=False, init=False)
    """Whether it had to end early."""
    used: BinaryIO | None = field(default=None, init=False)
    """The checkpoint that it has written, while it runs."""
    unsaved: str = field(default="", init=False)
    """Why the last checkpoint could not be written; empty where it was."""

    def __post_init__(self):
        plan = self.task.plan
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(plan.seed)
            self.network = GuidanceNetwork(self.architecture)
        if self.pooled is not None:
            self.network.embed.standardized.fit(self.pooled.float())
        self.network.to(self.device)
        self.average = AveragedModel(self.network, multi_avg_fn=get_ema_multi_avg_fn(plan.ema))
        self.best = copy.deepcopy(self.network.state_dict())
        self.optimizer = torch.optim.AdamW(self.network.parameters(), plan.learning_rate, weight_decay=0.0)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.rate)
        if (state := self.saved()) is not None:
            self.restore(state)

    def rate(self, step: int) -> float:
        steps = self.task.plan.steps
        return min(1, (step + 1) / min(100, steps)) * (0.02 + 0.98 * (1 + math.cos(math.pi * step / steps)) / 2)

    def __iter__(self) -> Iterator[Progress]:
        try:
            yield from self.steps()
        finally:
            self.let_go()

    def steps(self) -> Iterator[Progress]:
        plan = self.task.plan
        network: nn.Module = nn.parallel.DistributedDataParallel(self.network) if distributed.is_initialized() else self.network
        while self.step < plan.steps and not self.diverged:
            with self.around():
                batch = self.source.batch(plan.batch, (plan.seed, self.step), own_part(plan.batch))
                loss = OBJECTIVES[plan.objective](network, self.task, batch)
                loss.backward()
            if not math.isfinite(nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)):  # of all processes alike
                self.diverge()
                return
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
            self.average.update_parameters(self.network)
            self.step += 1
            self.loss = float(loss.detach())
            yield self.look() if self.step % plan.check_every == 0 or self.step == plan.steps else Progress(self.step, self.loss)

    @torch.no_grad()
    def look(self) -> Progress:
        """Judge the averaged network by samples it has not seen, keep it if it is the best, and write a checkpoint."""
        check = self.loss if self.held_out is None else self.judge(self.held_out)
        if not math.isfinite(check):
            self.diverge()
            return Progress(self.step, self.loss)
        best = self.held_out is None or not self.curve or check < min(value for _, value in self.curve)
        self.curve.append((self.step, check))
        if best:
            self.best = copy.deepcopy(self.average.module.state_dict())
        if self.checkpoint is not None and leads():
            self.save(self.checkpoint)
        return Progress(self.step, self.loss, None if self.held_out is None else check, best)

    def diverge(self) -> None:
        """End with the best network so far. Raises GuidanceError where there is none yet."""
        if not self.curve:
            raise GuidanceError(f"The training diverged at step {self.step + 1}: lower the learning rate, or raise the temperature.")
        self.diverged = True

    def judge(self, held_out: Source) -> float:
        """The averaged network's loss on the same batches at every look."""
        plan = self.task.plan
        batches = (held_out.batch(plan.batch, (plan.seed, -1, i)) for i in range(self.batches))
        with self.around():
            return sum(float(OBJECTIVES[plan.objective](self.average.module, self.task, batch)) for batch in batches) / self.batches

    def pause(self) -> None:
        """Stopped between two looks: look, so that what has been reached since the last one counts."""
        if self.step and (not self.curve or self.curve[-1][0] != self.step):
            self.look()
            self.let_go()

    def result(self) -> GuidanceNetwork:
        """The best network so far."""
        network = copy.deepcopy(self.network)
        network.load_state_dict(self.best)
        return network.eval().requires_grad_(False)

    def state(self) -> dict[str, Any]:
        parts = {name: getattr(self, name).state_dict() for name in ("network", "average", "optimizer", "schedule")}
        return parts | {"best": self.best, "step": self.step, "curve": self.curve, "plan": asdict(self.task.plan)}

    def save(self, path: Path) -> None:
        """Whole or not at all; where the disk does not take it, the training goes on without."""
        self.let_go()
        try:
            write(path, lambda partial: torch.save(self.state(), partial), "The training goes on without it, and tries again.")
            self.used = in_use(path)
            self.unsaved = ""
            drop_oldest(path)
        except (GuidanceError, OSError) as error:
            if not self.unsaved:
                log.warning("%s", error)
            self.unsaved = str(error)

    def let_go(self) -> None:
        """Stop using the checkpoint, which may then be deleted for newer ones."""
        if self.used is not None:
            self.used.close()
        self.used = None

    def saved(self) -> dict[str, Any] | None:
        """The state to go on from. The process that writes it reads it for all: the others may be on machines of their own."""
        found = [self.read(self.checkpoint) if self.checkpoint is not None and leads() else None]
        if distributed.is_initialized():
            distributed.broadcast_object_list(found, device=self.device)
        return found[0]

    def read(self, path: Path) -> dict[str, Any] | None:
        """The state in a checkpoint; none where there is none. Raises GuidanceError where it is not one of this training."""
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            return None
        except OSError as error:
            pass_out_of_memory(error, f"{path.name} was read")
            told = f"{shown(path)} cannot be read ({reason(error)})"
            raise GuidanceError(f"{told}: mend that, or take it away to train from the start.") from error
        except Exception as error:
            pass_out_of_memory(error, f"{path.name} was read")
            raise self.damaged(path) from error
        if not isinstance(state, dict) or "plan" not in state:
            raise self.damaged(path)
        if unknown := state.keys() - self.state().keys():
            told = f"{shown(path)} has {quoted(min(map(str, unknown)))}, which this version of the pack does not know"
            raise GuidanceError(f"{told}: update the pack, or delete it to train from the start.")
        try:
            other = state["plan"] != asdict(self.task.plan)
            if not other:
                self.require_fitting(state)
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            raise self.damaged(path) from error
        if other:
            raise GuidanceError(f"{shown(path)} belongs to a training with other settings: delete it, or go back to those settings.")
        return state

    def damaged(self, path: Path) -> GuidanceError:
        return GuidanceError(f"{path.name} is damaged; delete it to train from the start. It lies in {path.parent}.")

    def require_fitting(self, state: dict[str, Any]) -> None:
        """Raise ValueError, KeyError or TypeError where this training cannot have left a state."""
        expected, found = self.state(), state["optimizer"]["state"]
        moments = {i: {"step": torch.zeros(()), "exp_avg": p, "exp_avg_sq": p} for i, p in enumerate(self.network.parameters())}
        moments = {i: like for i, like in moments.items() if i in found}  # what has no gradient has none
        pairs = [(state[name], expected[name]) for name in ("network", "average", "best")]
        if not all(alike(given, like) for given, like in [*pairs, (found, moments)]):
            raise ValueError("its tensors are not those of this network")
        step, curve = record(int, state["step"]), record(tuple[tuple[int, float], ...], state["curve"])
        steps = [at for at, _ in curve]
        if not 1 <= step <= self.task.plan.steps or state["average"]["n_averaged"] != step:
            raise ValueError("its steps contradict each other")
        if steps != sorted(set(steps)) or steps[-1:] != [step]:
            raise ValueError("its curve is another's")

    def restore(self, state: dict[str, Any]) -> None:
        """What follows from the step, as the learning rate, is not read."""
        self.best, self.step, self.curve = state["best"], state["step"], [tuple(point) for point in state["curve"]]
        self.network.load_state_dict(state["network"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state["optimizer"]["state"]})
        self.schedule.last_epoch = self.step
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self.rate(self.step)


def alike(found: Any, expected: Any) -> bool:
    """Whether tensors by names have the same names, shapes and types, and are finite numbers."""
    if not isinstance(expected, Tensor):
        same = isinstance(found, dict) and found.keys() == expected.keys()
        return same and all(alike(found[name], value) for name, value in expected.items())
    if not isinstance(found, Tensor) or found.layout != torch.strided or found.device.type != "cpu":
        return False
    return (found.shape, found.dtype) == (expected.shape, expected.dtype) and bool(found.isfinite().all())


def drop_oldest(path: Path) -> None:
    """Keep this checkpoint and the newest others beside it, and those that trainings use at this moment."""
    others = sorted((other for other in path.parent.glob(CHECKPOINTS) if other != path), key=written, reverse=True)
    for other in [*others[KEPT - 1 :], *path.parent.glob(f"{CHECKPOINTS}.partial")]:
        with suppress(OSError), held(other) as unused:
            if unused:
                rmtree(other) if other.is_dir() else other.unlink()


def written(path: Path) -> float:
    """When, in seconds; long ago where it is not there any more."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def leads() -> bool:
    """Whether this process is the one that writes and speaks."""
    return not distributed.is_initialized() or distributed.get_rank() == 0


def own_part(size: int) -> slice:
    """This process's rows of a batch."""
    if not distributed.is_initialized():
        return slice(None)
    if size % distributed.get_world_size():
        raise GuidanceError(f"A batch of {size} cannot be shared by {distributed.get_world_size()} processes; choose a multiple.")
    return slice(distributed.get_rank(), None, distributed.get_world_size())


def fit(training: Training) -> GuidanceNetwork:
    """Train to the end."""
    for _ in training:
        pass
    return training.result()
