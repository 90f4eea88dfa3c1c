"""One of several processes that collect: it says that it is ready, and of every line it is given, how many seconds some samples took.

usage: python tests/bench/cost/collector.py FAMILY PIXELS SAMPLES [--reduced]
"""

import argparse
import sys
import time
from pathlib import Path

sys.path[:1] = [str(Path(__file__).parents[2])]
from bench.cost import pack

pack.use()

from harness.inprocess import load_comfyui

load_comfyui()

from bench.cost.clock import wait
from bench.cost.training import collected
from bench.cost.world import World


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family")
    parser.add_argument("pixels", type=int)
    parser.add_argument("samples", type=int)
    parser.add_argument("--reduced", action="store_true")
    arguments = parser.parse_args()
    world = World(arguments.family, arguments.reduced)
    collected(world, arguments.pixels)
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.monotonic()
        for _ in range(arguments.samples):
            collected(world, arguments.pixels)
        wait()
        print(f"seconds {time.monotonic() - start}", flush=True)


if __name__ == "__main__":
    main()
