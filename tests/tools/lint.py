"""Style and types: `make lint`."""

import os
import subprocess
import sys

from ..harness.environment import CHECKOUT, cache, comfyui

PACKAGES = ("guidance", "nodes", "tests.harness", "tests.tools")


def main() -> int:
    return ruff() or mypy()


def ruff() -> int:
    return subprocess.run([sys.executable, "-m", "ruff", "check", str(CHECKOUT)]).returncode


def mypy() -> int:
    """Through a link named reward_guidance, because the checkout's own name need not be an identifier."""
    named = cache() / "typing" / "reward_guidance"
    named.parent.mkdir(parents=True, exist_ok=True)
    named.unlink(missing_ok=True)
    named.symlink_to(CHECKOUT, target_is_directory=True)
    packages = [part for package in PACKAGES for part in ("-p", f"reward_guidance.{package}")]
    options = ["--config-file", str(CHECKOUT / "pyproject.toml"), "--cache-dir", str(cache() / "mypy")]
    environment = {**os.environ, "MYPYPATH": str(comfyui())}
    return subprocess.run(
        [sys.executable, "-m", "mypy", *options, *packages], cwd=named.parent, env=environment
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
