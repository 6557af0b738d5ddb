"""The site: the gallery shows every layer, its pictures are what its script draws, docstrings become readable pages."""

import ast
import importlib.util
import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from holofunc import losses, nn
from holofunc.ops import boxes

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "layers.md").read_text()
SHOWN = re.findall(r"!\[.+?\]\(img/layers/(\w+\.png)\)", PAGE, flags=re.S)


def script(name):
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- the gallery -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layers")
    script("figures").main(folder)
    return folder


def test_script_draws_what_the_page_shows(drawn):
    assert sorted(SHOWN) == sorted(path.name for path in drawn.iterdir())
    assert sorted(SHOWN) == sorted(path.name for path in (DOCS / "img/layers").iterdir())


def test_pictures_have_something_on_them(drawn):
    for path in drawn.iterdir():
        with Image.open(path) as image:
            assert image.size[0] == 1050
            assert len(set(image.convert("L").resize((200, 60)).tobytes())) > 5


def test_pictures_are_small():
    sizes = [(DOCS / "img/layers" / name).stat().st_size for name in SHOWN]
    assert max(sizes) < 40_000
    assert sum(sizes) < 600_000


def test_every_layer_loss_and_box_loss_has_its_picture():
    sections = re.split(r"^##+ ", PAGE, flags=re.M)[1:]
    titles = {
        title.strip() for section in sections if "img/layers" in section for title in section.split("\n")[0].split(",")
    }
    layers = {member.__name__ for member in vars(nn).values() if inspect.isclass(member)}  # aliases share one
    functions = [name for name in losses.__all__ if name != "check_labels"]
    of_boxes = [name for name in boxes.__all__ if name.endswith("_loss") or name == "nms"]
    assert [name for name in (*layers, *functions, *of_boxes) if name not in titles] == []


# --- docstrings --------------------------------------------------------------------------------------------------

SECTIONS = ["Attributes", "Args", "Returns", "Raises", "Source", "Example"]
NAMES = {"True", "False", "None", "Mish", "Python", "Adam", "Gaussian", "Muon"}
"""What an entry may begin with, beside a word in lower case."""


def docstrings():
    for path in sorted((DOCS.parent / "holofunc").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
                yield f"{path.relative_to(DOCS.parent)}: {getattr(node, 'name', 'the module')}", text


def dialect(text):
    """What is not as everywhere: sections in another order or after which there is prose, entries that begin with a
    capital, code in single backticks, which are for names."""
    heads = re.findall(
        r"^([A-Z]\w+):(?= *$)|^(Sources?|References?|Notes?|Returns|Raises|Args|Yields|Examples?): ", text, re.M
    )
    heads = ["".join(head) for head in heads]
    if heads != [head for head in SECTIONS if head in heads]:
        yield f"sections {heads}"
    _, *sections = re.split(rf"^(?=(?:{'|'.join(SECTIONS)}):)", text, flags=re.M)
    for section in sections:
        head, _, body = section.partition(":")
        if head != "Source" and (after := re.search(r"^\S.*", body, re.M)):
            yield f"after {head}: {after[0]}"
        if head in ("Args", "Attributes", "Raises"):
            words = re.findall(r"^    \*{0,2}\w[\w, *]*: ([A-Z][a-z]+)(?=[ ,;:.])", body, re.M)
            yield from (f"{head}: {word}" for word in words if word not in NAMES)
    prose = text.partition("\nExample:")[0]
    code = re.findall(r"(?<![`\w])`([^`\n]+)`(?!`)", prose)
    yield from (f"single backticks: {words}" for words in code if not re.fullmatch(r"[A-Za-z_][\w.]*", words))


def test_docstrings_have_one_dialect():
    assert {name: found for name, text in docstrings() if (found := list(dialect(text)))} == {}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("One.\n\nArgs:\n    x: a `name` and ``x + 1``.\n\nRaises:\n    ValueError: wrong.", []),
        ("One.\n\nArgs:\n    x: The input.\n    y: True where it is.", ["Args: The"]),
        ("One.\n\nReturns:\n    A sum.\n\nArgs:\n    x: a number.", ["sections ['Returns', 'Args']"]),
        ("One.\n\nArgs:\n    x: a number.\n\nIt is small.", ["after Args: It is small."]),
        ("One.\n\nNotes:\n    None.", ["sections ['Notes']"]),
        ("One.\n\nReturns:\n    `x + 1`.", ["single backticks: x + 1"]),
    ],
)
def test_another_dialect_is_noticed(text, found):
    assert list(dialect(text)) == found


def test_docstrings_are_rendered_as_they_are_meant():
    docstring = SimpleNamespace(
        value="Like `holofunc.nn.SAM`.\n\nSource: a paper\n    of two lines.\n\nExample:\n    >>> 1\n    1"
    )
    script("extension").House().on_object(obj=SimpleNamespace(docstring=docstring))
    link = '<autoref identifier="holofunc.nn.SAM" optional>`holofunc.nn.SAM`</autoref>'
    assert docstring.value == f"Like {link}.\n\nSource: a paper\nof two lines.\n\nExamples:\n    >>> 1\n    1"


# --- examples ----------------------------------------------------------------------------------------------------


def test_start_page_lists_the_examples():
    listed = set(re.findall(r"`(\w+\.(?:py|ipynb))`", (DOCS / "index.md").read_text()))
    assert listed == {path.name for path in (DOCS.parent / "examples").iterdir() if path.suffix in (".py", ".ipynb")}
