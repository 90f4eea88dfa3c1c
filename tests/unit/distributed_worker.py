"""Trains a small network under torch.distributed and saves it; run by torch.distributed.run."""

import os
import runpy
import sys
from pathlib import Path

runpy.run_path(str(Path(__file__).parents[1] / "conftest.py"))

import torch
import torch.distributed as distributed

sys.path.insert(0, str(Path(__file__).parent))
from test_training import fit, training

torch.set_num_threads(1)
distributed.init_process_group("gloo")
network = fit(training(steps=20))
if int(os.environ["RANK"]) == 0:
    torch.save(network.state_dict(), sys.argv[1])
distributed.destroy_process_group()
