"""The documentation is true: examples run, public names are described, links lead somewhere, commands are what CI runs."""

import importlib.util
import inspect
import os
import re
import subprocess
import sys
import tomllib
import zlib
from pathlib import Path
from types import ModuleType

import griffe
import nbformat
import pytest
import torch
from nbclient import NotebookClient

import holofunc
from holofunc import optim, random, tree

ROOT = Path(__file__).parents[1]
ROOMS = [name for name in holofunc.__all__ if isinstance(getattr(holofunc, name, None), ModuleType)]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


# --- examples ----------------------------------------------------------------------------------------------------


def example(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"examples/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_quickstart_learns_the_digits(capsys):
    assert example("quickstart").main() > 0.97
    assert "accuracy on the held-out fifth: 9" in capsys.readouterr().out


def test_composed_optimizer_learns_the_digits(capsys):
    raw, averaged = example("compose_optimizers").main(epochs=4)
    assert min(raw, averaged) > 0.95
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in lines[1:-1]] == ["0.10", "0.10", "0.00", "0.00"]  # weight decay, set in mid-run
    assert lines[-1] == f"a batch of NaN was skipped: True; accuracy {raw:.1%}"


def test_only_the_iou_leaves_disjoint_boxes_where_they_are(capsys):
    results = example("regress_boxes").main(steps=200)
    overlapping, disjoint = zip(*results.values(), strict=True)
    assert min(overlapping) > 0.95
    assert disjoint[0] == 0
    assert min(disjoint[1:]) > 0.7
    assert capsys.readouterr().out.splitlines()[1].split() == ["1", "-", "box_iou", f"{overlapping[0]:.3f}", "0.000"]


def test_fine_tuning_pays_and_a_frozen_body_does_where_it_knows_the_images(capsys):
    known, mirrored = example("finetune").main()
    scratch, frozen, tuned = known
    assert min(known[frozen], known[tuned]) > max(0.93, known[scratch] + 0.03)
    assert mirrored[tuned] > mirrored[frozen] + 0.05
    assert capsys.readouterr().out.splitlines()[-1].split()[-2:] == [f"{each[tuned]:.1%}" for each in (known, mirrored)]


TWO_RANKS = """
import sys
sys.path.insert(0, sys.argv[1])
from train_distributed import main
from holofunc import distributed
both = distributed.launch(lambda: main(epochs=3, samples=512, compile=False), 2)
assert both == [main(epochs=3, samples=512, compile=False)] * 2, both
"""


