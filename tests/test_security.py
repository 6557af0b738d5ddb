"""The package executes nothing that it has read: found in its syntax, not in its behaviour."""

import ast
from pathlib import Path

import pytest

import holofunc

SOURCES = sorted(Path(holofunc.__file__).parent.rglob("*.py"))
FORBIDDEN_CALLS = {
    "eval": "code from a string",
    "exec": "code from a string",
    "__import__": "a module by a string",
    "import_module": "a module by a string",
    "add_safe_globals": "a wider torch.load",
    "load_state_dict_from_url": "a download without its whole hash",
    "system": "a shell",
    "mktemp": "a name that can be guessed",
}
FORBIDDEN_IMPORTS = {"pickle", "cPickle", "dill", "shelve", "marshal", "yaml", "subprocess"}

EXCEPTIONS = {
    "__init__.py": ("import_module",),  # rooms are imported when first used, by names from a fixed list
    "torch_internals.py": ("import_module",),  # private names of torch, from a list in that file
    "launch.py": (
        "import pickle",
        "import subprocess",
    ),  # between a process and those that it has started; the command that its caller gives
}


def offences(source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            named = node.func
            name = named.id if isinstance(named, ast.Name) else getattr(named, "attr", "")
            method = isinstance(named, ast.Attribute)
            if name in FORBIDDEN_CALLS and not (method and name == "eval"):  # module.eval() is torch's
                yield node.lineno, f"{name}: {FORBIDDEN_CALLS[name]}"
            options = {option.arg: getattr(option.value, "value", None) for option in node.keywords}
            if name == "load" and method and getattr(named.value, "id", "") in ("torch", "np", "numpy"):
                safe = {"torch": ("weights_only", True)}.get(named.value.id, ("allow_pickle", False))
                if options.get(safe[0]) is not safe[1]:
                    yield node.lineno, f"load without {safe[0]}={safe[1]}"
            if options.get("shell") is True:
                yield node.lineno, "a shell"
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            for name in names:
                if name.partition(".")[0] in FORBIDDEN_IMPORTS:
                    yield node.lineno, f"import {name}"


@pytest.mark.parametrize("path", SOURCES, ids=[str(path.relative_to(SOURCES[0].parent)) for path in SOURCES])
def test_nothing_that_was_read_is_executed(path):
    allowed = EXCEPTIONS.get(path.name, ())
    found = [(line, what) for line, what in offences(path.read_text()) if what.partition(":")[0] not in allowed]
    assert found == []


@pytest.mark.parametrize(
    "code",
    [
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "np.load(f)",
        "np.load(f, allow_pickle=True)",
        "eval(text)",
        "importlib.import_module(name)",
        "import pickle",
        "from yaml import load",
        "run(command, shell=True)",
    ],
)
def test_the_search_finds_what_it_looks_for(code):
    assert len(list(offences(code))) == 1
    assert list(offences("torch.load(f, weights_only=True); np.load(f, allow_pickle=False); module.eval()")) == []
