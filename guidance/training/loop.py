"""The training loop: steps, averaging of weights, held-out evaluation, checkpoints, several processes."""

import copy
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as distributed
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..data.batches import Source
from ..disk import in_use, write
from ..errors import GuidanceError, pass_out_of_memory, quoted
from ..network.unet import Architecture, GuidanceNetwork
from ..records import record
from ..tensors import reason, shown
from .checkpoint import drop_oldest, same_structure
from .objectives import OBJECTIVES, Task

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """The state of a training after a step."""

    step: int
    loss: float
    """The loss of this step's batch."""
    check: float | None = None
    """The held-out loss. None if this step had no held-out evaluation."""
    best: bool = False
    """Whether the held-out loss is the lowest so far."""


@dataclass
class Training:
    """A run of a plan. Iterate it to train, and stop at any time; `result()` is the best network so far.

    Under torch.distributed every process computes its rows of each batch. The result equals that of a single process.
    """

    source: Source
    task: Task
    architecture: Architecture
    held_out: Source | None = None
    """Batches of held-out samples, which select the best network."""
    checkpoint: Path | None = None
    """File that every held-out evaluation writes. A training that finds it continues from it, bit for bit."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    pooled: Tensor | None = None
    """Pooled texts (N,P), from which the network's standardization is computed."""
    step_context: Callable[[], AbstractContextManager] = nullcontext
    """Context in which the loss and its gradient are computed, entered at each step."""
    held_out_batches: int = 8
    """Batches per held-out evaluation. With few, the choice of the best network is random."""
    step: int = field(default=0, init=False)
    curve: list[tuple[int, float]] = field(default_factory=list, init=False)
    """Step and held-out loss of each evaluation; the loss of the training batch if no samples are held out."""
    loss: float = field(default=math.nan, init=False)
    """Loss of the last batch."""
    diverged: bool = field(default=False, init=False)
    """Whether the training ended early because it diverged."""
    checkpoint_in_use: BinaryIO | None = field(default=None, init=False)
    """The open checkpoint file, which keeps other trainings from deleting it."""
    unsaved: str = field(default="", init=False)
    """Why the last checkpoint could not be written. Empty if it was written."""

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
        """Factor of the learning rate: linear warm-up, then cosine decay to 2%."""
        steps = self.task.plan.steps
        return min(1, (step + 1) / min(100, steps)) * (0.02 + 0.98 * (1 + math.cos(math.pi * step / steps)) / 2)

    def __iter__(self) -> Iterator[Progress]:
        try:
            yield from self.steps()
        finally:
            self.release_checkpoint()

    def steps(self) -> Iterator[Progress]:
        plan = self.task.plan
        network: nn.Module = (
            nn.parallel.DistributedDataParallel(self.network) if distributed.is_initialized() else self.network
        )
        while self.step < plan.steps and not self.diverged:
            with self.step_context():
                batch = self.source.batch(plan.batch, (plan.seed, self.step), own_rows(plan.batch))
                loss = OBJECTIVES[plan.objective](network, self.task, batch)
                loss.backward()
            if not math.isfinite(nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)):  # equal in all processes
                self.diverge()
                return
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
            self.average.update_parameters(self.network)
            self.step += 1
            self.loss = float(loss.detach())
            due = self.step % plan.check_every == 0 or self.step == plan.steps
            yield self.evaluate() if due else Progress(self.step, self.loss)

    @torch.no_grad()
    def evaluate(self) -> Progress:
        """Evaluate the averaged network on held-out samples, keep it if it is the best, and write a checkpoint."""
        check = self.loss if self.held_out is None else self.held_out_loss(self.held_out)
        if not math.isfinite(check):
            self.diverge()
            return Progress(self.step, self.loss)
        best = self.held_out is None or not self.curve or check < min(value for _, value in self.curve)
        self.curve.append((self.step, check))
        if best:
            self.best = copy.deepcopy(self.average.module.state_dict())
        if self.checkpoint is not None and is_main_process():
            self.save(self.checkpoint)
        return Progress(self.step, self.loss, None if self.held_out is None else check, best)

    def diverge(self) -> None:
        """End the training with the best network so far. Raises GuidanceError if there is none yet."""
        if not self.curve:
            raise GuidanceError(
                f"The training diverged at step {self.step + 1}: lower the learning rate, or raise the temperature."
            )
        self.diverged = True

    def held_out_loss(self, held_out: Source) -> float:
        """The loss of the averaged network, on the same batches at every evaluation."""
        plan, count = self.task.plan, self.held_out_batches
        objective = OBJECTIVES[plan.objective]
        batches = (held_out.batch(plan.batch, (plan.seed, -1, i)) for i in range(count))
        with self.step_context():
            return sum(float(objective(self.average.module, self.task, batch)) for batch in batches) / count

    def pause(self) -> None:
        """Evaluate the network after the training was stopped between two evaluations."""
        if self.step and (not self.curve or self.curve[-1][0] != self.step):
            self.evaluate()
            self.release_checkpoint()

    def result(self) -> GuidanceNetwork:
        """The best network so far, frozen."""
        network = copy.deepcopy(self.network)
        network.load_state_dict(self.best)
        return network.eval().requires_grad_(False)

    def state(self) -> dict[str, Any]:
        """The content of a checkpoint."""
        parts = {name: getattr(self, name).state_dict() for name in ("network", "average", "optimizer", "schedule")}
        return parts | {"best": self.best, "step": self.step, "curve": self.curve, "plan": asdict(self.task.plan)}

    def save(self, path: Path) -> None:
        """Write a checkpoint atomically. If that fails, the training continues without, and logs a warning once."""
        self.release_checkpoint()
        try:
            write(
                path,
                lambda partial: torch.save(self.state(), partial),
                "The training continues without it, and tries again.",
            )
            self.checkpoint_in_use = in_use(path)
            self.unsaved = ""
            drop_oldest(path)
        except (GuidanceError, OSError) as error:
            if not self.unsaved:
                log.warning("%s", error)
            self.unsaved = str(error)

    def release_checkpoint(self) -> None:
        """Close the checkpoint file, so that other trainings may delete it."""
        if self.checkpoint_in_use is not None:
            self.checkpoint_in_use.close()
        self.checkpoint_in_use = None

    def saved(self) -> dict[str, Any] | None:
        """The state to continue from, if any. The main process reads it for all, which may run on other machines."""
        found = [self.read_checkpoint(self.checkpoint) if self.checkpoint is not None and is_main_process() else None]
        if distributed.is_initialized():
            distributed.broadcast_object_list(found, device=self.device)
        return found[0]

    def read_checkpoint(self, path: Path) -> dict[str, Any] | None:
        """The state in a checkpoint, None if there is no file. Raises GuidanceError if it does not fit."""
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            return None
        except OSError as error:
            pass_out_of_memory(error, f"{path.name} was read")
            what = f"{shown(path)} cannot be read ({reason(error)})"
            raise GuidanceError(f"{what}: correct that, or move it away to train from the start.") from error
        except Exception as error:
            pass_out_of_memory(error, f"{path.name} was read")
            raise self.damaged(path) from error
        if not isinstance(state, dict) or "plan" not in state:
            raise self.damaged(path)
        if unknown := state.keys() - self.state().keys():
            what = f"{shown(path)} has {quoted(min(map(str, unknown)))}, which this version of the pack does not know"
            raise GuidanceError(f"{what}: update the pack, or delete it to train from the start.")
        try:
            other = state["plan"] != asdict(self.task.plan)
            if not other:
                self.require_fitting(state)
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            raise self.damaged(path) from error
        if other:
            raise GuidanceError(
                f"{shown(path)} belongs to a training with other settings: delete it, or restore those settings."
            )
        return state

    def damaged(self, path: Path) -> GuidanceError:
        return GuidanceError(f"{path.name} is damaged: delete it to train from the start. It is in {path.parent}.")

    def require_fitting(self, state: dict[str, Any]) -> None:
        """Raise ValueError, KeyError or TypeError if a state is not one of this training."""
        expected, found = self.state(), state["optimizer"]["state"]
        moments = {
            i: {"step": torch.zeros(()), "exp_avg": p, "exp_avg_sq": p} for i, p in enumerate(self.network.parameters())
        }
        moments = {i: like for i, like in moments.items() if i in found}  # parameters without a gradient have none
        pairs = [(state[name], expected[name]) for name in ("network", "average", "best")]
        if not all(same_structure(given, like) for given, like in [*pairs, (found, moments)]):
            raise ValueError("its tensors are not those of this network")
        step, curve = record(int, state["step"]), record(tuple[tuple[int, float], ...], state["curve"])
        steps = [at for at, _ in curve]
        if not 1 <= step <= self.task.plan.steps or state["average"]["n_averaged"] != step:
            raise ValueError("its steps contradict each other")
        if steps != sorted(set(steps)) or steps[-1:] != [step]:
            raise ValueError("its curve is not that of its steps")

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a state. What follows from the step, such as the learning rate, is computed and not read."""
        self.best, self.step, self.curve = state["best"], state["step"], [tuple(point) for point in state["curve"]]
        self.network.load_state_dict(state["network"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state["optimizer"]["state"]})
        self.schedule.last_epoch = self.step
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self.rate(self.step)


def is_main_process() -> bool:
    """Whether this process writes files and messages."""
    return not distributed.is_initialized() or distributed.get_rank() == 0


def own_rows(size: int) -> slice:
    """The rows of a batch that this process computes. Raises GuidanceError if the batch cannot be divided equally."""
    if not distributed.is_initialized():
        return slice(None)
    if size % distributed.get_world_size():
        raise GuidanceError(
            f"A batch of {size} cannot be shared by {distributed.get_world_size()} processes: choose a multiple."
        )
    return slice(distributed.get_rank(), None, distributed.get_world_size())


def fit(training: Training) -> GuidanceNetwork:
    """Train to the end, and return the best network."""
    for _ in training:
        pass
    return training.result()