def test_two_ranks_train_as_one():
    command = [sys.executable, "-c", TWO_RANKS, str(ROOT / "examples")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "2 ranks with 64 of 128 samples: accuracy on the held-out fifth" in done.stdout


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_runs(path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 4
    assert outputs[-1]["data"]["text/plain"] == "True"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_is_stored_without_outputs(path):
    code = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert code
    assert all(not cell.outputs and cell.execution_count is None for cell in code)


# --- names -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def package():
    return griffe.load("holofunc", search_paths=[ROOT])


def public(module):
    """The public names of a module, by path, and of the modules among them (`optim.schedules`)."""
    found = {}
    for name in map(str, module.exports):
        member = module[name].final_target if module[name].is_alias else module[name]
        if member.is_module and name in member.members:  # a function that hides the module it is defined in
            member = member[name]
        found[f"{module.path}.{name}"] = member
        found.update(public(member) if member.is_module else {})
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_public_names_have_docstrings(package, room):
    assert package[room].has_docstring
    assert [path for path, member in public(package[room]).items() if not member.has_docstring] == []


def test_site_builds_and_describes_every_public_name(package, tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    inventory = (tmp_path / "objects.inv").read_bytes().split(b"zlib.\n", 1)[1]
    described = {line.split()[0] for line in zlib.decompress(inventory).decode().splitlines()}
    names = {path for room in ROOMS for path in public(package[room])}
    pages = {name.rpartition(".")[0] for name in described}  # a module is described by what stands on its page
    assert sorted(names - described - pages) == []


# --- words -------------------------------------------------------------------------------------------------------

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    targets = [target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", prose) if "://" not in target]
    assert [target for target in targets if target and not (page.parent / target).exists()] == []


def test_readme_has_the_two_commands_and_ci_runs_the_second():
    commands = re.findall(r"```sh\n(.*?)\n```", (ROOT / "README.md").read_text(), flags=re.S)
    assert commands == [
        "python -m pip install -e . && holofunc train --data digits --epochs 5 --out runs/digits",
        "python -m pip install -e '.[test]' && python -m pytest",
    ]
    pattern = re.search(r'readme=\$\(grep -E "(.*)" README.md\)', (ROOT / ".ci/run").read_text())[1]
    assert [c for c in (ROOT / "README.md").read_text().splitlines() if re.search(pattern, c)] == commands[1:]


def test_ci_runs_the_checks_of_contributing():
    setting_up = (ROOT / "CONTRIBUTING.md").read_text().split("\n## ")[1]
    table = re.findall(r"^\| .* \| `(.*)` \|$", setting_up, flags=re.M)
    ran = (ROOT / ".ci/run").read_text()
    checks = [command for command in table if "pytest" not in command]
    assert len(checks) == 5
    assert not [command for command in checks if f"timed {command}" not in ran]


def test_changelog_knows_the_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


# --- the table of optimizers -------------------------------------------------------------------------------------


def optimizer_rows():
    """Rows of the table in docs/optimizers.md: name, options, formulas of the state, bytes."""
    table = (ROOT / "docs/optimizers.md").read_text().split("\n## All optimizers\n")[1].split("\n## ")[0]
    for line in table.splitlines():
        if found := re.match(r"\| \[`(\w+)`\]\[holofunc\.optim\.(\w+)\](?: with `(.*?)`)? \|", line):
            name, target, options = found.groups()
            _, _, _, matrix, vector, moved, _ = (cell.strip(" `") for cell in line[1:-1].split("|"))
            assert name == target
            yield name, options or "", matrix, vector, moved


@pytest.fixture(scope="module")
def optimizers():
    """Names of the functions that make an optimizer of a learning rate."""
    functions = {name: getattr(optim, name) for name in optim.__all__ if not name.startswith("scale_by_")}
    return {
        name
        for name, fn in functions.items()
        if inspect.isfunction(fn) and next(iter(inspect.signature(fn).parameters), None) == "learning_rate"
    }


def test_table_of_optimizers_has_all_of_them(optimizers):
    assert len(optimizers) >= 22
    assert {row[0] for row in optimizer_rows()} == optimizers


def test_trajectories_show_all_optimizers(optimizers):
    notebook = nbformat.read(ROOT / "examples/optimizer_trajectories.ipynb", as_version=4)
    used = re.findall(r"optim\.(\w+)", "\n".join(cell.source for cell in notebook.cells))
    assert optimizers | {"cautious", "ema_params", "lookahead", "sam", "scout"} <= set(used)


def test_every_optimizer_tells_its_rule_and_where_it_comes_from(optimizers):
    told = {name: inspect.getdoc(getattr(optim, name)) for name in optimizers}
    source = r"Source: [^>]*((19|20)\d\d|arXiv \d{4}\.\d{4,5})"
    rule = r"^    \w+ = |``p - learning_rate \*"
    assert [n for n, doc in told.items() if not (re.search(source, doc) and re.search(rule, doc, flags=re.M))] == []


@pytest.mark.parametrize("page", ["optimizers.md", "migration.md"])
def test_names_on_pages_exist(page):
    prose = re.sub(r"```.*?```", "", (ROOT / "docs" / page).read_text(), flags=re.S)
    code = " ".join(re.findall(r"`([^`\n]+)`", prose))
    rooms = {
        name: getattr(holofunc, name) for name in ("checkpoint", "losses", "models", "optim", "plots", "train", "tree")
    }
    rooms["schedules"] = optim.schedules
    named = set(re.findall(rf"(?<![\w.])({'|'.join(rooms)})\.(\w+)", code))
    assert named
    assert [f"{room}.{name}" for room, name in named if not hasattr(rooms[room], name)] == []


def test_table_of_pieces_has_all_rules():
    table = (ROOT / "docs/optimizers.md").read_text().split("\n## All pieces\n")[1]
    named = set(re.findall(r"`(\w+)`", table))
    assert {name for name in optim.__all__ if name.startswith("scale_by_")} <= named
    assert named <= set(optim.__all__)


@pytest.mark.parametrize("row", [pytest.param(row, id=" ".join(row[:2])) for row in optimizer_rows()])
def test_table_of_optimizers_tells_the_size_of_their_state(row):
    name, options, matrix, vector, moved = row
    tx, n, m = eval(f"optim.{name}(1e-3, {options})", {"optim": optim, "random": random}), 6, 4

    def measured(*shape):
        params = {"p": torch.ones(shape)}
        leaves = [leaf for leaf in tree.leaves(tx.init(params)) if leaf.ndim and leaf.is_floating_point()]  # no keys
        return sum(leaf.numel() for leaf in leaves) / tree.size(params)

    told = eval(matrix, {"n": n, "m": m})
    assert (told, float(vector)) == pytest.approx((measured(n, m), measured(n)))
    assert moved == (str(12 + 8 * told) if isinstance(told, int) else "")
