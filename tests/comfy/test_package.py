"""What the registry would get: packed by its own command, read as its scanners read it, and run from a folder of another name."""

import ast
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image
from reward_guidance.tests.harness import comfy, environment, models
from reward_guidance.tests.harness.client import Client
from reward_guidance.tests.harness.environment import CHECKOUT
from reward_guidance.tests.harness.guided import Bench, latents, one_box

FOLDER = "Reward_Guidance-main"
"""Neither the project's name nor an identifier. (ComfyUI serves no web files of folders whose names have spaces or brackets.)"""
SHIPPED = {
    "__init__.py",
    "CHANGELOG.md",
    "LICENSE",
    "README.md",
    "pyproject.toml",
    "requirements.txt",
    "guidance",
    "nodes",
}
SHIPPED |= {"workflows", "subgraphs", "locales"}
ALARMING = re.compile(
    r"\b(os\.environ|getenv|putenv|subprocess|os\.system|popen|pickle|marshal|shelve|dill|importlib|__import__|ctypes"
    r"|sqlite3|b64decode|urllib|urlopen|http\.client|requests\.\w|socket\.\w)"
    r"|(?<![.\w])(eval|exec|compile)\(|new Function|XMLHttpRequest|document\.cookie|torch\.load\((?!.*weights_only=True)",
    re.IGNORECASE,
)
"""What the registry's scanner was seen to flag in code, comments included, and other ways to run code, to read the
environment or to reach the network. The only scan of the project: it reads what ships, JavaScript too."""
CODE = {".py", ".js"}
MEGABYTES = 5


def git(folder: Path, *words: str) -> str:
    return subprocess.run(["git", *words], cwd=folder, check=True, capture_output=True, text=True).stdout


