"""Trains a guidance network from collected samples, without ComfyUI. In the folder of the pack:

    python -m guidance FOLDER --out likes.safetensors --temperature 0.5
    torchrun --nproc-per-node 8 -m guidance FOLDER --out likes.safetensors --temperature 0.5

It prints how it goes, and leaves a checkpoint beside the network until it is done: the same command goes on after whatever stopped it.
A folder keeps the checkpoints of trainings that run, and of the last 3 that were stopped.
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
from .training.loop import leads
from .training.objectives import Plan
from .training.recipe import BATCH, DATA_OBJECTIVES, WIDTHS, plan_for, prepare, weights_from
from .training.report import Fitting

log = logging.getLogger(__name__)


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    plan = Plan()
    parser = argparse.ArgumentParser(
        "python -m guidance", description="Trains a guidance network from collected samples."
    )
    parser.add_argument("folder", type=Path, help="what Collect Guidance Data made: output/guidance_data/NAME")
    parser.add_argument("--out", type=Path, required=True, help="the network to write, for models/guidance_networks")
    parser.add_argument(
        "--temperature", type=float, default=plan.temperature, help="in standard deviations of the reward; 0.3 to 2"
    )
    parser.add_argument("--steps", type=int, default=plan.steps, help="of training")
    parser.add_argument("--size", choices=WIDTHS, default="medium", help="of the network")
    parser.add_argument("--seed", type=seed, default=plan.seed)
    parser.add_argument(
        "--objective", choices=[name for name in DATA_OBJECTIVES if name != "reward_gradient"], default="auto"
    )
    parser.add_argument("--batch", type=int, default=BATCH, help="states a step, shared by all processes")
    parser.add_argument("--learning-rate", type=float, default=plan.learning_rate)
    parser.add_argument("--weights", default="", help='one for each reward that was collected, such as "1, 0.5"')
    parser.add_argument("--device", type=device, help="cuda where there is one, if nothing is said")
    return parser.parse_args(given)


def seed(text: str) -> int:
    if not 0 <= (number := int(text)) < 2**64:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 2^64 - 1")
    return number


def device(text: str) -> torch.device:
    try:
        return torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(
            f"PyTorch knows no device {quoted(text)}: cpu, cuda and cuda:1 are such"
        ) from error


@contextmanager
def process_group():
    """What torchrun and Accelerate launch works together."""
    if not distributed.is_torchelastic_launched():
        yield
        return
    distributed.init_process_group()
    try:
        yield
    finally:
        distributed.destroy_process_group()


def device_for(wanted: torch.device | None) -> torch.device:
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
        log.error("Stopped before there was a network to keep.")
        return 130
    return 0


def run(options: argparse.Namespace) -> None:
    if options.out.suffix != ".safetensors" or options.out.is_dir():
        raise GuidanceError(f"{options.out} is not a name for a network: it is a file that ends in .safetensors.")
    if leads():
        require_writable(options.out)
    samples = Collection.open(options.folder.resolve()).load()
    asked = {
        name: getattr(options, name) for name in ("objective", "temperature", "steps", "batch", "learning_rate", "seed")
    }
    plan = plan_for(samples.description, **asked)
    fitting = prepare(
        samples,
        plan,
        options.size,
        weights_from(options.weights),
        device_for(options.device),
        options.out.absolute().parent,
    )
    train(fitting)
    if leads():
        goes_on = "is lost" if fitting.training.unsaved else "goes on from its checkpoint"
        save_network(
            options.out,
            fitting.network(),
            fitting.card(),
            f"Mend that and run the same command again: the training {goes_on}.",
        )
        fitting.drop_checkpoint()
        log.info("%s\n%s", fitting.report(), options.out)


def require_writable(out: Path) -> None:
    """Raise GuidanceError where no network could be written, before one is trained."""
    probe = out.with_name(f"{out.name}.probe")
    write(probe, lambda partial: partial.write_bytes(b""), "Choose another --out.")
    probe.unlink()


def train(fitting: Fitting) -> None:
    """To the end, or to Ctrl-C once there is a network to keep."""
    if fitting.training.step:
        say(f"going on at step {fitting.training.step}")
    try:
        for progress in fitting.training:
            if progress.check is not None:
                say(
                    f"step {progress.step}: loss {progress.loss:.4f}, on held-out samples {progress.check:.4f}{' best' if progress.best else ''}"
                )
    except KeyboardInterrupt:
        if not fitting.training.curve:
            raise


def say(text: str) -> None:
    if leads():
        log.info("%s", text)


if __name__ == "__main__":
    sys.exit(main())
