"""Setting up: what is unfit is said in a sentence, what was interrupted is redone, what is whole is kept."""

import sys
from types import SimpleNamespace

import pytest
from reward_guidance.tests.harness import environment
from reward_guidance.tests.harness.environment import UnfitError


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """An empty cache, a ComfyUI with requirements, and a pip that only writes down what it is asked."""
    comfyui = tmp_path / "ComfyUI"
    comfyui.mkdir()
    (comfyui / "main.py").touch()
    (comfyui / "requirements.txt").write_text("torch\n")
    for name in ("COMFYUI_VERSION", "REWARD_GUIDANCE_TORCH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COMFYUI_DIR", str(comfyui))
    monkeypatch.setenv("REWARD_GUIDANCE_CACHE", str(tmp_path / "cache"))
    installed = []

    def make_venv(env):
        (env / "bin").mkdir(parents=True)
        (env / "bin" / "python").touch()

    monkeypatch.setattr(environment, "make_venv", make_venv)
    monkeypatch.setattr(environment, "pip", lambda env, *arguments: installed.append((env, arguments)))
    return SimpleNamespace(comfyui=comfyui, installed=installed)


def free(gigabytes, monkeypatch):
    monkeypatch.setattr(environment.shutil, "disk_usage", lambda path: SimpleNamespace(free=gigabytes * 1e9))


def test_second_time_nothing_is_installed(machine):
    python = environment.set_up()
    assert environment.set_up() == python
    assert len(machine.installed) == 1
    assert "torch==2.11.0" in machine.installed[0][1]


def test_environment_follows_the_content_of_the_requirements(machine):
    before = environment.set_up()
    (machine.comfyui / "requirements.txt").write_text("torch\neinops\n")
    assert environment.set_up() != before
    (machine.comfyui / "requirements.txt").write_text("torch\n")
    assert environment.set_up() == before
    assert len(machine.installed) == 2


def test_interrupted_set_up_is_redone(machine, monkeypatch):
    def interrupted(env, *arguments):
        (env / "half").touch()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(environment, "pip", interrupted)
        environment.set_up()
    env = environment.set_up().parents[1]
    assert not (env / "half").exists()
    assert (env / "complete").exists()


def test_own_torch_is_respected(machine, monkeypatch):
    monkeypatch.setenv("REWARD_GUIDANCE_TORCH", "torch==2.7.0 torchvision")
    environment.set_up()
    assert machine.installed[0][1][1:3] == ("torch==2.7.0", "torchvision")


def test_comfyui_around_the_checkout_is_used(machine, monkeypatch):
    monkeypatch.delenv("COMFYUI_DIR")
    checkout = machine.comfyui / "custom_nodes" / "reward-guidance"
    monkeypatch.setattr(environment, "CHECKOUT", checkout)
    assert environment.comfyui() == machine.comfyui
    (machine.comfyui / "main.py").unlink()
    assert environment.comfyui() == environment.cache() / "comfyui-0.30.0"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda patch: patch.setattr(environment, "OLDEST_PYTHON", (9, 9)), "too old: 9.9 is needed"),
        (lambda patch: patch.setattr(environment, "fcntl", None), "WSL"),
        (lambda patch: patch.setitem(sys.modules, "ensurepip", None), "python3-venv"),
        (lambda patch: free(3, patch), "3 GB free; 12 are needed"),
        (lambda patch: patch.setenv("COMFYUI_DIR", "/nowhere"), "no main.py in it"),
        (lambda patch: (patch.delenv("COMFYUI_DIR"), patch.setenv("COMFYUI_VERSION", "0.1")), "known are 0.30.0"),
    ],
)
def test_what_is_unfit_is_said(machine, monkeypatch, change, words):
    change(monkeypatch)
    with pytest.raises(UnfitError, match=words):
        environment.set_up()


@pytest.mark.parametrize(
    ("line", "notice"),
    [
        ("  Downloading torch-2.11.0-cp311-cp311-manylinux_2_28_x86_64.whl (530.6 MB)\n", "downloading torch (531 MB)"),
        ("  Downloading packaging-24.0-py3-none-any.whl (53 kB)\n", None),
        ("Installing collected packages: a, b, c\n", "installing 3 packages"),
        ("Collecting torch==2.11.0\n", None),
    ],
)
def test_pip_is_condensed(line, notice):
    assert environment.condense(line) == notice
