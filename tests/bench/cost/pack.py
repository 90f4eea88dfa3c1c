"""Packs what a machine with a GPU and no registry lacks for this benchmark into .gpu, a folder of the checkout that git ignores.

    make bench-gpu-pack
    python tests/bench/cost/pack.py [--prove]

It holds ComfyUI's source and the packages that ComfyUI and the rewards import and machine.txt, what such a machine has, does not name.
Carry it there with the checkout: `python tests/bench/cost --profile gpu` finds it by itself. `--prove` runs the trial profile on the CPU in
an environment that has nothing but those packages of this one that machine.txt names, and what these require.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import Distribution, distributions, version
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[3]
PACK = CHECKOUT / ".gpu"
CARRIED = ("comfy-aimdo", "comfy-kitchen", "torchsde", "trampoline", "open_clip_torch", "ftfy", "wcwidth")
"""Each has a wheel for every Python; comfy-kitchen's is the one without kernels of its own."""
PLATFORM = [
    "--python-version",
    "3.12",
    "--implementation",
    "cp",
    "--platform",
    "manylinux_2_17_x86_64",
    "--platform",
    "manylinux2014_x86_64",
]
UNREAD = {
    "models",
    "tests",
    "tests-unit",
    "blueprints",
    "comfy_api_nodes",
    "input",
    "output",
    "temp",
    "user",
    "custom_nodes",
}
"""Folders of ComfyUI's."""
LARGEST = 100_000
"""Bytes of a file of ComfyUI's that is not source; the others are vocabularies of text encoders, which nothing here reads."""
MEGABYTES = 64


def use() -> None:
    """Find what is in the pack, if there is one, behind what is installed."""
    if PACK.is_dir():
        site = str(PACK / "site")
        os.environ.setdefault("COMFYUI_DIR", str(PACK / "comfyui"))
        sys.path.append(site)


def fill() -> None:
    sys.path.append(str(CHECKOUT / "tests"))
    from harness.environment import comfyui

    shutil.rmtree(PACK, ignore_errors=True)
    shutil.copytree(comfyui(), PACK / "comfyui", ignore=needless)
    for package in CARRIED:
        platform = ["--platform", "any"] if package == "comfy-kitchen" else PLATFORM
        where = ["--target", str(PACK / "site"), "--no-compile", "--no-deps", "--only-binary=:all:", "--upgrade"]
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "-q", *where, *platform, f"{package}=={version(package)}"],
            check=True,
        )


def needless(folder: str, names: list[str]) -> set[str]:
    """Of a folder of ComfyUI's, what the benchmark does not import."""
    too_large = {
        name
        for name in names
        if not name.endswith(".py") and Path(folder, name).is_file() and Path(folder, name).stat().st_size > LARGEST
    }
    return too_large | {"__pycache__"} | (UNREAD if "main.py" in names else set())


def size() -> float:
    return sum(path.stat().st_size for path in PACK.rglob("*") if path.is_file()) / 2**20


# --- the proof


def prove() -> int:
    """Whether anything but particles could not be measured; for these, ComfyUI's nodes want packages that are too large to carry."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            bare(Path(folder, "bare")),
            str(Path(__file__).parent),
            "--profile",
            "trial",
            "--seconds",
            "1500",
            "--out",
            folder,
        ]
        subprocess.run(command, check=True, env={"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"})
        missed = json.loads(Path(folder, "cost_trial.json").read_text())["left out"]
    return int(any(not what.startswith("particles: ModuleNotFoundError") for what in missed))


def bare(folder: Path) -> str:
    """The Python of an environment with links to the packages that the machine has, and to nothing else."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    site = next(folder.glob("lib/python*/site-packages"))
    here, found = {plain(distribution.name): distribution for distribution in distributions()}, set[str]()
    wanted = [plain(name) for name in Path(__file__).with_name("machine.txt").read_text().split()]
    while wanted:
        name = wanted.pop()
        if name in here and name not in found:
            found.add(name)
            link(here[name], site)
            wanted += required(here[name])
    return str(folder / "bin" / "python")


def required(distribution: Distribution) -> list[str]:
    """Where this version of a package needs another that the machine's does not."""
    needs = [need for need in distribution.requires or () if "extra ==" not in need]
    return [plain(re.split(r"[^\w.-]", need)[0]) for need in needs]


def link(distribution: Distribution, site: Path) -> None:
    for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
        target = site / top
        if not target.exists():
            target.symlink_to(str(distribution.locate_file(top)))


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prove", action="store_true", help="run the trial profile with it in a bare environment")
    proof = parser.parse_args().prove
    fill()
    print(f"{PACK}: {size():.0f} MiB")
    if size() > MEGABYTES:
        print(f"That is more than {MEGABYTES} MiB.")
        return 1
    return prove() if proof else 0


if __name__ == "__main__":
    sys.exit(main())
