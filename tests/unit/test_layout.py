"""What the layout promises: guidance/ is plain PyTorch, the pack finds itself by relative imports, and what ships is harmless."""

import ast
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from reward_guidance.guidance.rewards import Reward
from reward_guidance.tests.harness.environment import CHECKOUT, COMFYUI_BRINGS

COMFYUI = {
    "comfy",
    "comfy_api",
    "comfy_execution",
    "comfy_extras",
    "execution",
    "folder_paths",
    "latent_preview",
    "nodes",
    "server",
}
BLOCKED = """
import sys, types
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names}:
            raise ImportError(name + " is ComfyUI's")
sys.meta_path.insert(0, Blocker())
package = types.ModuleType("reward_guidance")
package.__path__ = [{checkout!r}]
sys.modules["reward_guidance"] = package
import importlib
for module in {modules}:
    importlib.import_module("reward_guidance." + module)
"""


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((CHECKOUT / folder).rglob("*.py"))]


SHIPPED_SOURCES = [CHECKOUT / "__init__.py", *sources("guidance", "nodes")]


def name_of(path: Path) -> str:
    return path.relative_to(CHECKOUT).as_posix()


def imports(path: Path) -> list[tuple[str, int]]:
    """(module, level) of every import in a file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, 0) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.module or "", node.level))
    return found


def test_guidance_imports_without_comfyui():
    modules = [
        name_of(path).removesuffix(".py").replace("/", ".").removesuffix(".__init__") for path in sources("guidance")
    ]
    modules = [module for module in modules if not module.endswith("__main__")]
    code = BLOCKED.format(names=COMFYUI, checkout=str(CHECKOUT), modules=modules)
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=CHECKOUT / "tests")
    assert answer.returncode == 0, answer.stderr


@pytest.mark.parametrize("path", sources("guidance"), ids=name_of)
def test_guidance_names_no_comfyui(path):
    absolute = {module.split(".")[0] for module, level in imports(path) if level == 0}
    assert not absolute & COMFYUI


@pytest.mark.parametrize("path", sources("guidance"), ids=name_of)
def test_guidance_stays_within_itself(path):
    depth = len(path.relative_to(CHECKOUT / "guidance").parts)
    assert all(level <= depth for _, level in imports(path))


@pytest.mark.parametrize("path", SHIPPED_SOURCES, ids=name_of)
def test_own_modules_are_imported_relatively(path):
    """`nodes` alone is ComfyUI's nodes.py."""
    assert not {module.split(".")[0] for module, level in imports(path) if level == 0} & {
        "guidance",
        "reward_guidance",
        "tests",
    }


FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
NETWORK, PROCESS = {"requests", "urllib", "socket", "http", "sqlite3"}, {"subprocess", "importlib", "ctypes"}
FORBIDDEN_MODULES = {"pickle", "marshal", "shelve", "dill"} | NETWORK | PROCESS


def trespasses(tree: ast.AST) -> list[str]:
    """What a registry's scanner or a cautious reader would stop at."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            safe = any(option.arg == "weights_only" and ast.unparse(option.value) == "True" for option in node.keywords)
            if name in FORBIDDEN_CALLS or name in ("os.system", "os.popen") or (name == "torch.load" and not safe):
                found.append(ast.unparse(node))
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.environ", "os.getenv", "os.putenv"):
            found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("path", SHIPPED_SOURCES, ids=name_of)
def test_shipped_code_is_harmless(path):
    assert trespasses(ast.parse(path.read_text())) == []
    assert not {module.split(".")[0] for module, _ in imports(path)} & FORBIDDEN_MODULES


def test_trespasses_are_found():
    bad = "torch.load(f)\ntorch.load(f, weights_only=False)\neval('1')\nos.environ['A']\nos.system('ls')"
    assert len(trespasses(ast.parse(bad))) == 5
    assert trespasses(ast.parse("torch.load(f, weights_only=True)\nmodel.eval()\nos.path.join(a)")) == []


BROUGHT_BY = {"timm": "open-clip-torch"}
"""Imported packages that requirements.txt does not list -> the listed package that requires them."""
FRONTEND = "comfyui-frontend-package"
"""The scripts of nodes/web import it, not the Python code."""


def listed() -> set[str]:
    lines = (CHECKOUT / "requirements.txt").read_text().splitlines()
    return {canonicalize_name(Requirement(line).name) for line in lines}


def imported() -> set[str]:
    """The packages whose modules the shipped code imports, without ComfyUI and the standard library."""
    modules = {
        module.split(".")[0] for path in SHIPPED_SOURCES for module, level in imports(path) if module and level == 0
    }
    packages = metadata.packages_distributions()
    external = modules - COMFYUI - sys.stdlib_module_names
    return {canonicalize_name(name) for module in external for name in packages.get(module, [module])}


def test_every_imported_package_is_listed():
    assert imported() - COMFYUI_BRINGS - set(BROUGHT_BY) - listed() == set()


def test_every_listed_package_is_imported():
    assert listed() - {FRONTEND} - imported() == set()
    scripts = (path.read_text() for path in (CHECKOUT / "nodes" / "web").glob("*.js"))
    assert any('from "../../scripts/app.js"' in script for script in scripts)


def test_no_exception_from_the_list_is_out_of_date():
    assert COMFYUI_BRINGS | set(BROUGHT_BY) <= imported() - listed()


@pytest.mark.parametrize(("package", "source"), BROUGHT_BY.items())
def test_a_listed_package_requires_those_that_are_not_listed(package, source):
    assert source in listed()
    required = map(Requirement, metadata.requires(source) or [])
    assert package in {canonicalize_name(each.name) for each in required if each.marker is None}


def test_dependencies_are_written_alike():
    required = (CHECKOUT / "requirements.txt").read_text().split()
    line = next(
        line for line in (CHECKOUT / "pyproject.toml").read_text().splitlines() if line.startswith("dependencies")
    )
    assert ast.literal_eval(line.split("=", 1)[1].strip()) == required
    assert not any(name.startswith(("torch", "Pillow", "aiohttp")) for name in required)


def test_the_documented_reward_is_the_tested_one():
    shown = (
        (CHECKOUT / "nodes" / "web" / "docs" / "your_own_reward.md").read_text().split("```python\n")[1].split("```")[0]
    )
    tested = (CHECKOUT / "tests" / "packs" / "redness" / "__init__.py").read_text()
    assert tested.endswith(shown)


def test_the_documented_attributes_are_those_that_are_read():
    table = (CHECKOUT / "nodes" / "web" / "docs" / "your_own_reward.md").read_text().split("| attribute |")[1]
    names = re.findall(
        r"`(\w+)", "\n".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| `"))
    )
    assert len(names) >= 7
    assert [name for name in names if not hasattr(Reward, name)] == []
