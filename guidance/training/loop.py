"""The training loop: steps, averaging, held-out loss, checkpoints, several processes."""

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
    step_context: Callable[[], AbstractContextManager] = nullcontext
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
        network: nn.Module = (
            nn.parallel.DistributedDataParallel(self.network) if distributed.is_initialized() else self.network
        )
        while self.step < plan.steps and not self.diverged:
            with self.step_context():
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
            yield (
                self.look()
                if self.step % plan.check_every == 0 or self.step == plan.steps
                else Progress(self.step, self.loss)
            )

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
            raise GuidanceError(
                f"The training diverged at step {self.step + 1}: lower the learning rate, or raise the temperature."
            )
        self.diverged = True

    def judge(self, held_out: Source) -> float:
        """The averaged network's loss on the same batches at every look."""
        plan = self.task.plan
        batches = (held_out.batch(plan.batch, (plan.seed, -1, i)) for i in range(self.batches))
        with self.step_context():
            return (
                sum(float(OBJECTIVES[plan.objective](self.average.module, self.task, batch)) for batch in batches)
                / self.batches
            )

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
            write(
                path,
                lambda partial: torch.save(self.state(), partial),
                "The training goes on without it, and tries again.",
            )
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
            raise GuidanceError(
                f"{shown(path)} belongs to a training with other settings: delete it, or go back to those settings."
            )
        return state

    def damaged(self, path: Path) -> GuidanceError:
        return GuidanceError(f"{path.name} is damaged; delete it to train from the start. It lies in {path.parent}.")

    def require_fitting(self, state: dict[str, Any]) -> None:
        """Raise ValueError, KeyError or TypeError where this training cannot have left a state."""
        expected, found = self.state(), state["optimizer"]["state"]
        moments = {
            i: {"step": torch.zeros(()), "exp_avg": p, "exp_avg_sq": p} for i, p in enumerate(self.network.parameters())
        }
        moments = {i: like for i, like in moments.items() if i in found}  # what has no gradient has none
        pairs = [(state[name], expected[name]) for name in ("network", "average", "best")]
        if not all(same_structure(given, like) for given, like in [*pairs, (found, moments)]):
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


def leads() -> bool:
    """Whether this process is the one that writes and speaks."""
    return not distributed.is_initialized() or distributed.get_rank() == 0


def own_part(size: int) -> slice:
    """This process's rows of a batch."""
    if not distributed.is_initialized():
        return slice(None)
    if size % distributed.get_world_size():
        raise GuidanceError(
            f"A batch of {size} cannot be shared by {distributed.get_world_size()} processes; choose a multiple."
        )
    return slice(distributed.get_rank(), None, distributed.get_world_size())


def fit(training: Training) -> GuidanceNetwork:
    """Train to the end."""
    for _ in training:
        pass
    return training.result()
