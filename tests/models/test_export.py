"""Deployed models: the table of the laws as ordinary modules, as files for torch and for ONNX, and from the command line."""

import importlib.util
import itertools
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from holofunc import config, from_module, lift, models, optim, random
from holofunc.cli import main
from holofunc.cli.runs import trained
from holofunc.models import exporting

onnxruntime = pytest.importorskip("onnxruntime")
spec = importlib.util.spec_from_file_location("laws", Path(__file__).with_name("test_laws.py"))
laws = importlib.util.module_from_spec(spec)
spec.loader.exec_module(laws)

SHORT = {  # a file of each family, and programs of two (the laws export all, without files); the rest takes minutes
    ".onnx": [
        *("resnet18", "res2net50_26w_4s", "tridentnet50", "pyconv_resnet50", "sknet50", "rexnet1_0x", "convnext_atto"),
        *("darknet24", "cspdarknet53_mish", "repvgg_a0", "mobileone_s0", "repvit_m0_9"),
    ],
    ".pt2": ["convnext_atto", "darknet24"],
}
SIZE = 48


def run(path, images):
    """The outputs of a file, computed without holofunc."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()(images).detach()
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["outputs"], {"images": images.numpy()})[0])


def agrees(path, model, params, buffers, images):
    """Whether the file gives what the model gives, at 1e-4 of the largest output, for any number of images."""
    for batch in (images[:1], images):
        expected = model.apply(params, buffers, batch)[0].detach()
        torch.testing.assert_close(run(path, batch), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


# --- modules -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", laws.SMALL)
def test_to_module_and_back(name):
    model, params, buffers, images = laws.start(name, torch.float32)
    module = model.to_module(params, buffers)
    assert not any(m.training for m in module.modules())
    assert list(module.state_dict()) == list(model.skeleton.state_dict())
    again, *values = from_module(module)
    for got, given in zip(values, (params, buffers), strict=True):
        assert list(got) == list(given)
        assert all(torch.equal(got[n], given[n]) and got[n] is not given[n] for n in given)
    torch.testing.assert_close(again.apply(*values, images)[0], model.apply(params, buffers, images)[0])


# --- files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        pytest.param(name, suffix, marks=[] if name in SHORT[suffix] else pytest.mark.slow)
        for name in laws.SMALL
        for suffix in SHORT
    ],
)
def test_files_compute_what_models_do(name, suffix, tmp_path):
    model, params, buffers, images = laws.start(name, torch.float32)
    path = tmp_path / f"model{suffix}"
    assert models.export(model, params, buffers, path, size=SIZE) < 1e-4
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    agrees(path, model, params, buffers, images)


@pytest.mark.parametrize("name", [pytest.param("repvgg_a0", marks=pytest.mark.slow), "mobileone_s0"])
def test_deployed_forms_are_files_too(name, tmp_path):
    model, params, buffers, images = laws.start(name, torch.float32)
    deployed = models.reparametrize(model, params, buffers)
    models.export(*deployed, tmp_path / "small.onnx", size=SIZE)
    agrees(tmp_path / "small.onnx", model, params, buffers, images)
    graph = pytest.importorskip("onnx").load(tmp_path / "small.onnx").graph
    assert {node.op_type for node in graph.node}.isdisjoint({"BatchNormalization"})


def test_without_a_runtime_the_reference_of_onnx_proves_the_file(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    model = lift(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)))
    assert models.export(model, *model.init(random.key(0)), tmp_path / "m.onnx", size=8) < 1e-4


class Fickle(nn.Module):
    """Counts its calls, in a place that outlives them, which a file cannot."""

    calls = itertools.count(1)

    def __init__(self):
        super().__init__()
        self.weight, self.in_channels = nn.Parameter(torch.ones(1)), 3

    def forward(self, x):
        return x.mean((2, 3)) * self.weight * next(self.calls)


def test_a_file_that_computes_something_else_is_not_kept(tmp_path):
    path = tmp_path / "model.pt2"
    path.write_bytes(b"an older one")
    model = lift(Fickle)
    with pytest.raises(
        exporting.ExportError, match=r"model.pt2 would compute something else than Fickle: it differs by"
    ):
        models.export(model, *model.init(random.key(0)), path, size=4)
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt2"]
    assert path.read_bytes() == b"an older one"


@pytest.mark.parametrize(
    ("path", "options", "error", "message"),
    [
        ("model.pth", {}, ValueError, "path must end with .pt2 or .onnx, got '.*model.pth'"),
        ("none/model.pt2", {}, FileNotFoundError, "where model.pt2 is to be written, is not a folder"),
        ("model.pt2", {"size": 0}, ValueError, "size must be an integer of at least 1, got 0"),
        ("model.pt2", {"size": 8.0}, ValueError, "size must be an integer of at least 1, got 8.0"),
        ("model.pt2", {"size": 2}, ValueError, "darknet24 takes no images of size 2"),
    ],
)
def test_what_cannot_be_exported(tmp_path, path, options, error, message):
    model = laws.small("darknet24")
    with pytest.raises(error, match=message):
        models.export(model, *model.init(random.key(0)), tmp_path / path, **options)
    assert list(tmp_path.iterdir()) == []


class Parts(nn.Module):
    """Outputs a dict, or a tuple in which a list and None are."""

    def __init__(self, kind):
        super().__init__()
        self.layer, self.kind = nn.Linear(3, 2), kind

    def forward(self, x):
        out = self.layer(x)
        return {"out": out, "aux": 0 * x} if self.kind is dict else (out, [x + 1, out.relu()], None)


@pytest.mark.parametrize("kind", [dict, tuple])
@pytest.mark.parametrize("suffix", [".pt2", pytest.param(".onnx", marks=pytest.mark.slow)])
def test_outputs_of_several_tensors(tmp_path, kind, suffix):
    model, path = lift(Parts, kind), tmp_path / f"model{suffix}"
    params, buffers = model.init(random.key(0))
    x = random.normal(random.key(1), (3, 3))
    assert models.export(model, params, buffers, path, example=x) <= 1e-4
    expected = model.apply(params, buffers, x)[0]
    if suffix == ".pt2":
        torch.testing.assert_close(torch.export.load(path).module()(x), expected)
        return
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = ["out", "aux"] if kind is dict else ["outputs", "outputs1", "outputs2"]
    assert [output.name for output in session.get_outputs()] == names
    flat = list(expected.values()) if kind is dict else [expected[0], *expected[1]]
    for got, wanted in zip(session.run(None, {"images": x.numpy()}), flat, strict=True):
        torch.testing.assert_close(torch.from_numpy(got), wanted.detach())


def test_maps_are_exported_by_their_names(tmp_path):
    model = models.features(laws.small("resnet18"), [1, 2])
    params, buffers = model.init(random.key(0))
    models.export(model, params, buffers, tmp_path / "m.pt2", size=32)
    images = torch.ones(1, 3, 32, 32)
    expected = model.apply(params, buffers, images)[0]
    torch.testing.assert_close(torch.export.load(tmp_path / "m.pt2").module()(images), expected)


def test_an_output_without_tensors_is_refused(tmp_path):
    class Says(nn.Module):
        def forward(self, x):
            return "nothing"

    with pytest.raises(ValueError, match="Says outputs no tensor, but str: it cannot be exported"):
        models.export(lift(Says), {}, {}, tmp_path / "m.pt2", example=torch.ones(2, 3))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_a_missing_extra_is_named(tmp_path, monkeypatch, package):
    found = exporting.find_spec
    monkeypatch.setattr(exporting, "find_spec", lambda name: None if name == package else found(name))
    model = laws.small("resnet18")
    with pytest.raises(ImportError, match=rf"model.onnx needs {package}: pip install 'holofunc\[export\]'"):
        models.export(model, *model.init(random.key(0)), tmp_path / "model.onnx")


# --- the command -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A short run on the digits, whose evaluated weights are an average."""
    out = tmp_path_factory.mktemp("runs") / "digits"
    options = [
        *("--steps", "8", "--ema", "0.9", "--model-options", "widths=[4, 8]"),
        *("--no-compile", "--device", "cpu"),
    ]
    assert main(["train", "--data", "digits", "--out", str(out), *options]) == 0
    return out


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ([], "model.pt2"),
        (["--format", "onnx"], "model.onnx"),
        (["--reparametrize", "--out", "small.onnx", "--step", "latest"], "small.onnx"),
    ],
)
def test_export_of_a_run(folder, tmp_path, monkeypatch, capsys, options, name):
    monkeypatch.chdir(tmp_path)
    assert main(["export", "--run", str(folder), *options]) == 0
    path = tmp_path / name if "--out" in options else folder / name
    assert str(path.name) in capsys.readouterr().out
    settings = config.read(folder / "config.toml")
    model, state, _ = trained(settings, folder, "latest")
    average = optim.eval_params(state.opt_state, state.params)
    assert not torch.equal(average["head.weight"], state.params["head.weight"])
    agrees(path, model, dict(average), dict(state.buffers), random.normal(random.key(1), (3, 1, 8, 8)))