def comfy_node(folder: Path, word: str) -> str:
    """What `comfy node WORD` says; its settings stay beside the folder."""
    command = [str(environment.tool("comfy-cli") / "comfy"), "--skip-prompt", "--no-json", "node", word]
    answer = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env={**comfy.isolated(), "HOME": str(folder.parent)}
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return answer.stdout + answer.stderr


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """The checkout as it would be committed, with a history of its own."""
    try:
        names = git(CHECKOUT, "ls-files", "--cached", "--others", "--exclude-standard").splitlines()
    except subprocess.CalledProcessError:
        pytest.skip("not a git checkout")
    folder = tmp_path_factory.mktemp("repository") / "pack"
    for name in names:
        if (CHECKOUT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(CHECKOUT / name, folder / name)
    git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    return folder


@pytest.fixture(scope="module")
def archive(repository) -> Path:
    comfy_node(repository, "pack")
    return repository / "node.zip"


@pytest.fixture(scope="module")
def pack(archive) -> Path:
    """The archive, unpacked."""
    folder = archive.parent.parent / FOLDER
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(folder)
    return folder


def names_in(pack: Path) -> list[str]:
    return sorted(path.relative_to(pack).as_posix() for path in pack.rglob("*") if path.is_file())


def project() -> dict:
    return pytest.importorskip("tomllib").loads((CHECKOUT / "pyproject.toml").read_text())


def test_the_registry_has_nothing_to_complain_of(repository):
    said = comfy_node(repository, "validate")
    assert "All validation checks passed" in said
    assert "warning" not in said.lower()


def test_only_the_pack_ships(pack, archive):
    names = names_in(pack)
    assert {name.split("/")[0] for name in names} == SHIPPED
    own = [
        path.relative_to(CHECKOUT).as_posix()
        for folder in ("guidance", "nodes")
        for path in (CHECKOUT / folder).rglob("*.py")
    ]
    assert {name for name in names if name.endswith(".py")} == {"__init__.py", *own}
    assert archive.stat().st_size < MEGABYTES * 1e6


def alarms(text: str) -> list[str]:
    return [line for line in text.splitlines() if ALARMING.search(line)]


def test_nothing_that_ships_alarms_a_scanner(pack):
    found = {name: alarms((pack / name).read_text()) for name in names_in(pack) if Path(name).suffix in CODE}
    assert {name: lines for name, lines in found.items() if lines} == {}


def test_alarms_go_off():
    bad = [
        "import pickle",
        "import shelve",
        "import http.client",
        "torch.load(f)",
        "x = eval('1')",
        "os.environ['A']",
        "requests.get(u)",
        "new Function('x')",
        "# subprocess",
    ]
    assert alarms("\n".join(bad)) == bad
    assert alarms("torch.load(f, weights_only=True)\nmodel.eval()\nre.compile(x)\nrequests = 2\n") == []


def requirements(file: Path) -> dict[str, Requirement]:
    lines = (line.split("#")[0].strip() for line in file.read_text().splitlines())
    return {canonicalize_name(Requirement(line).name): Requirement(line) for line in lines if line and line[0] != "-"}


def test_dependencies_leave_comfyui_its_own():
    """A package of ComfyUI's has no bound but a lower one, and only if ComfyUI pins a version, which must meet it."""
    theirs = requirements(environment.comfyui() / "requirements.txt")
    ours = requirements(CHECKOUT / "requirements.txt")
    assert theirs.keys() >= environment.COMFYUI_BRINGS
    assert ours["comfyui-frontend-package"].specifier
    assert not {"torch", "torchvision", "torchaudio"} & ours.keys()
    for name in ours.keys() & theirs.keys():
        if ours[name].specifier:
            (bound,), (pin,) = ours[name].specifier, theirs[name].specifier
            assert (bound.operator, pin.operator) == (">=", "=="), name
            assert pin.version in ours[name].specifier, name


@pytest.mark.parametrize(("name", "shape"), [("Icon", (1, 1)), ("Banner", (21, 9))])
def test_pictures_of_the_registry(name, shape):
    place = project()["tool"]["comfy"][name].split("/main/")[1]
    with Image.open(CHECKOUT / place) as picture:
        width, height = picture.size
    assert width * shape[1] == height * shape[0]
    assert name == "Banner" or width <= 400


def test_the_id_is_one_that_the_registry_takes():
    name, version = project()["project"]["name"], project()["project"]["version"]
    assert re.fullmatch("[a-z]+(-[a-z]+)*", name)
    assert "comfyui" not in name
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)


def called(node: ast.expr) -> str:
    """`ComfyNode` and `io.ComfyNode` are alike."""
    return getattr(node, "attr", None) or getattr(node, "id", "")


def literal_id(define_schema: ast.FunctionDef) -> str | None:
    """Of the first Schema call that has one."""
    calls = [call for call in ast.walk(define_schema) if isinstance(call, ast.Call) and called(call.func) == "Schema"]
    values = [keyword.value for call in calls for keyword in call.keywords if keyword.arg == "node_id"]
    return next(
        (value.value for value in values if isinstance(value, ast.Constant) and isinstance(value.value, str)), None
    )


def scanned_ids(code: str) -> set[str]:
    """Node ids as scanner.py 2.0.13 in ComfyUI-Manager's repository finds them without running anything. No release of comfyui-manager has it in it.

    A base called ComfyNode makes a class a node; its id is a literal node_id in define_schema, or where there is none the class's own name.
    """
    classes = [
        each
        for each in ast.walk(ast.parse(code))
        if isinstance(each, ast.ClassDef) and "ComfyNode" in map(called, each.bases)
    ]
    ids = set()
    for each in classes:
        schemas = [item for item in each.body if isinstance(item, ast.FunctionDef) and item.name == "define_schema"]
        ids.add(next(filter(None, map(literal_id, schemas)), each.name))
    return ids


