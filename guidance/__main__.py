"""Trains a guidance network from collected samples, without ComfyUI. Run in the folder of the pack:

    python -m guidance FOLDER --out likes.safetensors --temperature 0.5
    torchrun --nproc-per-node 8 -m guidance FOLDER --out likes.safetensors --temperature 0.5

It prints its progress, and keeps a checkpoint beside the network until it is done. After an interruption, the same
command continues from the checkpoint. A folder keeps the checkpoints of running trainings, and of the last 3
interrupted ones.
"""

import argparse
import logging
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as distributed

from .data.collection import Collection
from .disk import write
from .errors import GuidanceError, quoted
from .network.file import save_network
from .training.loop import is_main_process
from .training.objectives import Plan
from .training.recipe import BATCH, DATA_OBJECTIVES, WIDTHS, plan_for, prepare, weights_from
from .training.report import Fitting

log = logging.getLogger(__name__)


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    plan = Plan()
    parser = argparse.ArgumentParser(
        "python -m guidance", description="Trains a guidance network from collected samples."
    )
    parser.add_argument(
        "folder",
        type=Path,
        help="collected samples, such as output/guidance_data/NAME of the node Collect Guidance Data",
    )
    parser.add_argument("--out", type=Path, required=True, help="network file to write, for models/guidance_networks")
    parser.add_argument(
        "--temperature",
        type=float,
        default=plan.temperature,
        help="in standard deviations of the reward; smaller values follow it more closely; 0.3 to 2 (%(default)s)",
    )
    parser.add_argument("--steps", type=int, default=plan.steps, help="number of training steps (%(default)s)")
    parser.add_argument("--size", choices=WIDTHS, default="medium", help="size of the network (%(default)s)")
    parser.add_argument("--seed", type=seed, default=plan.seed, help="random seed (%(default)s)")
    parser.add_argument(
        "--objective",
        choices=[name for name in DATA_OBJECTIVES if name != "reward_gradient"],
        default="auto",
        help="loss of the training (%(default)s)",
    )
    parser.add_argument(
        "--batch", type=int, default=BATCH, help="states per step, of all processes together (%(default)s)"
    )
    parser.add_argument(
        "--learning-rate", type=float, default=plan.learning_rate, help="highest learning rate (%(default)s)"
    )
    parser.add_argument(
        "--weights",
        default="",
        help='one weight per collected reward, such as "1, 0.5"; those of the collection if empty',
    )
    parser.add_argument("--device", type=device, help="such as cpu or cuda:1; cuda by default if it is available")
    return parser.parse_args(given)


def seed(text: str) -> int:
    """A seed of 64 bits. Raises ArgumentTypeError."""
    if not 0 <= (number := int(text)) < 2**64:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 2^64 - 1")
    return number


def device(text: str) -> torch.device:
    """A PyTorch device. Raises ArgumentTypeError."""
    try:
        return torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(
            f"PyTorch does not know the device {quoted(text)}; cpu, cuda and cuda:1 are examples"
        ) from error


@contextmanager
def process_group():
    """Joins the processes that torchrun or Accelerate launched."""
    if not distributed.is_torchelastic_launched():
        yield
        return
    distributed.init_process_group()
    try:
        yield
    finally:
        distributed.destroy_process_group()


def device_for(wanted: torch.device | None) -> torch.device:
    """The device to train on. Raises GuidanceError if it is not available."""
    if wanted is None and torch.cuda.is_available():
        return torch.device("cuda", distributed.get_node_local_rank(0))
    if wanted is not None and wanted.type == "cuda" and not torch.cuda.is_available():
        raise GuidanceError("This PyTorch finds no CUDA device: leave --device out.")
    return wanted or torch.device("cpu")


def main(given: list[str] | None = None) -> int:
    options = arguments(given)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        with process_group():
            run(options)
    except GuidanceError as error:
        log.error("%s", error)
        return 1
    except KeyboardInterrupt:
        log.error("Stopped before there was a network to save.")
        return 130
    return 0


def run(options: argparse.Namespace) -> None:
    if options.out.suffix != ".safetensors" or options.out.is_dir():
        raise GuidanceError(f"{options.out} is not a name for a network: it must be a file that ends in .safetensors.")
    if is_main_process():
        require_writable(options.out)
    samples = Collection.open(options.folder.resolve()).load()
    names = ("objective", "temperature", "steps", "batch", "learning_rate", "seed")
    plan = plan_for(samples.description, **{name: getattr(options, name) for name in names})
    fitting = prepare(
        samples,
        plan,
        options.size,
        weights_from(options.weights),
        device_for(options.device),
        options.out.absolute().parent,
    )
    train(fitting)
    if is_main_process():
        outcome = "is lost" if fitting.training.unsaved else "continues from its checkpoint"
        save_network(
            options.out,
            fitting.network(),
            fitting.card(),
            f"Correct that and run the same command again: the training {outcome}.",
        )
        fitting.drop_checkpoint()
        log.info("%s\n%s", fitting.report(), options.out)


def require_writable(out: Path) -> None:
    """Raise GuidanceError if the network file could not be written, before training."""
    probe = out.with_name(f"{out.name}.probe")
    write(probe, lambda partial: partial.write_bytes(b""), "Choose another --out.")
    probe.unlink()


def train(fitting: Fitting) -> None:
    """Train to the end, or until Ctrl-C. Raises KeyboardInterrupt if there is no network yet."""
    if fitting.training.step:
        say(f"continuing at step {fitting.training.step}")
    try:
        for progress in fitting.training:
            if progress.check is not None:
                best = " best" if progress.best else ""
                say(f"step {progress.step}: loss {progress.loss:.4f}, held-out loss {progress.check:.4f}{best}")
    except KeyboardInterrupt:
        if not fitting.training.curve:
            raise


def say(text: str) -> None:
    """Print a message once for all processes."""
    if is_main_process():
        log.info("%s", text)


if __name__ == "__main__":
    sys.exit(main())