def test_export_of_published_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = {"num_blocks": [1], "planes": [64], "num_classes": 4}
    model = models.resnet18(**options)
    params, buffers = model.init(random.key(3))
    torch.save(params | buffers, "w.pth", _use_new_zipfile_serialization=False)
    given = [part for name, value in options.items() for part in ("--model-options", f"{name}={value}")]
    assert main(["export", "--model", "resnet18", "--weights", "w.pth", "--size", "32", *given]) == 0
    assert "resnet18.pt2: Model(resnet18, " in capsys.readouterr().out
    agrees(Path("resnet18.pt2"), model, params, buffers, random.normal(random.key(1), (3, 3, 32, 32)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "one of the arguments --run --model is required"),
        (["--run", "RUN", "--model", "resnet18"], "not allowed with argument"),
        (["--run", "nowhere"], "'nowhere' contains no run: it has no config.toml"),
        (["--run", "RUN", "--weights", "DEFAULT"], "--weights and --model-options go with --model: a run has its own"),
        (["--run", "RUN", "--step", "3"], "step 3"),
        (["--run", "RUN", "--size", "0"], "size must be an integer of at least 1, got 0"),
        (["--run", "RUN", "--format", "tflite"], "invalid choice: 'tflite'"),
        (["--run", "RUN", "--format", "onnx", "--out", "m.pt2"], "--out must end with .onnx for --format onnx"),
        (["--run", "RUN", "--out", "m.pth"], "path must end with .pt2 or .onnx, got 'm.pth'"),
        (["--run", "RUN", "--out", "none/m.pt2"], "'none', where m.pt2 is to be written, is not a folder"),
        (["--model", "resnet18"], "--model needs --weights: DEFAULT, another published name, a path or a URL"),
        (["--model", "resnet20", "--weights", "DEFAULT"], "no model named 'resnet20': did you mean 'resnet50'"),
        (["--model", "resnet18", "--weights", "w.pth"], "there is no such file"),
        (["--model", "resnet18", "--weights", "http://127.0.0.1:9/w.pth"], "http://127.0.0.1:9/w.pth: .*refused"),
    ],
)
def test_export_refuses_in_one_line(folder, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert main(["export", *[str(folder) if each == "RUN" else each for each in options]]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("holofunc: error: ")
    assert printed.err.count("\n") == 1
    assert re.search(message, printed.err)
