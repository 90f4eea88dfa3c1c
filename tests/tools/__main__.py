"""`python tests/tools demo` runs the module demo of this folder, under the name that tests/conftest.py gives the checkout."""

import runpy
import sys
from pathlib import Path

sys.path.pop(0)  # so that no module of this folder hides a package of the same name
runpy.run_path(str(Path(__file__).parents[1] / "conftest.py"))
sys.argv = sys.argv[1:]
runpy.run_module(f"reward_guidance.tests.tools.{sys.argv[0]}", run_name="__main__", alter_sys=True)
