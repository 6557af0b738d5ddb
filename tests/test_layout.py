"""The shape of the repository: where files may be, how long they may grow, and what importing costs."""

import ast
import importlib
import json
import pkgutil
import re
import statistics
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

import holofunc

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "holofunc").rglob("*.py"))
PYTHON = [*SOURCES, *sorted((ROOT / "tests").rglob("*.py")), *sorted((ROOT / "examples").rglob("*.py"))]
TOP = {
    ".ci", ".gitignore", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "README.md", "docs", "examples", "holofunc",
    "mkdocs.yml", "pyproject.toml", "tests",
}  # fmt: skip
NOT_ROOMS = {"cli", "config"}  # the command line, run and not imported


def tracked():
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return done.stdout.splitlines()


def bodies(path):
    """Lines of each function without its docstring."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
            yield node.end_lineno - first.lineno + 1, f"{path.relative_to(ROOT)}:{node.name}"


# --- files -------------------------------------------------------------------------------------------------------


def test_top_level_is_known():
    assert {path.split("/")[0] for path in tracked()} <= TOP


def test_folders_are_two_levels_deep():
    assert [path for path in tracked() if path.startswith("holofunc/") and path.count("/") > 2] == []


def test_no_drawers():
    drawers = {"utils", "util", "helpers", "helper", "common", "misc"}
    assert [path for path in SOURCES if path.stem.strip("_") in drawers] == []


def test_files_stay_short():
    lengths = {path: len(path.read_text().splitlines()) for path in PYTHON}
    assert {str(path): n for path, n in lengths.items() if n > 600} == {}
    tenth = statistics.quantiles([lengths[path] for path in SOURCES], n=10)[-1]
    assert tenth <= 400, "more than a tenth of the sources are longer than 400 lines"


def test_functions_stay_short():
    lengths = [body for path in SOURCES for body in bodies(path)]
    assert [body for body in lengths if body[0] > 80] == []
    assert statistics.quantiles([n for n, _ in lengths], n=10)[-1] <= 40, "more than a tenth are longer than 40 lines"


# --- modules -----------------------------------------------------------------------------------------------------


def test_every_room_is_exported():
    rooms = {module.name for module in pkgutil.iter_modules(holofunc.__path__)} - {"__main__"} - NOT_ROOMS
    names = {name for name in holofunc.__all__ if name not in ("Model", "__version__", "from_module", "jit", "lift")}
    assert names == rooms
    assert holofunc.__all__ == sorted(holofunc.__all__)
    assert dir(holofunc) == holofunc.__all__


def test_type_checkers_see_what_is_exported():
    module = ast.parse((ROOT / "holofunc/__init__.py").read_text())
    block = next(node for node in module.body if isinstance(node, ast.If))
    imported = {alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert imported | {"__version__"} == set(holofunc.__all__)


@pytest.mark.parametrize(
    "path", [p for p in SOURCES if p.name != "__main__.py"], ids=lambda p: str(p.relative_to(ROOT))
)
def test_public_names_exist(path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    module = importlib.import_module(name)
    if name == "holofunc":
        return
    assert sorted(set(module.__all__)) == sorted(module.__all__)
    assert [public for public in module.__all__ if not hasattr(module, public)] == []


def test_contributing_shows_the_layers_that_are_enforced():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    enforced = [re.sub(r"[() ]", "", layer) for layer in contracts[0]["layers"]]
    shown = (ROOT / "CONTRIBUTING.md").read_text().split("```text\n")[1].split("\n```")[0]
    assert shown.replace(" ", "").split("\n") == enforced


def test_init_files_only_reexport():
    allowed = (ast.Import, ast.ImportFrom, ast.Assign)
    for path in SOURCES:
        if path.name == "__init__.py" and path.parent.name != "holofunc":
            statements = ast.parse(path.read_text()).body[1:]  # after the docstring
            assert [ast.unparse(s) for s in statements if not isinstance(s, allowed)] == [], path


# --- imports -----------------------------------------------------------------------------------------------------


def imported_by(code):
    """Names of the modules that a fresh interpreter holds after running ``code``."""
    script = f"import sys, json\n{code}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_import_brings_nothing_along():
    found = imported_by("import holofunc")
    assert {"torch", "torchvision", "matplotlib", "numpy", "tqdm", "optree"} & found == set()


def test_rooms_import_neither_torchvision_nor_matplotlib_nor_the_compiler():
    rooms = ", ".join(set(holofunc.__all__) - {"__version__"})
    found = imported_by(f"from holofunc import {rooms}")
    assert "holofunc.train.loop" in found
    heavy = {"torchvision", "matplotlib", "tensorboard", "triton", "torch._dynamo", "torch._inductor"}
    assert heavy & found == set()


def test_unknown_name():
    with pytest.raises(AttributeError, match="module 'holofunc' has no attribute 'trainer'"):
        holofunc.trainer  # noqa: B018


@pytest.mark.slow
def test_importing_all_rooms_costs_little_beside_torch():
    def seconds(code):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
        return time.perf_counter() - began

    rooms = ", ".join(set(holofunc.__all__) - {"__version__"})
    pairs = [(seconds("import torch"), seconds(f"from holofunc import {rooms}")) for _ in range(7)]
    torch_alone, with_rooms = (statistics.median(times) for times in zip(*pairs, strict=True))
    assert with_rooms <= 1.25 * torch_alone