OLDER_KINDS = re.compile(r"""_CLASS_MAPPINGS|NODE_CONFIG|@register_node\(|"\w+"\s*:\s*{"class":""")
"""By what else that scanner takes something for a node."""
SCANNED = {
    "class A(io.ComfyNode):\n def define_schema(cls):\n  return io.Schema(node_id='Literal')": {"Literal"},
    "class A(ComfyNode):\n def define_schema(cls):\n  s = Schema(node_id='Literal')\n  return s": {"Literal"},
    "class A(io.ComfyNode):\n def define_schema(cls):\n  return io.Schema(node_id=ID)": {"A"},
    "class A(io.ComfyNode):\n def schema(cls):\n  return io.Schema(node_id='Literal')": {"A"},
    "class A(Base):\n def define_schema(cls):\n  return io.Schema(node_id='Literal')": set(),
}


@pytest.mark.parametrize(("code", "ids"), SCANNED.items())
def test_only_literal_ids_of_plain_nodes_are_found_by_reading(code, ids):
    assert scanned_ids(code) == ids


FORMER = "RewardGuidanceFormerStatistic"
"""A node that never was, in the place of one that goes."""


@pytest.fixture(scope="module")
def elsewhere(pack, tmp_path_factory):
    """A ComfyUI with nothing but the archive, in a folder of another name, and with a node that another replaces."""
    pack = shutil.copytree(pack, tmp_path_factory.mktemp("elsewhere") / FOLDER)
    with open(pack / "nodes" / "wiring" / "replacements.py", "a") as table:
        table.write(f"REPLACEMENTS.append(io.NodeReplace('RewardGuidanceImageStatistic', {FORMER!r}))\n")
    base = environment.cache() / "work" / "package"
    models.link_models(base / "models", models.format_standins())
    shutil.rmtree(base / "custom_nodes", ignore_errors=True)
    with comfy.serve(base, variables={"OMP_NUM_THREADS": "1"}, packs={FOLDER: pack}) as server:
        yield Client(server.url)


def test_every_node_is_found_with_and_without_running(elsewhere, pack):
    served = {
        name for name, info in elsewhere.object_info().items() if info["python_module"] == f"custom_nodes.{FOLDER}"
    }
    assert served
    code = [(pack / name).read_text() for name in names_in(pack) if name.endswith(".py")]
    assert set().union(*map(scanned_ids, code)) == served
    assert not any(map(OLDER_KINDS.search, code))


def test_a_node_that_is_gone_is_replaced(elsewhere):
    (listed,) = elsewhere.get("/node_replacements")[FORMER]
    assert listed["new_node_id"] == "RewardGuidanceImageStatistic"


def test_it_runs_from_another_folder(elsewhere):
    result = Bench(elsewhere).run(latents("sd15", one_box(decoder="latent_rgb")))
    assert len(result.outputs["sampler"]["reward_guidance"]) == 2
    assert Bench(elsewhere).latent(result).isfinite().all()


def test_what_the_page_asks_for_is_served(elsewhere):
    own = f"/extensions/{FOLDER}"
    assert f"{own}/curve.js" in elsewhere.get("/extensions")
    for name in ("curve.js", "docs/RewardGuidance.md", "docs/RewardGuidance/zh.md", "docs/temperature.png"):
        assert elsewhere.fetch(f"{own}/{name}")
    assert {"en", "zh"} <= {
        language for language, words in elsewhere.get("/i18n").items() if "RewardGuidance" in words.get("nodeDefs", {})
    }
    workflows = {path.stem for path in (CHECKOUT / "workflows").glob("*.json")}
    assert set(elsewhere.get("/workflow_templates")[FOLDER]) == workflows
    for name in workflows:
        assert elsewhere.fetch(f"/api/workflow_templates/{FOLDER}/{name}.jpg").startswith(b"\xff\xd8")
    blueprints = {
        entry["name"]
        for entry in elsewhere.get("/global_subgraphs").values()
        if entry["info"]["node_pack"] == f"custom_nodes.{FOLDER}"
    }
    assert blueprints == {path.stem for path in (CHECKOUT / "subgraphs").glob("*.json")}
